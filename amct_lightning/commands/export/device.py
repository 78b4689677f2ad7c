"""The device that an export is for: which generation it is of, and what it does not run."""

from __future__ import annotations

import warnings

from torch import nn

from amct_lightning.conversion.on_target import TargetRules, listed
from amct_lightning.conversion.plan import find_plan
from amct_lightning.export.atc import atc_command
from amct_lightning.targets import find_target


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
