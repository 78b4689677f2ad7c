"""How the callback converts a model when it is set up, or goes on with one that is converted already."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from amct_lightning.callbacks.checkpoints.state import QuantState
from amct_lightning.callbacks.checks import describe_difference
from amct_lightning.callbacks.inputs import BatchToInput, find_input
from amct_lightning.callbacks.schedule.schedule import QuantSchedule
from amct_lightning.callbacks.sharding import reshard
from amct_lightning.config import ConfigLike, RetrainConfig, config_source, load_config
from amct_lightning.config.fit import without_computed_weights
from amct_lightning.conversion.convert import convert_layers
from amct_lightning.conversion.plan import QuantPlan, find_plan, make_plan
from amct_lightning.conversion.report import conversion_report
from amct_lightning.layer_types import supported_class
from amct_lightning.modules import quantized_layers


@dataclass(frozen=True)
class Conversion:
    """The arguments of :class:`QuantRetrainCallback` that count for the conversion; see there."""

    config: ConfigLike
    schedule: QuantSchedule | None
    input_data: Any
    batch_to_input: BatchToInput | None
    allow_reuse: bool
    search_n: bool

    def apply(self, trainer: pl.Trainer, pl_module: pl.LightningModule, state: QuantState) -> None:
        """Convert a float model, or make sure that a converted one is quantized as it should be.

        Args:
            trainer: The Trainer, in its setup phase.
            pl_module: The LightningModule.
            state: The model in it; told if its configuration is missing.

        Raises:
            ValueError: If the model cannot be converted so, or was converted in another way.
        """
        found = find_plan(state.model)
        if found is None:
            self._convert(trainer, pl_module, state)
            return
        with suppress(FileNotFoundError):
            self._check_unchanged(*found, type(state.model).__name__)
        number = len(quantized_layers(state.model))
        rank_zero_info(f"QuantRetrainCallback: going on with {number} quantized layers.")

    def _convert(self, trainer: pl.Trainer, pl_module: pl.LightningModule, state: QuantState) -> None:
        model = state.model
        try:
            config, source = load_config(self.config), config_source(self.config)
        except FileNotFoundError as error:
            state.missing_config = error  # a checkpoint that is about to be loaded may bring its own
            return
        run, input_data = model, self.input_data
        if input_data is None:
            run, input_data = find_input(trainer, pl_module, model, self.batch_to_input)
        plan = make_plan(model, config, input_data, run, source, self.allow_reuse, self.search_n)
        reshard(pl_module)
        plan = self._with_batches(plan)
        convert_layers(model, plan)
        report = conversion_report(model)
        rank_zero_info(f"QuantRetrainCallback: the record goes to '{state.record.path}'. {report}")

    def _check_unchanged(self, root: nn.Module, plan: QuantPlan, name: str) -> None:
        """Refuse a configuration that is not the one by which a model was converted before."""
        if self.config is None:
            return
        source = config_source(self.config)
        layers = {layer: _as_float(root.get_submodule(layer)) for layer in plan.config}
        config = without_computed_weights(load_config(self.config), root, source, keep=layers)
        wanted = self._with_batches(replace(plan, config=config.resolve(layers, source)))
        if wanted != plan:
            raise ValueError(
                f"{name} is quantized already, and {source} would do it differently: "
                f"{describe_difference(wanted, plan)} (there: as it is; here: as configured). Leave `config` out to go "
                "on with the layers as they are, or begin with the float model."
            )

    def _with_batches(self, plan: QuantPlan) -> QuantPlan:
        """Let the calibrations of a plan take as many batches as the schedule says."""
        if self.schedule is None or self.schedule.calibrate_batches is None:
            return plan
        settings = plan.config.to_dict() | {"batch_num": self.schedule.calibrate_batches}
        return replace(plan, config=RetrainConfig.from_dict(settings, "QuantSchedule"))


def _as_float(layer: nn.Module) -> nn.Module:
    """View a QAT layer as one of its float class, which the rules of configurations go by."""
    kind = supported_class(layer)
    view = kind.__new__(kind)
    view.__dict__ = layer.__dict__
    return view
