"""The quantized model in a checkpoint, made from its class or from the YAML of its run; nothing in the file runs."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from torch import nn

from amct_lightning.callbacks.checkpoints.loading import load_qat_checkpoint
from amct_lightning.checkpoint_file import read_foreign_checkpoint
from amct_lightning.commands.base import UserError
from amct_lightning.commands.model_input import find_part, make_model, model_text
from amct_lightning.conversion.plan import find_plan
from amct_lightning.modules.convert import PLAN_ATTRIBUTE
from amct_lightning.record import QuantRecord

_MANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def load_model(model: str, init_args: Sequence[str], checkpoint: str) -> nn.Module:
    """Load the quantized model of a checkpoint, in eval mode.

    Its class is given the arguments that the user names, the others as the checkpoint has them among its hyper
    parameters, and what is not there as the YAML of the run has it.

    Args:
        model: The class path of a module, or the YAML file of a run.
        init_args: Arguments of the class as ``key=value``.
        checkpoint: The checkpoint.

    Raises:
        UserError: If there is no such file.
        OSError: If it cannot be read.
        ValueError: If it is not that of a quantized model, or of another architecture.
        RuntimeError: If it is no checkpoint, or does not fit.
        argparse.ArgumentError: If there is no such class, or it does not take the arguments.
    """
    if not Path(checkpoint).exists():
        raise UserError(f"there is no checkpoint '{checkpoint}'.")
    section = model_text(model)
    named: dict[str, Any] = json.loads(section) if section.startswith("{") else {"class_path": section}
    module_class, given = _class_of(named["class_path"]), set(named.get("init_args") or {})
    parameters = {} if module_class is None else _parameters(module_class)
    saved, is_complete = _plain_hyper_parameters(checkpoint)
    needed = {name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    told = is_complete and not init_args and needed | given <= saved.keys()
    if told and module_class is not None and issubclass(module_class, pl.LightningModule):
        return load_qat_checkpoint(module_class, checkpoint).eval()  # as Lightning makes it
    usable = [f"{name}={json.dumps(value)}" for name, value in saved.items() if name in parameters]
    return load_qat_checkpoint(make_model(model, [*usable, *init_args], None), checkpoint).eval()


def load_part(options: Namespace) -> nn.Module:
    """Load what the options of a command name: the model in a checkpoint, or the part of it that is exported.

    Args:
        options: ``checkpoint``, ``model``, ``init_arg`` and ``submodule``.

    Raises:
        UserError: If nothing in it is quantized, or its layers were not all calibrated yet. See also
            :func:`load_model`.
    """
    model = load_model(options.model, options.init_arg or [], options.checkpoint)
    part = _converted_part(model, options.submodule)
    try:
        QuantRecord.from_model(part)
    except ValueError as error:
        raise UserError(
            f"the model in '{options.checkpoint}' cannot be deployed: {error} Or take a later one."
        ) from error
    return part


def _converted_part(model: nn.Module, name: str | None) -> nn.Module:
    """Return a part of a model with a plan of its own, if the plan by which it was converted is that of more."""
    part, found = find_part(model, name), find_plan(model)
    if found is not None and find_plan(part) is None:
        root, plan = found
        prefix = next((f"{inner}." for inner, module in root.named_modules() if module is part), "")
        own = plan.within(prefix) if prefix else plan
        if not prefix or not own.layers:
            raise UserError(f"--submodule {name}: nothing in it is quantized.")
        setattr(part, PLAN_ATTRIBUTE, own)
    return part


def _class_of(path: str) -> type | None:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None  # make_model says what is wrong
    return found if inspect.isclass(found) else None


def _parameters(of: type) -> dict[str, inspect.Parameter]:
    return {name: one for name, one in inspect.signature(of).parameters.items() if one.kind not in _MANY}


def _plain_hyper_parameters(checkpoint: str) -> tuple[dict[str, Any], bool]:
    """Return the hyper parameters that a text can express, and whether the checkpoint has no objects besides."""
    if Path(checkpoint).is_dir():
        return {}, True  # whoever loads it says what to do
    content, foreign = read_foreign_checkpoint(checkpoint)
    kept = content.get(pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY)
    return {str(name): value for name, value in dict(kept or {}).items() if _is_plain(value)}, not foreign


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
