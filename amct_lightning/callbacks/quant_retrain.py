"""The callback that adds quantization-aware training to any Trainer."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from amct_lightning.callbacks.checkpoints.io import copy_records_of_links
from amct_lightning.callbacks.checkpoints.side import CheckpointSide
from amct_lightning.callbacks.checkpoints.state import record_text
from amct_lightning.callbacks.checks import (
    check_arguments,
    check_neighbours,
    check_unchanged,
    find_submodule,
    refuse_config_as_record,
    warn_left_out,
    warn_spawned,
    warn_unfinished,
    with_batches,
)
from amct_lightning.callbacks.inputs import BatchToInput, calls_forward, find_input
from amct_lightning.callbacks.modes import expect_float, start_shift_search
from amct_lightning.callbacks.param_groups import ClipGroups
from amct_lightning.callbacks.schedule.schedule import QuantSchedule
from amct_lightning.callbacks.sharding import (
    build_layers,
    check_complete,
    check_tensor_parallel,
    present_record,
    reshard,
)
from amct_lightning.callbacks.training import Training, epochs_of, show_schedule
from amct_lightning.config import QuantChoices, RetrainConfig, config_source, load_config
from amct_lightning.conversion.convert import convert_layers
from amct_lightning.conversion.plan import find_plan, make_plan
from amct_lightning.conversion.report import conversion_report
from amct_lightning.files import check_writable
from amct_lightning.graph.trace import InputData
from amct_lightning.modules import learned_factors, quantized_layers
from amct_lightning.modules.convert import leave_out_of_broadcast
from amct_lightning.modules.folding import is_sharded
from amct_lightning.modules.shift_hook import synchronize_shift_search


class QuantRetrainCallback(CheckpointSide):
    """Quantization-aware training of a LightningModule; nothing in the module changes.

    In ``setup``, for every stage, the layers named by ``config`` are converted in place (once; a second ``fit`` or
    a ``test`` after it goes on with the same layers). The first ``batch_num`` training batches calibrate the
    activation ranges; after that they are learned along with the weights. Whenever a checkpoint is saved, the
    record is written to ``record_file`` and, as ``<name>.record.txt``, beside ``<name>.ckpt``; once more when
    training ends, unless it was a ``fast_dev_run``. A checkpoint holds the configuration, the calibration state and
    the record, so resuming and testing from it needs no config file and continues to the bit.

    Args:
        config: What to quantize: the path of a JSON configuration, of AMCT's simple configuration (``.cfg``) or of a
            YAML file with choices, the content of a JSON or YAML one as a dict, or an object
            (:class:`RetrainConfig`, :class:`QuantChoices`). ``None`` quantizes every layer that can be, with AMCT's
            defaults.
        record_file: The file for the quantization factors; ``None`` means ``record.txt`` in the Trainer's
            ``default_root_dir``.
        input_data: Input for the converted module that shows its data flow: a tensor, a tuple of positional or a
            mapping of keyword arguments. ``None`` takes ``example_input_array`` or the first batch of the
            dataloader.
        submodule: Dotted name of the part of the LightningModule to convert, e.g. ``"net.backbone"``; layer names
            in the config and the record are relative to it. ``None`` converts all of it.
        batch_to_input: Turns a batch into the arguments of ``forward``, for batches that are neither a tensor, nor
            ``(x, ...)``, nor a mapping with the names of its parameters.
        quant_lr_scale: Factor of the learning rate for the learned clips.
        quant_weight_decay: Weight decay of the learned clips; ``None`` leaves it as in the optimizer.
        on_nonfinite: What to do when a quantizer's input was NaN or infinite in training. It is detected on the
            device and reported, with layer and step, every ``log_every_n_steps`` batches: ``"warn"`` or ``"raise"``.
        allow_reuse: Also quantize layers that are called several times in one forward.
        search_n: Search the shifts of the int32 sums in evaluation passes; see :func:`amct_lightning.prepare_qat`.
        schedule: When to start, calibrate, update and freeze: a :class:`QuantSchedule`, or its fields as a mapping.
            ``None`` calibrates on the first batches and learns all factors until the end. The phase is logged as
            ``quant_phase`` (0 float, 1 calibrating, 2 learning, 3 frozen) and shown in the progress bar.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a value that is not allowed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from amct_lightning import QuantRecord, QuantRetrainCallback
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> callback = QuantRetrainCallback(record_file=folder + "/record.txt")
        >>> trainer = Trainer(
        ...     callbacks=[callback], max_steps=2, accelerator="cpu", logger=False, default_root_dir=folder,
        ...     enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel())
        >>> list(QuantRecord.load(folder + "/record.txt"))
        ['layer']
    """

    def __init__(
        self,
        config: dict[str, Any] | str | Path | RetrainConfig | QuantChoices | None = None,
        record_file: str | Path | None = None,
        input_data: Any = None,
        submodule: str | None = None,
        batch_to_input: BatchToInput | None = None,
        quant_lr_scale: float = 1.0,
        quant_weight_decay: float | None = 0.0,
        on_nonfinite: Literal["warn", "raise"] = "warn",
        allow_reuse: bool = False,
        search_n: bool = False,
        schedule: dict[str, Any] | QuantSchedule | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.record_file = record_file
        self.input_data = input_data
        self.submodule = submodule
        self.batch_to_input = batch_to_input
        self.quant_lr_scale = quant_lr_scale
        self.quant_weight_decay = quant_weight_decay
        self.on_nonfinite = on_nonfinite
        self.allow_reuse = allow_reuse
        self.search_n = search_n
        self.schedule = schedule if schedule is None else QuantSchedule.of(schedule)
        check_arguments(self)
        self._has_trained = False
        self._modules: list[nn.Module] = []
        self._max_epochs: int | None = None
        self._groups: ClipGroups | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Convert the model, before its weights are restored, moved or wrapped and optimizers are made."""
        check_neighbours(trainer.callbacks, self)  # type: ignore[attr-defined]
        is_to_be_configured = build_layers(trainer, pl_module)
        self._model = find_submodule(pl_module, self.submodule)
        self._record_path = Path(self.record_file or Path(trainer.default_root_dir, "record.txt"))
        self._missing_config = None
        if trainer.is_global_zero:
            check_writable(self._record_path, "record file")
            refuse_config_as_record(self._record_path, self.config)
        if find_plan(self._model) is None:
            self._convert(trainer, pl_module, self._model)
        else:
            self._keep(self._model)
        leave_out_of_broadcast(pl_module)  # the module that DDP wraps
        self._modules = list(pl_module.modules()) if is_to_be_configured else []
        self._is_fitting = stage == "fit"
        # The sanity check and the model summary run the layers before any batch could calibrate them.
        expect_float(self._model, self._is_fitting)
        warn_spawned(trainer)
        self._wrap_checkpoint_io(trainer)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the clips their own treatment in the optimizers, before their states are restored."""
        check_complete(pl_module, self._modules)
        check_tensor_parallel(quantized_layers(self._converted()))
        self._max_epochs = epochs_of(trainer)  # before StochasticWeightAveraging adds one
        show_schedule(trainer, self._converted(), self.schedule)
        self._groups = ClipGroups(self._converted(), self.quant_lr_scale, self.quant_weight_decay)
        self._groups.begin(trainer.optimizers, trainer.lr_scheduler_configs)
        warn_left_out(trainer.optimizers, learned_factors(self._converted()))

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to evaluate a model that could not be converted; start the search of the shifts anew."""
        start_shift_search(self._converted(), enabled=not trainer.sanity_checking)
        if self._training is not None:
            self._training.settle_averages()  # they are evaluated in place of the model

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add up what the processes have found for the shifts; outside of a training, write it down."""
        self._finish_shift_search(trainer)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to evaluate a model that could not be converted; start the search of the shifts anew."""
        start_shift_search(self._converted(), enabled=True)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add up what the processes have found for the shifts; outside of a training, write it down."""
        self._finish_shift_search(trainer)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to evaluate a model that could not be converted."""
        start_shift_search(self._converted(), enabled=False)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with the schedule, and to watch for NaN and infinite activations."""
        expect_float(self._converted(), False)
        schedule = self.schedule or QuantSchedule()
        self._restore_observed()
        model, max_epochs = self._converted(), self._max_epochs
        self._training = Training(trainer, model, schedule, max_epochs, self._calibration, self.on_nonfinite)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Bring the layers into the phase that the schedule wants."""
        if self._training is not None and self._groups is not None:
            self._groups.follow(trainer.optimizers)
            self._training.start_batch(trainer, pl_module, batch_idx)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the optimizer off frozen factors."""
        if self._training is not None:
            self._training.before_step(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the processes agree on fresh calibrations, once; report non-finite activations at the interval."""
        if self._training is not None:
            self._training.end_batch(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look a last time for NaN and infinite activations."""
        if self._training is not None:
            self._training.end()
        self._training = None
        self._has_trained = not trainer.fast_dev_run  # type: ignore[attr-defined]

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the record of the final state, which other callbacks may have averaged; all ranks wait for it."""
        text = present_record(trainer, self._converted()) if self._has_trained else None
        if self._has_trained and trainer.is_global_zero:
            self.record_saved(text)
            warn_unfinished(self._converted(), self._calibration.steps, self._record_path)
        copy_records_of_links(trainer.checkpoint_callbacks)
        self._has_trained = False
        trainer.strategy.barrier("QuantRetrainCallback.on_fit_end")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the record of the last good state: the present one, or the last written if that is unusable."""
        # With sharded weights all ranks would have to take part, and one of them may be what failed.
        if self._training is not None and trainer.is_global_zero and not is_sharded(self._converted()):
            with suppress(RuntimeError, OSError):  # a device or disk that failed must not hide the exception itself
                self.record_saved(record_text(self._converted()))
        if self._training is not None:
            self._training.close()
        self._training = None

    def _convert(self, trainer: pl.Trainer, pl_module: pl.LightningModule, model: nn.Module) -> None:
        try:
            config, source = load_config(self.config), config_source(self.config)
        except FileNotFoundError as error:
            self._missing_config = error  # a checkpoint that is about to be loaded may bring its own
            return
        run, input_data = self._run_and_input(trainer, pl_module, model)
        plan = make_plan(model, config, input_data, run, source, self.allow_reuse, self.search_n)
        reshard(pl_module)
        plan = with_batches(plan, self.schedule)
        convert_layers(model, plan)
        report = conversion_report(model)
        rank_zero_info(f"QuantRetrainCallback: the record goes to '{self._record_path}'. {report}")

    def _keep(self, model: nn.Module) -> None:
        """Go on with a model that is converted already, unless it is to be quantized differently now."""
        with suppress(FileNotFoundError):
            check_unchanged(model, self.config, config_source(self.config), self.schedule)
        rank_zero_info(f"QuantRetrainCallback: going on with {len(quantized_layers(model))} quantized layers.")

    def _run_and_input(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, model: nn.Module
    ) -> tuple[nn.Module, InputData]:
        if self.input_data is not None:
            return model, self.input_data
        run = pl_module if calls_forward(pl_module) else model
        return run, find_input(trainer, pl_module, self.batch_to_input)

    def _finish_shift_search(self, trainer: pl.Trainer) -> None:
        if trainer.sanity_checking:
            return
        synchronize_shift_search(self._converted())
        if self.search_n and not self._is_fitting:
            self.record_saved(present_record(trainer, self._converted()))
