"""Finding the place in a module that a checkpoint of a LightningModule, or of a part of it, belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from amct_lightning.conversion.plan import QuantPlan
from amct_lightning.wording import abbreviated


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds of a quantized module.

    Attributes:
        state_dict: The weights and quantizers.
        entry: The callback's entry: plan, converted submodule, observed batches.
        path: The file, for messages.
    """

    state_dict: Mapping[str, Tensor]
    entry: dict[str, Any]
    path: str


def place(saved: Saved, model: nn.Module) -> tuple[Saved, nn.Module]:
    """Fit what was saved of a LightningModule to ``model``, which is one like it or a part of it.

    Args:
        saved: What the checkpoint holds.
        model: The module to load it into, in float or converted in the same way.

    Returns:
        The same with names as they are in ``model``, and the module to convert: ``model`` or one in it.

    Raises:
        ValueError: If the architecture is another one.
    """
    plan = QuantPlan.from_dict(saved.entry["plan"], saved.path)
    submodule = saved.entry.get("submodule")
    base = f"{submodule}." if submodule else ""
    names = [base + name for layer in plan.layers for name in (layer.name, layer.batch_norm) if name is not None]
    prefix = "" if isinstance(model, pl.LightningModule) else _find_prefix(saved, model, names)
    outside = [name for name in names if not name.startswith(prefix)]
    if outside:
        raise ValueError(
            f"'{saved.path}' also quantizes {abbreviated(outside)}, outside of '{prefix.removesuffix('.')}', which is "
            f"all that {type(model).__name__} holds. Pass the LightningModule instead."
        )
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    missing = [name for name in names if name.removeprefix(prefix) not in known]
    if missing:
        raise ValueError(
            f"'{saved.path}' is of another architecture: {type(model).__name__} has no {abbreviated(missing)}. "
            "Pass a module like the one that was trained."
        )
    if base.startswith(prefix):
        entry, path = saved.entry, base.removeprefix(prefix).removesuffix(".")
    else:
        entry, path = _without(saved.entry, plan, prefix.removeprefix(base)), ""
    tensors = {key.removeprefix(prefix): value for key, value in saved.state_dict.items() if key.startswith(prefix)}
    return Saved(tensors, entry, saved.path), model.get_submodule(path)


def _find_prefix(saved: Saved, model: nn.Module, names: list[str]) -> str:
    """Return what the names of ``model`` begin with in the checkpoint, so that all of them are there."""
    own = list(model.state_dict())
    starts = [key.removesuffix(own[0]) for key in saved.state_dict if own and f".{key}".endswith(f".{own[0]}")]
    lacking = {start: [name for name in own if start + name not in saved.state_dict] for start in starts}
    fitting = [start for start in starts if not lacking[start]]
    fitting = [start for start in fitting if all(name.startswith(start) for name in names)] or fitting
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(
            f"'{saved.path}' has the names of {type(model).__name__} several times, after {abbreviated(fitting)}. Pass "
            "the LightningModule instead."
        )
    fewest = min(lacking, key=lambda start: len(lacking[start]), default=None)
    raise ValueError(
        f"'{saved.path}' is of another architecture: after no prefix it has all the tensors of {type(model).__name__}; "
        f"it lacks {abbreviated(own if fewest is None else lacking[fewest])}. Pass a module like the one that was "
        "trained, or the LightningModule."
    )


def _without(entry: dict[str, Any], plan: QuantPlan, prefix: str) -> dict[str, Any]:
    """Return the callback's entry for the part of the converted module that follows ``prefix``."""
    part = plan.within(prefix)
    observed = {name.removeprefix(prefix): batches for name, batches in entry.get("observed", {}).items()}
    lists = {
        key: [name.removeprefix(prefix) for name in entry.get(key, []) if name.startswith(prefix)]
        for key in ("float_layers", "missed_layers")
    }
    return {**entry, "plan": part.to_dict(), "observed": observed, **lists}
