"""Training of sharded models on Ascend NPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from typing_extensions import override

from amct_lightning.ascend.fsdp.precision import sharded_precision
from amct_lightning.ascend.fsdp.training import ShardedTraining
from amct_lightning.ascend.fsdp.units import Units, is_sharded, shard, without_whole_modules
from amct_lightning.ascend.hccl.collectives import broadcast_tensors
from amct_lightning.ascend.hccl.settings import HCCLSettings, NPUOptions
from amct_lightning.ascend.lightning_private import materialize
from amct_lightning.ascend.on_npus import given
from amct_lightning.ascend.shared import NPUStrategy


class AscendFSDPStrategy(NPUStrategy, ShardedTraining):
    """Trains on Ascend NPUs with weights, gradients and optimizer state divided among them: ``"ascend_fsdp"``.

    It is torch's ``fully_shard`` (FSDP2), for models that are too large for a copy on every NPU. Losses, factors and
    record are those of ``strategy="ascend"``, up to the order in which sums are added.

    **What is sharded.** A LightningModule that defines ``configure_model`` and calls ``fully_shard`` there, with
    ``self.device_mesh["data_parallel"]``, decides itself, as with Lightning's ``ModelParallelStrategy``. Any other is
    sharded after the callbacks' ``setup`` has converted it: every attribute that is a module with a forward of its
    own, and inside of it every part that ``units`` names. The parts must be used by calling them, not through other
    methods or by reading their weights. What has no such owner stays whole on every NPU and is trained as with DDP.

    **Quantized layers.** Clips and learned scales stay whole: they are small, and needed outside of the forward. Their
    gradients are averaged with one collective per step. Record and monitor gather one weight after the other. Layers
    may be made in ``__init__`` or in ``configure_model``. The latter are converted after they were sharded:
    ``configure_model`` has to be idempotent then, and may not call ``fully_shard`` on a quantized layer itself.

    **Checkpoints** are folders with a shard per NPU, as Lightning's; any number of NPUs goes on from them. With
    ``save_distributed_checkpoint=False`` they are files like those of ``strategy="ascend"``, which load anywhere and
    from which both strategies go on. Make a file of a folder with
    ``python -m lightning.pytorch.utilities.consolidate_checkpoint FOLDER``, which runs what is pickled in it: do so
    with folders that you trust. The strategy itself reads a folder without running anything from it.

    Precision ``"16-mixed"`` needs the strategy by its name, or ``plugins=[NPUPrecision("16-mixed")]``: beside an object
    of this class Lightning refuses it.

    Args:
        units: Class names of the parts that gather their weights together, e.g. ``["TransformerEncoderLayer"]``, or a
            function of name and module. None takes parts of ``min_num_params``.
        min_num_params: How many parameters make a unit, with ``units=None``.
        reshard_after_forward: Whether weights are freed between forward and backward. None does so but for the
            outermost units.
        data_parallel_size: Number of ranks to shard over; ``"auto"`` takes all that tensor parallelism leaves.
        tensor_parallel_size: Number of ranks for tensor parallelism, which ``configure_model`` has to set up.
        save_distributed_checkpoint: Whether checkpoints are folders.
        parallel_devices: Set by the trainer.
        cluster_environment: How processes find each other, if the trainer should not detect it.
        checkpoint_io: How checkpoint files are written.
        precision_plugin: An ``NPUPrecision``; chosen by ``Trainer(precision=...)`` if not given.
        accelerator: Set by the trainer.
        timeout: How long a process may wait for the others before an operation counts as failed.
        process_group_backend: ``"hccl"``; others are for tests.
        hccl_connect_timeout: Seconds that ranks wait for each other at the start.
        hccl_exec_timeout: Seconds a collective waits for the other ranks.
        hccl_buffer_size: MB of device memory for the buffer between two devices.
        hccl_deterministic: Whether sums are added in a fixed order; ``"strict"`` also across servers.
        hf32_matmul: Whether float32 matrix products may use HF32.
        hf32_conv: Whether float32 convolutions may use HF32.
        allow_internal_format: Whether tensors may be kept in the device's own memory formats.

    Raises:
        MisconfigurationException: If a setting is not valid, or the trainer's accelerator is not an NPU.

    Example:
        >>> AscendFSDPStrategy(units=["TransformerEncoderLayer"], hccl_connect_timeout=600).num_processes
        0

        With Lightning: ``Trainer(accelerator="npu", devices=8, strategy="ascend_fsdp")``, or in YAML::

            trainer:
              accelerator: npu
              devices: 8
              strategy:
                class_path: amct_lightning.AscendFSDPStrategy
                init_args: {units: [TransformerEncoderLayer]}
    """

    shards_in_configure_model = True
    """Tells callbacks that change layers to do so before ``configure_model``, if there are layers by then."""

    _registered = ("ascend_fsdp", "A model divided among Ascend NPUs (FSDP2) over HCCL")
    _twin = staticmethod(sharded_precision)

    def __init__(
        self,
        units: list[str] | Any = None,
        min_num_params: int = 1_000_000,
        reshard_after_forward: bool | None = None,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = True,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        timeout: timedelta | None = None,
        process_group_backend: str = "hccl",
        hccl_connect_timeout: int | None = None,
        hccl_exec_timeout: int | None = None,
        hccl_buffer_size: int | None = None,
        hccl_deterministic: bool | Literal["strict"] | None = None,
        hf32_matmul: bool | None = None,
        hf32_conv: bool | None = None,
        allow_internal_format: bool | None = None,
    ) -> None:
        _check(units, min_num_params)
        self._hccl = HCCLSettings(hccl_connect_timeout, hccl_exec_timeout, hccl_buffer_size, hccl_deterministic)
        self._options = NPUOptions(hf32_matmul, hf32_conv, allow_internal_format)
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.accelerator = accelerator
        self.parallel_devices = parallel_devices
        self.cluster_environment = cluster_environment
        self.checkpoint_io = checkpoint_io
        self._precision_plugin = precision_plugin and sharded_precision(precision_plugin)
        self._units: Units = units
        self._min_num_params = min_num_params
        self._reshard = reshard_after_forward

    @override
    def _setup_distributed(self) -> None:
        """Connect to the other ranks; called by Lightning's part of ``setup_environment``.

        Lightning would bind the process group to the device, and HCCL's groups cannot be split then.
        """
        self.set_world_ranks()
        self._data_parallel_size, self._tensor_parallel_size = self._sizes()
        self.start_process_group()

    @contextmanager
    @override
    def model_sharded_context(self) -> Iterator[None]:
        """Surround ``configure_model``, which shards a model with layers that may be quantized already."""
        model = self.model
        if model is None or is_sharded(model):
            with super().model_sharded_context():
                yield
            return
        self._synchronize_norms()
        with without_whole_modules(model), super().model_sharded_context():
            yield

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        """Shard the model, if it is not yet, and make the optimizers; called by the trainer.

        Args:
            trainer: The trainer.
        """
        assert self.accelerator is not None
        _refuse_copies_of_the_model(trainer)
        model = given(self.model)
        self.accelerator.setup(trainer)
        if not is_sharded(model):
            self._shard(model)
        materialize(model, self.root_device)
        self.model = self.precision_plugin.convert_module(model)
        self.model_to_device()
        self.begin_steps(model)
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _sizes(self) -> tuple[int, int]:
        world, tensors = self.num_nodes * self.num_processes, self._tensor_parallel_size
        assert isinstance(tensors, int)
        data = world // tensors if self._data_parallel_size == "auto" else self._data_parallel_size
        if data * tensors != world:
            raise MisconfigurationException(
                f"data_parallel_size={data} times tensor_parallel_size={tensors} is not {world}, the number of NPUs "
                f"(devices={self.num_processes}, num_nodes={self.num_nodes}). Let data_parallel_size be 'auto', and "
                f"tensor_parallel_size divide the number of NPUs."
            )
        return int(data), tensors

    def _shard(self, model: nn.Module) -> None:
        if self._tensor_parallel_size != 1:
            raise MisconfigurationException(
                f"tensor_parallel_size={self._tensor_parallel_size}, but {type(self.lightning_module).__name__} does "
                f"nothing about it. Call parallelize_module in its configure_model, or leave tensor_parallel_size out."
            )
        self._synchronize_norms()
        broadcast_tensors([*model.parameters(), *model.buffers()], self.root_device)  # every rank keeps its own part
        mesh = self.device_mesh["data_parallel"]
        shard(model, mesh, self._units, self._min_num_params, self._reshard)
        if not is_sharded(model):
            raise MisconfigurationException(
                f"There is nothing to shard in {type(model).__name__}: none of its attributes is a module with "
                f"parameters and a forward. Use strategy='ascend', or call fully_shard in configure_model."
            )

    def _synchronize_norms(self) -> None:
        trainer = given(self.lightning_module).trainer
        if self._layer_sync and trainer.state.fn == TrainerFn.FITTING:
            self.model = self._layer_sync.apply(given(self.model))

    @override
    def _while_saving(self) -> AbstractContextManager[Any]:
        """Wait for nobody when a rank is lost: all ranks save together, and what is not complete replaces nothing."""
        return nullcontext()


def _refuse_copies_of_the_model(trainer: pl.Trainer) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        # by name: Lightning before 2.6 has no WeightAveraging
        if {kind.__name__ for kind in type(callback).__mro__} & {"WeightAveraging", "StochasticWeightAveraging"}:
            raise MisconfigurationException(
                f"{type(callback).__name__} keeps a copy of the whole model, which a sharded one has nowhere. Leave it "
                f"out, or use strategy='ascend'."
            )


def _check(units: Any, min_num_params: int) -> None:
    is_list = isinstance(units, (list, tuple)) and all(isinstance(name, str) for name in units)
    if not (units is None or callable(units) or is_list):
        raise MisconfigurationException(
            f"units={units!r} is not valid: give a list of class names, e.g. ['TransformerEncoderLayer'], a function "
            f"of a module's name and the module, or None."
        )
    if type(min_num_params) is not int or min_num_params < 1:
        raise MisconfigurationException(f"min_num_params={min_num_params!r} is not valid: give a number, at least 1.")
