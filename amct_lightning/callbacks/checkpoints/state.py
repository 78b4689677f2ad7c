"""What a checkpoint holds of a quantized model beside its tensors: writing it, and bringing a model into it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from amct_lightning.callbacks.calibration_count import CalibrationCount
from amct_lightning.callbacks.checkpoints.records import RecordFile, record_text
from amct_lightning.callbacks.checks import describe_difference, find_submodule
from amct_lightning.conversion.convert import convert_layers, revert_layers
from amct_lightning.conversion.plan import QuantPlan, find_plan
from amct_lightning.conversion.plan_check import check_entry
from amct_lightning.modules import QATLayer, activation_quantizers, quantized_layers
from amct_lightning.modules.calibration import missed_layers
from amct_lightning.modules.convert import PLAN_ATTRIBUTE
from amct_lightning.modules.folding import is_sharded
from amct_lightning.modules.fused.choice import execution_of
from amct_lightning.wording import abbreviated


@dataclass
class QuantState:
    """The quantized model of one run, as its checkpoints hold it and as they bring it back.

    Attributes:
        model: The module; still in float while it waits for the plan of a checkpoint.
        submodule: Its dotted name in the LightningModule, ``None`` if it is all of it.
        record: The file for its record.
        calibration: How far its calibration has come.
        is_configured: Whether a configuration was given, so that the plan of a checkpoint cannot replace it.
        is_fitting: Whether optimizers go on from checkpoints, too.
        whole: The LightningModule, of which other parts may have been converted in other runs.
        missing_config: Why the model could not be converted: a checkpoint may bring what its configuration is missing.
    """

    model: nn.Module
    submodule: str | None
    record: RecordFile
    calibration: CalibrationCount
    is_configured: bool
    is_fitting: bool
    whole: nn.Module | None = None
    missing_config: FileNotFoundError | None = None
    _loaded: dict[str, Any] = field(default_factory=dict)

    def converted(self) -> nn.Module:
        """Return the model.

        Raises:
            FileNotFoundError: If it could not be converted.
        """
        if self.missing_config is not None:
            raise self.missing_config
        return self.model

    def entry(self) -> dict[str, Any] | None:
        """Return what a checkpoint has to hold beside the weights, plain data and tensors; ``None`` in float."""
        found = find_plan(self.model)
        if found is None:
            return None
        # A module that was converted by hand is inside.
        root = next(name for name, module in self.model.named_modules() if module is found[0])
        observed = {name: q.observed for name, q in activation_quantizers(self.model).items() if q.observed}
        return {
            "plan": found[1].to_dict(),
            "submodule": ".".join(filter(None, (self.submodule, root))) or None,
            "record": record_text(self.model),
            "calibration_steps": self.calibration.steps,
            "float_layers": layers_in_float(self.model),
            "missed_layers": missed_layers(self.model),
            "observed": observed,
            "execution": execution_of(self.model),
            "other_parts": {} if self.whole is None else _other_parts(self.whole, found[0]),
        }

    def adopt(self, entry: dict[str, Any] | None, source: str) -> None:
        """Convert a model that waits for the plan of its checkpoint; refuse a checkpoint with another plan.

        Args:
            entry: What :meth:`entry` gave when the checkpoint was written, ``None`` if it has none.
            source: The checkpoint's path.

        Raises:
            ValueError: If model and checkpoint are quantized differently.
        """
        if entry is not None:
            check_entry(entry, source)
            adopt_plan(self._root_of(entry), entry, source, replace=not self.is_configured)
            if self.whole is not None:
                adopt_other_parts(self.whole, entry, source)
            self.missing_config = None
        elif self.is_fitting:
            raise ValueError(
                f"'{source}' was written without QuantRetrainCallback, so the state of its optimizer does not fit the "
                f"quantized model. Begin with its weights: QuantRetrainCallback(float_checkpoint='{source}'), and fit "
                "without ckpt_path."
            )

    def _root_of(self, entry: dict[str, Any]) -> nn.Module:
        """Return the module that the plan of a checkpoint is for: one inside if that was converted by hand."""
        prefix, path = f"{self.submodule}." if self.submodule else "", entry.get("submodule") or ""
        inner = path.removeprefix(prefix) if path.startswith(prefix) else ""
        return self.model if path == (self.submodule or "") else find_submodule(self.model, inner or None)

    def restore(self, entry: dict[str, Any], averages: Iterable[nn.Module]) -> None:
        """Take back a calibration in progress, once the weights are loaded.

        Args:
            entry: What :meth:`entry` gave when the checkpoint was written, empty if it has none.
            averages: Copies of the LightningModule, whose states other callbacks are about to load.
        """
        self._loaded = entry
        warn_of_other_execution(self.converted(), entry)
        self.calibration.steps = entry.get("calibration_steps", 0)
        restore_observed(self.converted(), entry)
        for average in averages if entry else ():
            adopt_plan(find_submodule(average, self.submodule), entry, "checkpoint", replace=True)

    def restore_again(self) -> None:
        """Take it back again when training begins: a callback that averages weights has loaded the model once more."""
        if self._loaded:
            restore_observed(self.converted(), self._loaded)
        self._loaded = {}


def warn_of_other_execution(model: nn.Module, entry: Mapping[str, Any]) -> None:
    """Say so if a training goes on with other kernels than it began with: its numbers then differ by rounding.

    Args:
        model: The converted module.
        entry: What :meth:`QuantState.entry` gave; earlier versions did not note it.
    """
    before, now = entry.get("execution"), execution_of(model)
    if before not in (None, now):
        rank_zero_warn(
            f"The checkpoint was written with execution='{before}', and the quantizers now run with '{now}': the "
            "training goes on from the same state, but not to the bit as it would have. "
            f"QuantRetrainCallback(execution='{before}') runs them as before."
        )


def warn_of_other_rate(entry: Mapping[str, Any], scale: float) -> None:
    """Say so if the clips of a training go on with another factor of the learning rate than they had.

    Args:
        entry: What the callback has put into the checkpoint; earlier versions did not note the factor.
        scale: The factor from now on.
    """
    before = entry.get("quant_lr_scale")
    if isinstance(before, (int, float)) and before != scale:
        rank_zero_warn(
            f"The checkpoint was written with quant_lr_scale={before}, and the learned clips now go on with {scale} "
            f"times the learning rate of their weights. quant_lr_scale={before} goes on as before."
        )


def layers_in_float(model: nn.Module) -> list[str]:
    """Return the names of the layers that run in float for now: a schedule says so, or they have no range yet.

    Those that no training batch reaches are not among them.

    Args:
        model: The converted module.
    """
    layers = cast(dict[str, QATLayer], quantized_layers(model))
    return [
        name
        for name, layer in layers.items()
        if layer.quant_mode != "quantized"
        or not (layer.is_missed or all(layer.get_quantizer(q).has_range for q in layer.activation_quantizers))
    ]


def warn_of_float_phase(entry: Mapping[str, Any], source: str) -> None:
    """Say so if a checkpoint was saved before all layers ran quantized: its score does not tell how good they are.

    Also name the layers that no training batch had reached, and that are therefore not in its record.

    Args:
        entry: What :meth:`QuantState.entry` gave; earlier versions did not note the layers.
        source: The checkpoint's path.
    """
    names, number = entry.get("float_layers", []), len(entry["plan"]["layers"])
    missed = entry.get("missed_layers", [])
    if missed:
        rank_zero_warn(
            f"The checkpoint '{source}' has no range for the inputs of {len(missed)} of {number} layers "
            f"({abbreviated(missed)}), which no training batch had reached: they are evaluated in float, and the "
            "record lacks them. Train them, or leave them out: skip_layers in the config of a new training."
        )
    if not names:
        return
    which = (
        f"all {number} layers" if len(names) == number else f"{len(names)} of {number} layers ({abbreviated(names)})"
    )
    rank_zero_warn(
        f"The checkpoint '{source}' was saved before quantization had begun everywhere: {which} that are to be "
        "quantized ran in float. The score by which it may have been chosen as the best one is that of the float "
        "phase. To choose among quantized ones only, use QuantSchedule(restart_scores=True) with "
        "ModelCheckpoint(monitor=...), or take a later checkpoint."
    )


def adopt_plan(model: nn.Module, entry: dict[str, Any], source: str, replace: bool = False) -> None:
    """Convert a float model as the checkpoint's plan says; refuse a model that was converted differently.

    Args:
        model: The module, float or converted.
        entry: What :meth:`QuantState.entry` gave.
        source: The checkpoint's path, for messages.
        replace: Convert a model that was converted differently again, instead of refusing it.

    Raises:
        ValueError: If model and checkpoint are quantized differently, or the plan is damaged.
    """
    plan = QuantPlan.from_dict(entry["plan"], source)
    found = find_plan(model)
    if is_sharded(model) and (found is None or (replace and found[1] != plan)):
        raise ValueError(
            f"The checkpoint '{source}' was quantized differently from the model, which is sharded already when this "
            f"strategy reads a checkpoint. Give QuantRetrainCallback the `config` of the training that wrote it."
        )
    if found is not None and found[1] != plan and replace:
        revert_layers(model)
        found = None
    if found is None:
        convert_layers(model, plan, weights_follow=True)
    elif found[1] != plan:
        raise different_checkpoint(source, found[1], plan)


def different_checkpoint(source: str, model: QuantPlan, checkpoint: QuantPlan) -> ValueError:
    """Return the error to raise for a checkpoint that was quantized in another way than the model is to be.

    Args:
        source: The checkpoint's path.
        model: The plan of the model.
        checkpoint: The plan in the checkpoint.
    """
    return ValueError(
        f"The checkpoint '{source}' was quantized differently from the model: "
        f"{describe_difference(model, checkpoint)}. "
        "Leave `config` out (and `deploy_grid`, and `calibrate_batches` of the schedule) to have it taken from the "
        "checkpoint, or start a new run with the new configuration."
    )


def adopt_other_parts(whole: nn.Module, entry: dict[str, Any], source: str) -> None:
    """Convert parts of a LightningModule that other runs had converted before the one that wrote a checkpoint.

    Args:
        whole: The LightningModule.
        entry: What :meth:`QuantState.entry` gave.
        source: The checkpoint's path, for messages.
    """
    for name, plan in entry.get("other_parts", {}).items():
        part = find_submodule(whole, name or None)
        if find_plan(part) is None:
            convert_layers(part, QuantPlan.from_dict(plan, source), weights_follow=True)


def _other_parts(whole: nn.Module, root: nn.Module) -> dict[str, Any]:
    """Return the plans of the other converted parts by name, those of copies left out."""
    own = set(quantized_layers(whole).values())
    parts: dict[str, Any] = {}
    for name, module in whole.named_modules():
        if module is not root and PLAN_ATTRIBUTE in module.__dict__ and own & set(module.modules()):
            found = find_plan(module)
            parts |= {name: found[1].to_dict()} if found is not None and found[0] is module else {}
    return parts


def restore_observed(model: nn.Module, entry: dict[str, Any]) -> None:
    """Take back the batches that a calibration in progress had observed, and which layers it has given up.

    Args:
        model: The converted module, its tensors loaded.
        entry: What :meth:`QuantState.entry` gave.
    """
    observed = entry.get("observed", {})
    for name, quantizer in activation_quantizers(model).items():
        quantizer.observed = [batch.to(quantizer.clip_max.device) for batch in observed.get(name, [])]
        quantizer.missed = False
    missed = entry.get("missed_layers", [])
    for name, layer in cast(dict[str, QATLayer], quantized_layers(model)).items():
        for quantizer in map(layer.get_quantizer, layer.activation_quantizers if name in missed else ()):
            quantizer.missed = quantizer.calibrating
