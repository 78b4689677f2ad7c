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

from amct_lightning.callbacks.calibration_count import CalibrationCount
from amct_lightning.callbacks.checkpoints.float_weights import begin_in_float
from amct_lightning.callbacks.checkpoints.io import RecordCheckpointIO
from amct_lightning.callbacks.checkpoints.records import RecordFile, record_text
from amct_lightning.callbacks.checkpoints.state import QuantState
from amct_lightning.callbacks.checks import (
    check_arguments,
    check_neighbours,
    explain_matrices_only,
    find_submodule,
    warn_spawned,
)
from amct_lightning.callbacks.converting.conversion import Conversion, rules_for
from amct_lightning.callbacks.converting.inputs import BatchToInput
from amct_lightning.callbacks.converting.module_setup import set_up_now
from amct_lightning.callbacks.converting.watch import ModuleWatch
from amct_lightning.callbacks.distill.distillation import Distillation, with_fixed_norms
from amct_lightning.callbacks.distill.settings import Distill
from amct_lightning.callbacks.evaluating import EvaluationHooks
from amct_lightning.callbacks.exporting.at_end import export_at_end
from amct_lightning.callbacks.exporting.batches import Inputs
from amct_lightning.callbacks.exporting.settings import ExportForm, ExportSettings
from amct_lightning.callbacks.modes import expect_float
from amct_lightning.callbacks.optimizers.param_groups import ClipGroups
from amct_lightning.callbacks.schedule.schedule import QuantSchedule
from amct_lightning.callbacks.schedule.table import schedule_table
from amct_lightning.callbacks.sharding import build_layers, check_complete, check_tensor_parallel
from amct_lightning.callbacks.training import Training
from amct_lightning.config import QuantChoices, RetrainConfig
from amct_lightning.conversion.on_target import TargetLike, TargetRules
from amct_lightning.modules import leave_out_of_broadcast, quantized_layers
from amct_lightning.modules.degenerate import OnDegenerate
from amct_lightning.modules.folding import is_sharded
from amct_lightning.quantizers.executors import Execution
from amct_lightning.targets import OnUnsupported


class QuantRetrainCallback(EvaluationHooks):
    """Quantization-aware training of a LightningModule; nothing in the module changes.

    In ``setup``, for every stage, the layers named by ``config`` are converted in place (once; a second ``fit`` or
    a ``test`` after it goes on with the same layers). The first ``batch_num`` training batches calibrate the
    activation ranges; after that they are learned along with the weights. Whenever a checkpoint is saved, the
    record is written to ``record_file`` and, as ``<name>.record.txt``, beside ``<name>.ckpt``; once more when
    training ends, unless it was a ``fast_dev_run``. A checkpoint holds the configuration, the calibration state and
    the record, so resuming and testing from it needs no config file and continues to the bit.

    Args:
        config: What to quantize: a preset such as ``"INT8"``, the path of a JSON, ``.cfg`` or YAML file, what is in one
            as a mapping, a :class:`RetrainConfig` or :class:`QuantChoices`. ``None`` is ``"INT8"``.
        record_file: The file for the quantization factors, which may be remote (``"s3://bucket/record.txt"``);
            ``None`` means ``record.txt`` in the Trainer's ``default_root_dir``.
        input_data: Input that shows the data flow of the converted module: a tensor, a tuple of positional or a mapping
            of keyword arguments. ``None`` takes ``example_input_array`` or the first batch of the dataloader.
        submodule: Dotted name of the part to convert, such as ``"net.backbone"``, where layer names in the config and
            the record begin. ``None`` converts all of the LightningModule.
        batch_to_input: Turns a batch into the arguments of ``forward``, for batches that are neither a tensor, nor
            ``(x, ...)``, nor a mapping with the names of its parameters.
        quant_lr_scale: Factor of the learning rate for the learned clips.
        quant_weight_decay: Weight decay of the learned clips; ``None`` leaves it as in the optimizer.
        on_nonfinite: What to do when a quantizer's input was NaN or infinite in training. It is detected on the
            device and reported, with layer and step, every ``log_every_n_steps`` batches: ``"warn"`` or ``"raise"``.
        allow_reuse: Also quantize layers that are called several times in one forward.
        search_n: Search the shifts of the int32 sums in evaluation passes; see :func:`amct_lightning.prepare_qat`.
        schedule: When to start, calibrate, update and freeze: a :class:`QuantSchedule`, or its fields as a mapping.
            ``None`` calibrates on the first batches and learns all factors until the end.
        float_checkpoint: Float weights to begin with, loaded before the conversion: a checkpoint of Lightning, a
            state_dict (``.pt``, ``.pth``) or a ``.safetensors`` file. Ignored in a run that resumes with ``ckpt_path``.
        on_degenerate: What to do when only 0, or nearly so, reaches a layer in calibration: ``"amct"`` gives it scale 1
            as AMCT does, and warns; ``"wait"`` does not count the batch. See :func:`amct_lightning.prepare_qat`.
        target: What the network is meant for: ``"A2"``, ``"A3"``, ``"950"``, ``"310P"`` or ``"serving"``. Before any
            training its layers and types are checked. ``None`` checks nothing.
        on_unsupported: What to do about layers that the target does not run: ``"error"``, ``"fallback"`` (INT8, or
            float where that is not enough) or ``"warn"``. See :func:`amct_lightning.prepare_qat`.
        export: Forms in which the best checkpoint, or else the model, is exported at the end of fit: ``"deploy"``,
            ``"fake_quant"``, ``"qdq"``; see :func:`amct_lightning.export_onnx`.
        export_dir: Where to, with its record; ``None`` means ``export`` in the Trainer's ``default_root_dir``.
        verify_batches: Number of evaluation batches to verify it on, see :func:`amct_lightning.verify_export`.
        deploy_grid: Compute with what the device computes with; see :func:`amct_lightning.prepare_qat`.
        execution: What runs the quantizers: ``"composite"``, ``"compiled"``, or ``"auto"`` for the faster of those that
            work here; see :func:`amct_lightning.prepare_qat`.
        distill: Let the float model as it is converted teach the quantized one: a :class:`Distill`, or its fields as
            a mapping.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a value that is not allowed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from amct_lightning import QuantRecord, QuantRetrainCallback
        >>> import tempfile
        >>> trainer = Trainer(
        ...     callbacks=[QuantRetrainCallback()], max_steps=2, accelerator="cpu", logger=False,
        ...     default_root_dir=tempfile.mkdtemp(), enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel())
        >>> list(QuantRecord.load(trainer.default_root_dir + "/record.txt"))
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
        float_checkpoint: str | Path | None = None,
        on_degenerate: OnDegenerate = "amct",
        target: TargetLike = None,
        on_unsupported: OnUnsupported = "error",
        export: ExportForm | list[ExportForm] | None = None,
        export_dir: str | Path | None = None,
        verify_batches: int = 1,
        deploy_grid: bool = False,
        execution: Execution = "auto",
        distill: dict[str, Any] | Distill | None = None,
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
        self.distill = Distill.of(distill)
        self.schedule = with_fixed_norms(self.distill, None if schedule is None else QuantSchedule.of(schedule))
        self.float_checkpoint = float_checkpoint
        self.on_degenerate = on_degenerate
        self.target = target
        self.on_unsupported = on_unsupported
        self._rules = TargetRules.of(target, on_unsupported, "QuantRetrainCallback")
        self._exports = ExportSettings.of(export, export_dir, verify_batches)
        self.deploy_grid = deploy_grid
        self.execution = execution
        check_arguments(self)
        self._distillation = None if self.distill is None else Distillation(self.distill)
        self._calibration = CalibrationCount(on_degenerate)
        self._modules: list[nn.Module] = []
        self._max_epochs: int | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Convert the model, before its weights are restored, moved or wrapped and optimizers are made."""
        check_neighbours(trainer.callbacks, self)  # type: ignore[attr-defined]
        set_up_now(pl_module, stage)
        self._modules = build_layers(trainer, pl_module)
        model = find_submodule(pl_module, self.submodule)
        record = RecordFile.of(trainer, self.record_file, self.config)
        is_fitting = stage == "fit"
        self._state = state = QuantState(
            model, self.submodule, record, self._calibration, self.config is not None, is_fitting, pl_module
        )
        begin_in_float(self.float_checkpoint, trainer, pl_module, self.submodule)
        if self._distillation is not None:
            self._distillation.prepare(trainer, pl_module, self.submodule, self.float_checkpoint, is_fitting)
        choices = self.config, self.schedule, self.input_data, self.batch_to_input
        options = self.allow_reuse, self.search_n, rules_for(trainer, self._rules), self.deploy_grid
        forms = self._exports.forms if is_fitting and self._exports is not None else ()
        Conversion(*choices, *options, self.execution, forms).apply(trainer, pl_module, state)
        if self._distillation is not None and is_fitting:
            self._distillation.hold_weights(pl_module)
        leave_out_of_broadcast(pl_module)  # the module that DDP wraps
        self._watch = ModuleWatch(pl_module, model)
        expect_float(model, is_fitting)  # sanity check and model summary run the layers before any calibration
        warn_spawned(trainer)
        trainer.strategy.checkpoint_io = RecordCheckpointIO(trainer.strategy.checkpoint_io, state)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the clips their own treatment in the optimizers, before their states are restored."""
        model, epochs = self._converted(), trainer.max_epochs
        check_complete(pl_module, self._modules)
        check_tensor_parallel(quantized_layers(model))
        self._max_epochs = None if epochs is None or epochs < 0 else epochs  # StochasticWeightAveraging adds one
        if self.schedule is not None:
            table = schedule_table(self.schedule, quantized_layers(model), self._max_epochs)
            rank_zero_info(f"QuantRetrainCallback: the schedule\n{table}")
        self._groups = ClipGroups.of(trainer, model, self.quant_lr_scale, self.quant_weight_decay)
        if self._distillation is not None:
            self._distillation.begin(trainer, pl_module, model, self._max_epochs, self.schedule)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with the schedule, and to watch for NaN and infinite activations."""
        expect_float(self._converted(), False)
        self._look("on_fit_start")
        self._run.restore_again()
        args = self.schedule or QuantSchedule(), self._max_epochs, self._calibration, self.on_nonfinite, self._groups
        self._training = Training(trainer, self._converted(), *args)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Bring the layers into the phase that the schedule wants."""
        if self._watch is not None:
            self._watch.start_batch(batch_idx)
        if self._training is not None:
            self._training.start_batch(trainer, pl_module, batch_idx)

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Expect the loop to write parameters."""
        if self._training is not None:
            self._training.after_backward(trainer)

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
        if self._watch is not None:
            self._watch.end_batch()
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
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the quantizers go by their own mode again."""
        if self._watch is not None:
            self._watch.end()
        if self._distillation is not None:
            self._distillation.end()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the record of the last good state: the present one, or the last written if that is unusable."""
        explain_matrices_only(exception)
        if self._training is not None:
            # With sharded weights all ranks would have to take part, and one of them may be what failed.
            if trainer.is_global_zero and not is_sharded(self._converted()):
                with suppress(RuntimeError, OSError):  # a device or disk that failed must not hide the exception itself
                    self._run.record.write(record_text(self._converted()))
            self._training.close()
        self._training = None
        self.teardown(trainer, pl_module, "")

    @override
    def _export(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._exports is not None:
            inputs = Inputs(self.input_data, self.batch_to_input)
            export_at_end(self._exports, trainer, pl_module, self.submodule, inputs, self._rules)
