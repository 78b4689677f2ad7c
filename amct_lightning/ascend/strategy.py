"""Data-parallel training on Ascend NPUs, on one device or many."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.overrides.distributed import prepare_for_backward
from lightning.pytorch.plugins import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from amct_lightning.ascend.hccl.collectives import accepted_hook
from amct_lightning.ascend.hccl.settings import HCCLSettings, NPUOptions
from amct_lightning.ascend.lightning_private import (
    DDPForwardRedirection,
    flush_static_graph,
    sync_module_states,
    trainer_of,
)
from amct_lightning.ascend.on_npus import given
from amct_lightning.ascend.shared import NPUStrategy, StartMethod


class AscendStrategy(NPUStrategy):
    """Trains on one Ascend NPU or, with a copy of the model on each, on many: ``strategy="ascend"``.

    One device is used directly: no process group, no wrapper, no distributed sampler. With more, every device has
    its process and gradients are averaged over HCCL (``DistributedDataParallel``). Processes are started by
    Lightning, by torchrun, by SLURM, or by a scheduler that writes a rank table.

    A rank that dies or fails ends the others within seconds, with an error that names it; files that are being written
    are finished. Start the job again with ``ckpt_path="last"``.

    Checkpoints hold CPU tensors and load where torch_npu is missing. They also hold the state of each NPU's random
    generator (key ``npu_rng_states``), which a run with as many devices continues with.

    Args:
        accelerator: Set by the trainer.
        parallel_devices: Set by the trainer.
        cluster_environment: How processes find each other, if the trainer should not detect it.
        checkpoint_io: How checkpoints are written.
        precision_plugin: An ``NPUPrecision``; chosen by ``Trainer(precision=...)`` if not given.
        start_method: How further processes on this node start: ``"popen"`` runs the script again, ``"spawn"`` starts
            workers from this process, ``"fork"`` and ``"forkserver"`` only as long as this process has not used an NPU.
        timeout: How long a process may wait for the others before an operation counts as failed.
        process_group_backend: ``"hccl"``; others are for tests.
        ddp_comm_state: State of the communication hook.
        ddp_comm_hook: How gradients are exchanged, e.g. ``fp16_compress_hook`` or ``bf16_compress_hook`` of
            ``torch.distributed.algorithms.ddp_comm_hooks.default_hooks``.
        ddp_comm_wrapper: A hook around the hook, e.g. ``fp16_compress_wrapper``.
        hccl_connect_timeout: Seconds that ranks wait for each other at the start.
        hccl_exec_timeout: Seconds a collective waits for the other ranks.
        hccl_buffer_size: MB of device memory for the buffer between two devices.
        hccl_deterministic: Whether sums are added in a fixed order; ``"strict"`` also across servers.
        hf32_matmul: Whether float32 matrix products may use HF32.
        hf32_conv: Whether float32 convolutions may use HF32.
        allow_internal_format: Whether tensors may be kept in the device's own memory formats.
        **ddp_kwargs: Further arguments of ``DistributedDataParallel``, such as ``find_unused_parameters=True``.

    Raises:
        MisconfigurationException: If a setting is not valid, or the trainer's accelerator is not an NPU.

    Example:
        >>> strategy = AscendStrategy(hccl_connect_timeout=600, find_unused_parameters=True)
        >>> strategy.num_processes
        0

        With Lightning: ``Trainer(accelerator="npu", devices=8, strategy="ascend")``, or in YAML::

            trainer:
              accelerator: npu
              devices: 8
              strategy:
                class_path: amct_lightning.AscendStrategy
                init_args: {hccl_connect_timeout: 600}
    """

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        start_method: StartMethod = "popen",
        timeout: timedelta | None = None,
        process_group_backend: str = "hccl",
        ddp_comm_state: object | None = None,
        ddp_comm_hook: Callable[..., Any] | None = None,
        ddp_comm_wrapper: Callable[..., Any] | None = None,
        hccl_connect_timeout: int | None = None,
        hccl_exec_timeout: int | None = None,
        hccl_buffer_size: int | None = None,
        hccl_deterministic: bool | Literal["strict"] | None = None,
        hf32_matmul: bool | None = None,
        hf32_conv: bool | None = None,
        allow_internal_format: bool | None = None,
        **ddp_kwargs: Any,
    ) -> None:
        self._hccl = HCCLSettings(hccl_connect_timeout, hccl_exec_timeout, hccl_buffer_size, hccl_deterministic)
        self._options = NPUOptions(hf32_matmul, hf32_conv, allow_internal_format)
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self.num_nodes = 1
        self._forward_redirection = DDPForwardRedirection()
        self._start_method = start_method
        self._process_group_backend, self._timeout = process_group_backend, timeout
        self._hook = _combined_hook(ddp_comm_state, ddp_comm_hook, ddp_comm_wrapper)
        self._hook_state = ddp_comm_state
        self._ddp_kwargs = ddp_kwargs
        self._static_graph_flushed = False

    @property
    @override
    def root_device(self) -> torch.device:  # type: ignore[override]
        """The device of this process."""
        assert self.parallel_devices
        return self.parallel_devices[self.local_rank]

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """How the data is split."""
        return {"num_replicas": self.num_nodes * self.num_processes, "rank": self.global_rank}

    def set_world_ranks(self) -> None:
        """Tell the cluster environment the ranks; called by the trainer."""
        if self.cluster_environment is None:
            return
        self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    @override
    def setup_environment(self) -> None:
        """Open the device and connect to the other ranks."""
        super().setup_environment()
        if self.is_distributed:
            self.set_world_ranks()
            self.start_process_group()

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        """Prepare model and optimizers; called by the trainer.

        Args:
            trainer: The trainer.
        """
        if self.is_distributed and self._layer_sync and trainer.state.fn == TrainerFn.FITTING:
            self.model = self._layer_sync.apply(given(self.model))
        self._static_graph_flushed = False
        super().setup(trainer)

    @override
    def model_to_device(self) -> None:
        """Move the model to the device of this process."""
        given(self.model).to(self.root_device)

    @override
    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Wrap the model for training on many devices; for evaluation, only make the copies equal."""
        if not self.is_distributed:
            return model
        if given(self.lightning_module).trainer.state.fn != TrainerFn.FITTING:
            sync_module_states(model)
            return model
        # In the stream of the steps. Lightning takes another one, which only the capture of CUDA graphs needs; autograd
        # would then wait for one stream in the other at every gradient.
        wrapped = DistributedDataParallel(model, device_ids=[self.root_device.index], **self._ddp_kwargs)
        if self._hook is not None:
            wrapped.register_comm_hook(self._hook_state, self._hook)
        return wrapped

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        """Announce a backward pass of manual optimization to DDP.

        Args:
            closure_loss: The loss.
        """
        if isinstance(self.model, DistributedDataParallel) and self._is_manual():
            prepare_for_backward(self.model, closure_loss)

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        """Start the first reduction of a static graph under manual optimization.

        Args:
            closure_loss: The loss.
        """
        model = self.model
        if isinstance(model, DistributedDataParallel) and self._is_manual() and model.static_graph:
            if not self._static_graph_flushed:
                flush_static_graph(model)
            self._static_graph_flushed = True

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Tell the other ranks; say what to do about DDP's error on unused parameters.

        Args:
            exception: What ended the run.
        """
        super().on_exception(exception)
        if exception.args and "Expected to have finished reduction in the prior iteration" in str(exception.args[0]):
            exception.args = (
                f"{exception.args[0]}\nThe loss does not depend on some parameters. If that is intended, write "
                f"strategy=AscendStrategy(find_unused_parameters=True).",
                *exception.args[1:],
            )

    @override
    def teardown(self) -> None:
        """Unwrap the model and move everything to the CPU."""
        module = self.lightning_module
        if isinstance(self.model, DistributedDataParallel):
            self.model = module
        trainer = trainer_of(module)
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING and self.is_distributed and self._layer_sync:
            self.model = self._layer_sync.revert(given(self.model))
        super().teardown()

    def _is_manual(self) -> bool:
        return not given(self.lightning_module).automatic_optimization


def _combined_hook(
    state: object | None, hook: Callable[..., Any] | None, wrapper: Callable[..., Any] | None
) -> Callable[..., Any] | None:
    if type(state).__name__ == "PostLocalSGDState":
        raise MisconfigurationException(
            "ddp_comm_state=PostLocalSGDState(...) needs an averaging of the models that AscendStrategy does not do: "
            "the copies would drift apart. Use another communication hook, or none."
        )
    if hook is None:
        if wrapper is not None:
            raise MisconfigurationException("ddp_comm_wrapper is given without the ddp_comm_hook that it wraps.")
        return None
    return accepted_hook(hook if wrapper is None else wrapper(hook))
