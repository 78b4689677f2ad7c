"""Steps of a training with a sharded model: gradients, optimizers, evaluations in between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from amct_lightning.ascend.fsdp.checkpoint import ShardedCheckpoints
from amct_lightning.ascend.fsdp.gradients import average_gradients, groups_by_kind, plain
from amct_lightning.ascend.fsdp.units import reshard
from amct_lightning.ascend.hccl.collectives import broadcast_tensors
from amct_lightning.ascend.on_npus import given


def _and_then(hook: str, action: str) -> Any:
    """Make a hook that does what Lightning's does, and then something else."""

    @wraps(getattr(ShardedCheckpoints, hook))
    def extended(self: ShardedTraining) -> None:
        getattr(super(ShardedTraining, self), hook)()
        getattr(self, action)()

    return extended


class ShardedTraining(ShardedCheckpoints):
    """The part of a strategy that runs the steps, for a model of which some parameters stay whole."""

    _whole: Sequence[nn.Parameter] = ()
    _accumulates = False

    def begin_steps(self, model: nn.Module) -> None:
        """Look for the parameters that are whole, and make them and the buffers equal on all ranks.

        Args:
            model: The sharded model.
        """
        reshard(model)
        self._whole = plain(model.parameters())
        self._accumulates = False
        broadcast_tensors([*self._whole, *plain(model.buffers())], self.root_device)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Run the backward pass, and average the gradients that ``fully_shard`` leaves alone.

        Args:
            closure_loss: The loss.
            optimizer: The optimizer, with automatic optimization.
            *args: Of ``torch.Tensor.backward``.
            **kwargs: Of ``torch.Tensor.backward``.

        Returns:
            The loss without its graph.
        """
        module, precision = given(self.lightning_module), self.precision_plugin
        self.pre_backward(closure_loss)
        closure_loss = precision.pre_backward(closure_loss, module)
        precision.backward(closure_loss, module, optimizer, *args, **kwargs)
        if not self._accumulates:
            trained = [parameter for parameter in self._whole if parameter.requires_grad]
            average_gradients(trained, self.device_mesh["data_parallel"].get_group())
        closure_loss = precision.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        """Postpone the average of the whole gradients while gradients accumulate.

        Sharded ones are reduced after every backward, as keeping them would take the memory of the whole model.
        """
        self._accumulates = True
        try:
            yield
        finally:
            self._accumulates = False

    @override
    def optimizer_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Run forward, backward and the optimizer.

        Args:
            optimizer: The optimizer.
            *args: The closure and the module.
            **kwargs: For the optimizer.
        """
        with groups_by_kind(optimizer) if isinstance(optimizer, Optimizer) else nullcontext():
            return super().optimizer_step(optimizer, *args, **kwargs)

    # evaluations have the buffers of rank 0, as with DDP
    on_validation_start = _and_then("on_validation_start", "share_buffers")
    on_test_start = _and_then("on_test_start", "share_buffers")
    on_predict_start = _and_then("on_predict_start", "share_buffers")
    on_validation_end = _and_then("on_validation_end", "_free_weights")
    on_test_end = _and_then("on_test_end", "_free_weights")
    on_predict_end = _and_then("on_predict_end", "_free_weights")

    def _free_weights(self) -> None:
        """Free the weights that the last forward has left gathered."""
        reshard(given(self.model))
