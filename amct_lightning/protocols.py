"""What the callbacks and the room for Ascend ask of each other; neither of them imports the other.

A strategy, a CheckpointIO or a module fits one of these by having its members. None has to be named here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from lightning.fabric.plugins import CheckpointIO


@runtime_checkable
class ShardingStrategy(Protocol):
    """A strategy that divides the parameters of a model among ranks, and knows of layers that are converted.

    Attributes:
        shards_in_configure_model: Whether layers that exist by then are to be converted before ``configure_model``,
            which may shard them, instead of after it.
    """

    shards_in_configure_model: bool

    def share_buffers(self) -> None:
        """Give all ranks the buffers of rank 0; a collective."""


@runtime_checkable
class WrappingCheckpointIO(Protocol):
    """A CheckpointIO that adds to checkpoints what another one writes.

    Attributes:
        inner: The one that does the actual reading and writing.
    """

    inner: CheckpointIO

    def complete(self, checkpoint: dict[str, Any]) -> None:
        """Add what needs all ranks; where several of them hold a model, it is called on all before one writes.

        Args:
            checkpoint: The checkpoint.
        """


@runtime_checkable
class KeepsWhole(Protocol):
    """A module that says whether its parameters, small and needed outside of the forward, stay whole on every rank.

    Attributes:
        keeps_whole: Whether they do.
    """

    keeps_whole: bool
