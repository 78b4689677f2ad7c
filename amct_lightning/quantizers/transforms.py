"""What the autograd functions have in common: for ``torch.func`` transforms, and against second gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])

SECOND_GRADIENT = (
    "A quantized layer refuses to differentiate twice, as a gradient penalty does: rounding has no second derivative, "
    "and the answer would be a wrong number. Take the penalty with the layers in float: set quant_mode = 'float' on "
    "each of quantized_layers(model).values() for that forward, and what it was before after it. "
    "docs/troubleshooting.md, 'Gradient penalties', shows how."
)


def transforming() -> bool:
    """Tell whether a ``torch.func`` transform (grad, vmap, jvp, ...) is at work.

    Then a module must not write into its buffers: what it would write belongs to the transform.
    """
    return torch._C._are_functorch_transforms_active()  # what torch.autograd.Function.apply itself goes by


def differentiating_forward() -> bool:
    """Tell whether a level of forward-mode differentiation (``torch.autograd.forward_ad``) is entered."""
    return torch.autograd.forward_ad._current_level >= 0  # there is no public way to ask


def transforming_calibrated(calibrated: bool) -> bool:
    """Tell whether a transform is at work, and refuse one that runs what is not calibrated: it cannot be there.

    Args:
        calibrated: Whether there is a range to work with.
    """
    active = transforming()
    if active and not calibrated:
        raise RuntimeError(
            "A torch.func transform (grad, vmap, jvp, ...) runs a quantized layer in training that is not calibrated, "
            "and cannot calibrate it. Call amct_lightning.calibrate(model, batches) before it, or train for "
            "`batch_num` batches without the transform; or call model.eval()."
        )
    return active


def times_(values: Tensor, other: Tensor) -> Tensor:
    """Multiply in place where that is possible: under vmap ``other`` may be a batch where ``values`` is not."""
    return values * other if transforming() else values.mul_(other)


def call(function: Any, direct: Any, *args: Any) -> Tensor:
    """Call an autograd function.

    Args:
        function: The function.
        direct: What :func:`direct_form` gave for it.
        args: The arguments of its forward.
    """
    output: Tensor = (function if transforming() else direct).apply(*args)
    return output


def direct_form(function: Any) -> Any:
    """Return an autograd function that has a ``setup_context`` in the form that takes less time to call.

    The form that transforms need looks up the signature of ``forward`` in each call, which takes longer than an
    operator on a small tensor. So it is used under transforms only.

    Args:
        function: The function.
    """

    class Direct(function):  # type: ignore[misc]
        setup_context = torch.autograd.Function.setup_context
        jvp = torch.autograd.Function.jvp  # torch.compile takes none of one's own

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            output: Tensor = function.forward(*inputs)
            function.setup_context(ctx, inputs, output)
            return output

    Direct.__name__ = Direct.__qualname__ = function.__name__
    return Direct


def differentiable_once(backward: _Function) -> _Function:
    """Like ``torch.autograd.function.once_differentiable``, with an error that says what to do.

    The gradients depend on what the function keeps as well; ``ctx.anchors`` are parameters that stand for it.

    Args:
        backward: The backward of an autograd function.
    """

    @wraps(backward)
    def once(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        parts = (*grads, *getattr(ctx, "anchors", ()))
        if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
            return tuple(output if output is None else call(_Refuse, _REFUSE, output, *parts) for output in outputs)
        return outputs

    return once  # type: ignore[return-value]


class _Refuse(torch.autograd.Function):
    """The first tensor as it is, with an error for whoever differentiates it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor, *_grads: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> Any:
        raise RuntimeError(SECOND_GRADIENT)

    @staticmethod
    def jvp(ctx: Any, *_tangents: Any) -> Any:
        raise RuntimeError(SECOND_GRADIENT)


_REFUSE = direct_form(_Refuse)
