"""Writing and verifying the networks of a training when it ends, on rank zero and from a copy of the model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from amct_lightning.callbacks.checks import find_submodule
from amct_lightning.callbacks.converting.observed import unlogged
from amct_lightning.callbacks.exporting.batches import Inputs
from amct_lightning.callbacks.exporting.best import Trained, best_of
from amct_lightning.callbacks.exporting.settings import ExportForm, ExportSettings
from amct_lightning.conversion.on_target import TargetRules
from amct_lightning.export.atc import atc_command
from amct_lightning.export.report import ExportReport
from amct_lightning.files import write_text
from amct_lightning.graph.forward import Forward
from amct_lightning.modules.folding import is_sharded
from amct_lightning.record import QuantRecord

_logger = logging.getLogger(__name__)


def export_at_end(
    settings: ExportSettings,
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    submodule: str | None,
    inputs: Inputs,
    rules: TargetRules | None = None,
) -> None:
    """Export the best checkpoint of a training, or the model as it is at the end; a failure is told, and no more.

    Checkpoints and record are written by then, so that nothing is lost, and other processes wait for this one.

    Args:
        settings: What to export and where to.
        trainer: The Trainer, at the end of fit, in the process of rank zero.
        pl_module: The module, which is not changed.
        submodule: Name of the converted part of it.
        inputs: What it is called with.
        rules: What the Ascend hardware allows that it is exported for.
    """
    if is_sharded(pl_module):
        rank_zero_warn(
            "QuantRetrainCallback: no network is exported, as each process holds a part of the weights only. Export "
            "from a checkpoint: amct-lightning export CKPT --model ..."
        )
        return
    try:
        trained = best_of(trainer, pl_module)
        with unlogged(trainer, trained.module):
            _export(settings, trainer, trained, find_submodule(trained.module, submodule), inputs, rules)
    except Exception as error:  # of whatever kind: the training is complete, and must not end in an error
        _logger.debug("The export failed.", exc_info=error)
        rank_zero_warn(
            f"QuantRetrainCallback: the training is complete, its export failed: {type(error).__name__}: {error} "
            "When that is mended, export from the checkpoint: amct-lightning export CKPT --model ..."
        )


def _export(
    settings: ExportSettings,
    trainer: pl.Trainer,
    trained: Trained,
    model: nn.Module,
    inputs: Inputs,
    rules: TargetRules | None,
) -> None:
    from amct_lightning.export.onnx_file import export_forms  # noqa: PLC0415  (ONNX's libraries may not be installed)

    call = inputs.call(trainer, trained.module, model)
    files: dict[ExportForm, str] = {form: str(settings.file(trainer, f"{form}_model.onnx")) for form in settings.forms}
    reports = export_forms(call.run, files, call.input_data)
    QuantRecord.from_model(call.run).save(settings.file(trainer, "record.txt"))
    about: dict[str, Any] = {"weights": trained.source, "files": {form: str(file) for form, file in files.items()}}
    lines = [f"QuantRetrainCallback: exported {trained.source}.", *map(str, reports.values())]
    if "deploy" in reports:
        command = _atc(reports["deploy"], rules)
        write_text(settings.file(trainer, "atc.sh"), f"{command}\n")
        lines.append(f"Compile it for the device with:\n{command}")
    if settings.verify_batches:
        lines.append(_verified(settings, trainer, trained, call, inputs, files))
    write_text(settings.file(trainer, "export.json"), json.dumps(about, indent=4) + "\n")
    rank_zero_info("\n".join(lines))


def _atc(report: ExportReport, rules: TargetRules | None) -> str:
    return atc_command(report.path, None if rules is None else rules.target.name, input_shapes=report.inputs)


def _verified(
    settings: ExportSettings,
    trainer: pl.Trainer,
    trained: Trained,
    call: Forward,
    inputs: Inputs,
    files: Mapping[ExportForm, str],
) -> str:
    from amct_lightning.export.verify import verify_export  # noqa: PLC0415  (as above)

    batches = inputs.batches(trainer, trained.module, call, settings.verify_batches)
    report = verify_export(call.run, files, batches)
    report.save(settings.file(trainer, "verification.json"))
    if not report.ok:
        rank_zero_warn(f"QuantRetrainCallback: the exported networks depart from the trained one:\n{report}")
    return str(report)
