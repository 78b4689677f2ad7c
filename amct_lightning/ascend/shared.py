"""What the strategies for the Trainer have in common: processes, precision, generators, memory errors, checkpoints."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import wraps
from typing import Any, Literal

import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from amct_lightning.ascend.cluster.environment import AscendClusterEnvironment
from amct_lightning.ascend.devices import npu
from amct_lightning.ascend.hccl.collectives import connected, gather
from amct_lightning.ascend.lightning_private import trainer_of
from amct_lightning.ascend.on_npus import OnNPUs, given
from amct_lightning.ascend.precision import npu_precision
from amct_lightning.ascend.processes.launchers import ProcessLauncher, ScriptLauncher
from amct_lightning.ascend.processes.peers import Peers, connect_peers
from amct_lightning.ascend.tensors import explained_errors, on_cpu

RNG_KEY = "npu_rng_states"

StartMethod = Literal["popen", "spawn", "fork", "forkserver"]


def _explained(name: str) -> Any:
    """Make a method that does what Lightning's does, with errors of torch_npu explained."""

    @wraps(getattr(ParallelStrategy, name))
    def method(self: NPUStrategy, *args: Any, **kwargs: Any) -> Any:
        with explained_errors():
            return getattr(super(NPUStrategy, self), name)(*args, **kwargs)

    return method


class NPUStrategy(OnNPUs, ParallelStrategy):
    """The common part of the strategies for Lightning's Trainer."""

    _start_method: StartMethod = "popen"
    _twin: Callable[[Precision | None], Precision | None] = staticmethod(npu_precision)
    _restored_rng: list[Tensor] | None = None
    _sanity_rng: Tensor | None = None
    _peers: Peers | None = None

    batch_to_device = _explained("batch_to_device")
    training_step = _explained("training_step")
    validation_step = _explained("validation_step")
    test_step = _explained("test_step")
    predict_step = _explained("predict_step")
    optimizer_step = _explained("optimizer_step")
    backward = _explained("backward")

    @property
    @override
    def precision_plugin(self) -> Precision:
        """The precision plugin; one that Lightning made for CUDA is replaced by its twin for NPUs."""
        return self._precision_plugin if self._precision_plugin is not None else Precision()

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        self._precision_plugin = self._twin(precision_plugin)

    @property
    def cluster_environment(self) -> ClusterEnvironment | None:
        """How the processes of the job find each other; from a rank table where a scheduler of Ascend names one."""
        return self._cluster_environment

    @cluster_environment.setter
    def cluster_environment(self, environment: ClusterEnvironment | None) -> None:
        # LightningEnvironment is what the trainer takes where it detects nothing
        if type(environment) is LightningEnvironment and AscendClusterEnvironment.detect():
            environment = AscendClusterEnvironment()
        self._cluster_environment = environment

    @property
    def num_processes(self) -> int:  # type: ignore[override]
        """Number of processes, and of devices, on this node."""
        return len(self.parallel_devices or [])

    @override
    def _configure_launcher(self) -> None:
        """Choose how processes start; called by the trainer. One device needs none, so notebooks work."""
        environment = given(self.cluster_environment)
        if self._start_method != "popen" and self.is_distributed:
            self._launcher = ProcessLauncher(self, start_method=self._start_method)
        elif self.is_distributed or environment.creates_processes_externally:
            self._launcher = ScriptLauncher(environment, self.num_processes, self.num_nodes, self.is_watching)

    def start_process_group(self) -> None:
        """Connect the ranks, which from then on notice the end of another."""
        reset_seed()
        if self._make_process_group():
            rank_zero_info(f"{self.world_size} processes are connected over {dist.get_backend()}.")
        if self.world_size > 1:
            address = given(self.cluster_environment).main_address
            self._peers = connect_peers(self.global_rank, address, self.broadcast)
        atexit.register(_end_process_group)

    def is_watching(self) -> bool:
        """Tell whether this rank notices the end of another: from the start of a run to its end."""
        return self._peers is not None

    @override
    def setup_environment(self) -> None:
        """Open the device and set its options."""
        self._restored_rng = None
        super().setup_environment()
        self._options.apply()

    @override
    def on_validation_start(self) -> None:
        """Keep the state of the NPU's generator: Lightning's sanity check restores those of the CPU and CUDA only."""
        super().on_validation_start()
        if self._in_sanity_check():
            self._sanity_rng = npu().get_rng_state(self.root_device)

    @override
    def on_validation_end(self) -> None:
        """Put the state from before the sanity check back."""
        super().on_validation_end()
        if self._in_sanity_check() and self._sanity_rng is not None:
            npu().set_rng_state(self._sanity_rng, self.root_device)
            self._sanity_rng = None

    @override
    def on_train_start(self) -> None:
        """Continue with the generator of the checkpoint, if there is one."""
        super().on_train_start()
        states, self._restored_rng = self._restored_rng, None
        if states is not None and len(states) == self.world_size:
            npu().set_rng_state(states[self.global_rank].cpu(), self.root_device)
        elif states is not None:
            rank_zero_info(
                f"The checkpoint has the random number generators of {len(states)} NPU(s) ({RNG_KEY}), this run has "
                f"{self.world_size}: they go on from the seed of this run instead."
            )

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Save a checkpoint that loads on machines without torch_npu, with the generators of all NPUs.

        Args:
            checkpoint: State of model and trainer.
            filepath: Where to.
            storage_options: For the checkpoint plugin.
        """
        if "optimizer_states" in checkpoint:  # not with save_weights_only
            checkpoint = {**checkpoint, RNG_KEY: self._all_generator_states()}
        checkpoint = on_cpu(checkpoint)  # waits for the device, and so perhaps for a rank that is gone
        with self._while_saving():
            super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint; the generator's state waits for the start of the training.

        Args:
            checkpoint_path: Where from.
            weights_only: Whether to refuse pickled objects.

        Returns:
            The checkpoint.
        """
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        self._restored_rng = checkpoint.get(RNG_KEY) if isinstance(checkpoint, Mapping) else None
        return checkpoint

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Tell the other ranks; say which of them is the reason, if one is.

        Args:
            exception: What ended the run.
        """
        super().on_exception(exception)
        peers, self._peers = self._peers, None
        if peers is not None:
            peers.fail(exception)

    @override
    def teardown(self) -> None:
        """Say goodbye to the other ranks, and move everything to the CPU."""
        peers, self._peers = self._peers, None
        if peers is not None:
            peers.leave()
        super().teardown()

    def _while_saving(self) -> AbstractContextManager[Any]:
        """Let a checkpoint that is being written be finished when another rank is lost."""
        return nullcontext() if self._peers is None else self._peers.lost.saving

    def _in_sanity_check(self) -> bool:
        trainer = trainer_of(self.lightning_module)
        return trainer is not None and trainer.sanity_checking

    def _all_generator_states(self) -> list[Tensor]:
        mine: Tensor = npu().get_rng_state(self.root_device)
        if not connected():
            return [mine]
        return list(gather(mine.to(self.root_device)).cpu().unbind())


def _end_process_group() -> None:
    """Leave the process group, if there is one; for the end of the process, where nothing can be reported."""
    if connected():
        with suppress(RuntimeError):
            dist.destroy_process_group()
