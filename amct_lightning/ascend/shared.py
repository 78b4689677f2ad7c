"""What all strategies of this room share: device, precision, reductions, generators, memory errors, checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from amct_lightning.ascend.accelerator import NPUAccelerator
from amct_lightning.ascend.cluster.environment import AscendClusterEnvironment
from amct_lightning.ascend.collectives import ReduceName, gather, reduce_tensor
from amct_lightning.ascend.hccl import HCCLSettings
from amct_lightning.ascend.options import NPUOptions
from amct_lightning.ascend.precision import npu_precision
from amct_lightning.ascend.processes.peers import Peers, connect_peers
from amct_lightning.ascend.tensors import explained_errors, generator_state, on_cpu, resume_rng, set_generator_state

RNG_KEY = "npu_rng_states"


class NPUStrategy(ParallelStrategy):
    """The common part, to be put before a strategy of Lightning in the list of bases.

    A class made from it sets ``_hccl`` and ``_options`` before it calls ``super().__init__``.
    """

    _hccl: HCCLSettings
    _options: NPUOptions
    _restored_rng: list[Tensor] | None = None
    _sanity_rng: Tensor | None = None
    _peers: Peers | None = None

    @property
    @override
    def accelerator(self) -> Accelerator | None:
        """The accelerator: an :class:`NPUAccelerator`."""
        return self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator | None) -> None:
        if accelerator is not None and not isinstance(accelerator, NPUAccelerator):
            raise MisconfigurationException(
                f"{type(self).__name__} trains on NPUs, but the accelerator is {type(accelerator).__name__} "
                f"(accelerator='auto' never chooses the NPU). Write Trainer(accelerator='npu', ...), or leave out the "
                f"strategy to train on another device."
            )
        self._accelerator = accelerator

    @property
    @override
    def precision_plugin(self) -> Precision:
        """The precision plugin; one that Lightning made for CUDA is replaced by its twin for NPUs."""
        return self._precision_plugin if self._precision_plugin is not None else Precision()

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        self._precision_plugin = npu_precision(precision_plugin)

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

    def start_process_group(self, **kwargs: Any) -> None:
        """Connect the ranks over HCCL.

        No ``device_id`` is given: with one, torch expects a backend that can split groups, and HCCL cannot.

        Args:
            **kwargs: Arguments of ``torch.distributed.init_process_group``.
        """
        reset_seed()
        self._hccl.apply()
        environment = self.cluster_environment
        assert environment is not None
        if not dist.is_initialized():
            os.environ["MASTER_ADDR"] = environment.main_address
            os.environ["MASTER_PORT"] = str(environment.main_port)
            dist.init_process_group(rank=self.global_rank, world_size=self.world_size, **kwargs)
            rank_zero_info(f"{self.world_size} processes are connected over {dist.get_backend()}.")
        if self.world_size > 1:
            self._peers = connect_peers(self.global_rank, environment.main_address, self.broadcast)

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
    def reduce(
        self, tensor: Tensor | Any, group: dist.ProcessGroup | None = None, reduce_op: ReduceName = "mean"
    ) -> Tensor | Any:
        """Reduce a tensor over all ranks, whatever its dtype.

        Args:
            tensor: The tensor; anything else is given back as it is.
            group: The ranks; all of them if None.
            reduce_op: ``"mean"``, ``"sum"``, ``"max"``, ``"min"``, ``"product"`` or a ``ReduceOp``.

        Returns:
            The reduced tensor; the mean of integers is a float.
        """
        if not isinstance(tensor, Tensor) or not _connected():
            return tensor
        home = tensor.device
        return reduce_tensor(tensor.to(self.root_device), group, reduce_op).to(home)

    @override
    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks.

        Args:
            name: Not used.
        """
        if _connected():
            dist.barrier(device_ids=[self.root_device.index])

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Send an object to all ranks.

        Args:
            obj: The object, of interest on rank ``src`` only.
            src: The rank that sends.

        Returns:
            The object of rank ``src``.
        """
        if not _connected():
            return obj
        parcel = [obj]
        dist.broadcast_object_list(parcel, src, device=self.root_device)
        return parcel[0]

    @override
    def on_validation_start(self) -> None:
        """Keep the state of the NPU's generator: Lightning's sanity check restores those of the CPU and CUDA only."""
        super().on_validation_start()
        if self._in_sanity_check():
            self._sanity_rng = generator_state(self.root_device)

    @override
    def on_validation_end(self) -> None:
        """Put the state from before the sanity check back."""
        super().on_validation_end()
        if self._in_sanity_check() and self._sanity_rng is not None:
            set_generator_state(self.root_device, self._sanity_rng)
            self._sanity_rng = None

    @override
    def on_train_start(self) -> None:
        """Continue with the generator of the checkpoint, if there is one."""
        super().on_train_start()
        states, self._restored_rng = self._restored_rng, None
        if states is not None:
            resume_rng(self.root_device, states, self.global_rank, self.world_size)

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
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move a batch to the NPU."""
        with explained_errors():
            return super().batch_to_device(batch, device, dataloader_idx)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the training step."""
        with explained_errors():
            return super().training_step(*args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the validation step."""
        with explained_errors():
            return super().validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the test step."""
        with explained_errors():
            return super().test_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the predict step."""
        with explained_errors():
            return super().predict_step(*args, **kwargs)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run forward, backward and the optimizer."""
        with explained_errors():
            return super().optimizer_step(*args, **kwargs)

    @override
    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the backward pass."""
        with explained_errors():
            return super().backward(*args, **kwargs)

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
        module = self.lightning_module
        return module is not None and module._trainer is not None and module.trainer.sanity_checking

    def _all_generator_states(self) -> list[Tensor]:
        mine = generator_state(self.root_device)
        if not _connected():
            return [mine]
        return list(gather(mine.to(self.root_device)).cpu().unbind())


def end_process_group() -> None:
    """Leave the process group, if there is one; for the end of the process, where nothing can be reported."""
    if _connected():
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _connected() -> bool:
    return dist.is_available() and dist.is_initialized()
