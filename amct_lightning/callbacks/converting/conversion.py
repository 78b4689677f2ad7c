"""How the callback converts a model when it is set up, or goes on with one that is converted already."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from amct_lightning.callbacks.checkpoints.state import QuantState, different_checkpoint
from amct_lightning.callbacks.checks import describe_difference
from amct_lightning.callbacks.converting.inputs import BatchToInput, Forwards, find_forwards
from amct_lightning.callbacks.converting.saved_plan import checkpoint_to_load, saved_entry
from amct_lightning.callbacks.schedule.schedule import QuantSchedule
from amct_lightning.callbacks.sharding import reshard
from amct_lightning.config import ConfigLike, config_source, load_config
from amct_lightning.config.fit import without_computed_weights
from amct_lightning.conversion.convert import convert_layers, renew_layers
from amct_lightning.conversion.copies import convert_averages
from amct_lightning.conversion.make_plan import make_plan
from amct_lightning.conversion.on_target import TargetRules
from amct_lightning.conversion.plan import QuantPlan, carried_plan, find_plan, note_target
from amct_lightning.conversion.report import conversion_report
from amct_lightning.export.checks import check_forms
from amct_lightning.layer_types import supported_class
from amct_lightning.modules import quantized_layers
from amct_lightning.modules.fused.choice import set_execution
from amct_lightning.quantizers.executors import Execution
from amct_lightning.wording import abbreviated


@dataclass(frozen=True)
class Conversion:
    """The arguments of :class:`QuantRetrainCallback` that count for the conversion; see there."""

    config: ConfigLike
    schedule: QuantSchedule | None
    input_data: Any
    batch_to_input: BatchToInput | None
    allow_reuse: bool
    search_n: bool
    target: TargetRules | None
    deploy_grid: bool = False
    execution: Execution = "auto"
    export_forms: tuple[str, ...] = ()

    def apply(self, trainer: pl.Trainer, pl_module: pl.LightningModule, state: QuantState) -> None:
        """Convert a float model, or make sure that a converted one is quantized as it should be.

        Args:
            trainer: The Trainer, in its setup phase.
            pl_module: The LightningModule.
            state: The model in it; told if its configuration is missing.

        Raises:
            ValueError: If the model cannot be converted or exported so, or was converted in another way.
        """
        self._apply(trainer, pl_module, state)
        if self.target is not None:
            note_target(state.model, self.target.target.name)
        set_execution(state.model, self.execution)
        done = find_plan(state.model)
        if done is not None:
            check_forms(done[1], self.export_forms)
            convert_averages(pl_module, *done)

    def _apply(self, trainer: pl.Trainer, pl_module: pl.LightningModule, state: QuantState) -> None:
        found = carried_plan(state.model)
        if found is None:
            path = checkpoint_to_load(trainer)
            entry = saved_entry(path)
            if entry is None:
                self._convert(trainer, pl_module, state)
                return
            self._adopt(pl_module, state, entry, str(path))
            return
        renewed = renew_layers(*found)
        found = find_plan(state.model)
        if found is None:
            raise ValueError(
                f"All layers of {type(state.model).__name__} were reverted part by part, so none is left to quantize. "
                "Call revert_layers on the whole of it to have it converted anew."
            )
        if renewed:
            rank_zero_warn(
                f"Replaced in {type(state.model).__name__} since its conversion: {abbreviated(renewed)}. What is there "
                "now is quantized like what was there before, and calibrates on the first batches."
            )
        with suppress(FileNotFoundError):
            self._check_unchanged(*found, type(state.model).__name__, state.is_fitting)
        number = len(quantized_layers(state.model))
        rank_zero_info(f"QuantRetrainCallback: going on with {number} quantized layers.")

    def _adopt(self, pl_module: pl.LightningModule, state: QuantState, entry: dict[str, Any], path: str) -> None:
        """Convert the model as the checkpoint says that is about to be loaded; it need not run for that."""
        reshard(pl_module)
        state.adopt(entry, path)
        with suppress(FileNotFoundError):
            root, plan = _planned(state.model)
            wanted = self._wanted(root, plan, state.is_fitting)
            if wanted != plan:
                raise different_checkpoint(path, wanted, plan)
        number = len(quantized_layers(state.model))
        rank_zero_info(f"QuantRetrainCallback: {number} layers are quantized as in the checkpoint '{path}'.")

    def _convert(self, trainer: pl.Trainer, pl_module: pl.LightningModule, state: QuantState) -> None:
        model = state.model
        try:
            config, source = load_config(self.config), config_source(self.config)
        except FileNotFoundError as error:
            state.missing_config = error  # a checkpoint that is about to be loaded may bring its own
            return
        inputs = find_forwards(trainer, pl_module, model, self.input_data, self.batch_to_input)
        plan = self._with_batches(self._first_plan(model, config, source, inputs))
        check_forms(plan, self.export_forms)  # before anything is changed
        reshard(pl_module)
        convert_layers(model, plan)
        set_execution(model, self.execution)
        report = conversion_report(model)
        rank_zero_info(f"QuantRetrainCallback: the record goes to '{state.record.path}'. {report}")

    def _first_plan(self, model: nn.Module, config: Any, source: str, inputs: Forwards) -> QuantPlan:
        """Make the plan from the first call with which the model runs."""
        errors = []
        for forward in inputs.calls:
            try:
                args = self.allow_reuse, self.search_n, self.target, self.deploy_grid
                return make_plan(model, config, forward, source, *args)
            except RuntimeError as error:
                errors.append(error)
        raise inputs.failure(errors[0])

    def _check_unchanged(self, root: nn.Module, plan: QuantPlan, name: str, is_fitting: bool) -> None:
        """Refuse a configuration that is not the one by which a model was converted before."""
        wanted = self._wanted(root, plan, is_fitting)
        if wanted != plan:
            raise ValueError(
                f"{name} is quantized already, and {config_source(self.config)} would do it differently: "
                f"{describe_difference(wanted, plan)} (there: as it is; here: as configured). Leave `config` out to go "
                "on with the layers as they are, or begin with the float model."
            )

    def _wanted(self, root: nn.Module, plan: QuantPlan, is_fitting: bool) -> QuantPlan:
        """Return the plan with the settings of the configuration, or its own, as the target allows them.

        The number of batches of a calibration counts for a training, whose schedule says it; to evaluate, any will do.
        """
        serving = plan.serving if self.target is None else self.target.serving_as(plan.serving)
        plan = replace(plan, deploy_grid=plan.deploy_grid or self.deploy_grid, serving=serving)
        if self.config is None and self.target is None:
            return self._with_batches(plan) if is_fitting else plan
        layers = {layer: _as_float(root.get_submodule(layer)) for layer in plan.config}
        config, source = plan.config, "the checkpoint"
        if self.config is not None:
            source = config_source(self.config)
            config = without_computed_weights(load_config(self.config), root, source, keep=layers)
            config = plan.undisputed(config.resolve(layers, source, self._by_channel(plan)))
        if self.target is not None:
            config = self.target.fitted(config, layers, source)
        wanted = replace(plan, config=config)
        return self._with_batches(wanted) if is_fitting or self.config is not None else wanted

    def _by_channel(self, plan: QuantPlan) -> bool:
        """Tell whether a Linear has a weight scale per output channel by default, as when the plan was made."""
        rules = self.target or TargetRules.of(plan.target, "error", "the checkpoint")
        return rules is not None and rules.linear_by_channel

    def _with_batches(self, plan: QuantPlan) -> QuantPlan:
        """Let the calibrations of a plan take as many batches as the schedule says."""
        if self.schedule is None or self.schedule.calibrate_batches is None:
            return plan
        return replace(plan, config=replace(plan.config, batch_num=self.schedule.calibrate_batches))


def rules_for(trainer: pl.Trainer, rules: TargetRules | None) -> TargetRules | None:
    """Let the model of servers have the half precision of a Trainer, where its own is float32 and none was named.

    Args:
        trainer: The Trainer, whose precision may convert the model later.
        rules: What the target allows.
    """
    half = "float16" if str(trainer.precision).startswith("16") else "bfloat16"
    return None if rules is None else replace(rules, dtype=half)


def _planned(model: nn.Module) -> tuple[nn.Module, QuantPlan]:
    found = find_plan(model)
    if found is None:
        raise RuntimeError(f"{type(model).__name__} carries no plan although it was converted by one.")
    return found


def _as_float(layer: nn.Module) -> nn.Module:
    """View a QAT layer as one of its float class, which the rules of configurations go by."""
    kind = supported_class(layer)
    view = kind.__new__(kind)
    view.__dict__ = layer.__dict__
    return view
