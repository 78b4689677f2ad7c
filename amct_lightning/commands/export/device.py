"""The device that an export is for: what it does not run, and the command that compiles for it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import nn

from amct_lightning.conversion.on_target import TargetRules, listed
from amct_lightning.conversion.plan import find_plan
from amct_lightning.export.atc import atc_command
from amct_lightning.files import location
from amct_lightning.targets import find_target

if TYPE_CHECKING:
    from amct_lightning.export.report import ExportReport


def find_device(model: nn.Module, target: str | None, soc_version: str | None) -> str | None:
    """Return the generation of hardware that a model is exported for; warn of layers that it does not run.

    Args:
        model: The model.
        target: The user's choice; ``None`` for what the model was trained for, if that was said.
        soc_version: The processor, which has to be of this generation.

    Raises:
        ValueError: If it is not.
    """
    found = find_plan(model)
    if found is None:
        return target
    root, plan = found
    name = target or plan.target
    atc_command("model.onnx", name, soc_version=soc_version, input_shapes={"input": (1,)})  # refuses what does not fit
    if name is not None:
        rules = TargetRules(find_target(name))
        layers = {name: layer for name, layer in plan.config.items() if layer.retrain_enable}
        obstacles = rules.obstacles(layers, {name: root.get_submodule(name) for name in layers})
        for verdict, what in (("unsupported", "does not run as it is"), ("doubtful", "may not run well")):
            of_kind = [obstacle for obstacle in obstacles if obstacle.fact.verdict == verdict]
            if of_kind:
                warnings.warn(f"target {name} ({rules.target.products}) {what}: {listed(of_kind)}.", stacklevel=2)
    return name


def compile_script(report: ExportReport, target: str | None, soc_version: str | None) -> str:
    """Return a shell script that compiles a network in the folder that both are in, wherever it is run.

    Args:
        report: The network, written in the deploy form.
        target: The generation of the device.
        soc_version: Its processor.
    """
    command = atc_command(_name(report), target, soc_version=soc_version, input_shapes=report.inputs)
    return f'#!/bin/sh\ncd "$(dirname "$0")" || exit\n{command}\n'


def compile_command(report: ExportReport, target: str | None, soc_version: str | None) -> str:
    """Return the command line of ATC for a network that was written in the deploy form.

    Args:
        report: The network.
        target: The generation of the device.
        soc_version: Its processor.
    """
    place = location(report.path)
    path = _name(report) if isinstance(place, str) else place  # ATC reads local files, once they are fetched
    return atc_command(path, target, soc_version=soc_version, input_shapes=report.inputs)


def _name(report: ExportReport) -> str:
    return report.path.rpartition("/")[2]
