"""What computes in float beside the layers of the supported types: products, softmax, norms, modules with parameters.

An operator that reads a parameter of such a module belongs to the module, and the module is told instead of it.
Additions, activation functions and pooling are in float as well, but cost little and are in every model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from amct_lightning.layer_types import LAYER_TYPES

_ATTENTION = "scaled_dot_product_attention"
_KINDS = {
    "matmul": "mm bmm addmm baddbmm addbmm mv addmv dot linear matmul",
    "convolution": "convolution _convolution conv1d conv2d conv3d",
    "softmax": "_softmax _log_softmax softmax log_softmax",
    "layer_norm": "native_layer_norm layer_norm",
    "group_norm": "native_group_norm group_norm",
    "batch_norm": "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training batch_norm",
    "rms_norm": "_fused_rms_norm rms_norm",
}
_OF_ATTENTION = "aten::_safe_softmax"
"""Made by an attention alone, between its two products, where it has no kernel for all three."""
_KIND_OF = {operator: kind for kind, operators in _KINDS.items() for operator in operators.split()}


def kind_of_operator(name: str) -> str | None:
    """Return the function that people know an operator by, if it is one that is told.

    Args:
        name: Name of an operator of the dispatcher.

    Example:
        >>> kind_of_operator("aten::bmm"), kind_of_operator("aten::add")
        ('matmul', None)
        >>> kind_of_operator("aten::_scaled_dot_product_flash_attention_for_cpu")
        'scaled_dot_product_attention'
    """
    short = name.rpartition(":")[2]
    if _ATTENTION.removesuffix("_attention") in short:
        return _ATTENTION
    return short if "attention" in short else _KIND_OF.get(short)


class FloatParts:
    """Collects, operator by operator, what computes in float outside of the watched layers.

    Args:
        model: The model of which it is told.
    """

    def __init__(self, model: nn.Module) -> None:
        self._entered = self._depth = 0
        self._second_product = False
        self._operators: list[tuple[str, bool]] = []
        self._modules: dict[str, str] = {}
        self._kinds: dict[str, str | None] = {}
        self._owners: dict[int, set[str]] = {}
        for name, module in model.named_modules():
            has_a_row = isinstance(module, tuple(LAYER_TYPES))
            if has_a_row or not any(module.children()):
                self._kinds[name] = None if has_a_row else type(module).__name__
                for parameter in module.parameters(recurse=False):
                    self._owners.setdefault(id(parameter), set()).add(name)

    def enter(self, *_: Any) -> None:
        """Note that the forward of the model begins."""
        self._entered += 1
        self._depth += 1

    def leave(self, *_: Any) -> None:
        """Note that the forward of the model ends."""
        self._depth -= 1

    def see(self, operator: str, read: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """Note an operator outside of the watched layers.

        Args:
            operator: Its name.
            read: The tensors that it read; they have to stay alive.
            made: The tensors that it returned; they have to stay alive.
        """
        origins = [self._owners.get(id(tensor), set()) for tensor in read]
        owners = set().union(*origins)
        self._modules |= {name: kind for name in owners if (kind := self._kinds[name]) is not None}
        if owners and all(origins):  # a transposed or cast weight is still the weight of its module
            self._owners |= {id(tensor): owners for tensor in made}
        if not owners and operator == _OF_ATTENTION and self._operators:
            self._operators[-1] = (_ATTENTION, self._depth > 0)
            self._second_product = True
        elif not owners and (kind := kind_of_operator(operator)) is not None:
            if not self._second_product:
                self._operators.append((kind, self._depth > 0))
            self._second_product = False

    @property
    def operators(self) -> list[str]:
        """Kinds of the operators that belong to no module, in the model's own forward if that was called."""
        return [kind for kind, inside in self._operators if inside or not self._entered]

    @property
    def modules(self) -> dict[str, str]:
        """Name -> class name of the modules whose parameters were read."""
        return self._modules
