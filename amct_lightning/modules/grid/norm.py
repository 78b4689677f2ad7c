"""A BatchNorm that is folded into the layer before it while that computes on the device's grid, in evaluation."""

from __future__ import annotations

import weakref
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from amct_lightning.modules.folding import only_normalizes

_PLACE = "_amct_folded_norm"
"""Where a layer keeps the place of its BatchNorm; no module of its own, so that it is none in ``named_modules()``."""


class FoldedNorm(_BatchNorm):
    """Mixin of the twins of all BatchNorms: what the owner has folded already passes through.

    Attributes:
        owner: The layer that it is folded into.
    """

    owner: nn.Module

    @classmethod
    def convert(cls, norm: nn.Module, owner: nn.Module) -> None:
        """Turn a BatchNorm into its twin, in place; one that is a twin gets a new owner.

        Args:
            norm: The BatchNorm.
            owner: The layer that it is folded into.
        """
        if not isinstance(norm, FoldedNorm):
            norm.__class__ = _twin_of(type(norm))
        norm.__dict__["owner"] = owner

    def revert(self) -> None:
        """Turn it back into the BatchNorm that it was made from."""
        self.__dict__.pop("owner", None)
        self.__class__ = self.float_class()  # type: ignore[assignment]

    @classmethod
    def float_class(cls) -> type[nn.Module]:
        """Return the class that this one is the twin of."""
        return next(kind for kind in cls.__mro__ if issubclass(kind, _BatchNorm) and not issubclass(kind, FoldedNorm))

    def forward(self, input: Tensor) -> Tensor:
        """Return the input as it is if the owner has normalized it, or else normalize it."""
        folded = getattr(self.owner, "folded_norm", None)  # the owner may have been reverted without its BatchNorm
        if folded is not None and folded() is self:
            return input
        return self.float_forward(input)

    def float_forward(self, input: Tensor) -> Tensor:
        """Normalize as before the conversion."""
        return super().forward(input)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Let pickle find the class, which is made when it is needed, by the one that it is a twin of."""
        _, _, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        return (_blank, (self.float_class(),), *state)

    def extra_repr(self) -> str:
        """Show in ``print(model)`` what becomes of it."""
        settings: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{settings}, folded in evaluation"


class _Place:
    """Where a BatchNorm is. What is there may be replaced by another one, as for SyncBatchNorm.

    It does not keep the model alive, so that a copy of a layer alone folds nothing.
    """

    def __init__(self, parent: nn.Module, name: str) -> None:
        self._parent = weakref.ref(parent)
        self._name = name

    @property
    def norm(self) -> nn.Module | None:
        """What is there now."""
        parent = self._parent()
        return None if parent is None else parent._modules.get(self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _place, (self._parent(), self._name)


def fold_norm(owner: nn.Module, model: nn.Module, name: str) -> None:
    """Let a layer fold a BatchNorm of its model; nothing is done if what is there is no BatchNorm.

    Args:
        owner: The layer.
        model: The model.
        name: Dotted name of the BatchNorm in it.
    """
    path, _, leaf = name.rpartition(".")
    try:
        parent = model.get_submodule(path)
    except AttributeError:
        return
    norm = parent._modules.get(leaf)
    if norm is not None and (isinstance(norm, FoldedNorm) or only_normalizes(norm)):
        FoldedNorm.convert(norm, owner)
        owner.__dict__[_PLACE] = _Place(parent, leaf)


def norm_of(owner: nn.Module) -> FoldedNorm | None:
    """Return the BatchNorm that a layer may fold, if it is still in its place.

    Args:
        owner: The layer.
    """
    place = owner.__dict__.get(_PLACE)
    norm = None if place is None else place.norm
    return norm if isinstance(norm, FoldedNorm) and norm.owner is owner else None


def has_lost_norm(owner: nn.Module) -> bool:
    """Tell whether a layer had a BatchNorm to fold that is no longer in its place.

    Args:
        owner: The layer.
    """
    return _PLACE in owner.__dict__ and norm_of(owner) is None


def release_norm(owner: nn.Module) -> None:
    """Take back what :func:`fold_norm` did.

    Args:
        owner: The layer.
    """
    norm = norm_of(owner)
    if norm is not None:
        norm.revert()
    owner.__dict__.pop(_PLACE, None)


def _twin_of(kind: type[nn.Module]) -> type[FoldedNorm]:
    """Return the twin of a class; user code may have its own, which do as their base."""
    if kind not in _TWINS:
        twin = type(f"Folded{kind.__name__}", (FoldedNorm, kind), {"__module__": __name__})
        _TWINS[kind] = cast(type[FoldedNorm], twin)
    return _TWINS[kind]


_TWINS: dict[type[nn.Module], type[FoldedNorm]] = {}


def _blank(kind: type[nn.Module]) -> FoldedNorm:
    twin = _twin_of(kind)
    return twin.__new__(twin)


def _place(parent: nn.Module | None, name: str) -> _Place | None:
    return None if parent is None else _Place(parent, name)
