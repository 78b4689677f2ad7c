"""The model and the input that a command looks at, made from what its options say."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from amct_lightning.callbacks.checkpoints.float_weights import load_float_weights
from amct_lightning.commands.base import UserError
from amct_lightning.graph.forward import InputData

_SHAPE = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<sizes>\d+(?:,\d+)*)?(?::(?P<dtype>\w+))?")
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")


def make_model(model: str, init_args: Sequence[str], checkpoint: str | None) -> nn.Module:
    """Make the model.

    Args:
        model: The class path of a module, or the YAML file of a run, whose ``model`` is taken.
        init_args: Arguments of the class as ``key=value``.
        checkpoint: A checkpoint of the float model whose weights are loaded.

    Returns:
        The model.

    Raises:
        RuntimeError: If the checkpoint does not fit, or is none.
        ValueError: If it is of a quantized model.
        argparse.ArgumentError: If there is no such class, or it does not take the arguments.

    Example:
        >>> make_model("torch.nn.Linear", ["in_features=4", "out_features=2"], None)
        Linear(in_features=4, out_features=2, bias=True)
    """
    wrong = [argument for argument in init_args if not re.match(r"[\w.]+=", argument)]
    if wrong:
        raise UserError(f"--init-arg {wrong[0]}: must be key=value, such as --init-arg width=16.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "model", required=True, fail_untyped=False)
    arguments = [f"--model.{argument.removeprefix('init_args.')}" for argument in init_args]
    config = parser.parse_args(["--model", model_text(model), *arguments])
    made = cast(nn.Module, parser.instantiate_classes(config).model)
    configure = getattr(made, "configure_model", None)
    if callable(configure):
        configure()  # a LightningModule may make its layers there
    if checkpoint is not None:
        load_float_weights(made, checkpoint)
    return made


def model_text(model: str) -> str:
    """Return a model as the parser takes it: its class path, or JSON of its class path and arguments.

    Args:
        model: The class path, or the YAML file of a run.

    Raises:
        UserError: If the file is missing or has no model.
    """
    if Path(model).suffix.lower() not in (".yaml", ".yml"):
        return model
    try:
        content = yaml.safe_load(Path(model).read_text())
    except FileNotFoundError:
        raise UserError(f"--model {model}: there is no such file.") from None
    except yaml.YAMLError as error:
        raise UserError(f"--model {model}: not valid YAML: {error}") from error
    section = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(section, (str, Mapping)) or (isinstance(section, Mapping) and "class_path" not in section):
        raise UserError(f"--model {model}: the file has no 'model' with a class_path, as the YAML of a run has it.")
    return section if isinstance(section, str) else json.dumps(section)


def make_input(shapes: Sequence[str], model: nn.Module) -> InputData:
    """Make an input for which the model's data flow can be observed.

    Args:
        shapes: One text per argument of ``forward``, see :func:`make_tensor`; all named or none. Without any, the
            model's ``example_input_array``.
        model: The model.

    Returns:
        A tuple of positional or a dict of keyword arguments, or the ``example_input_array``.

    Raises:
        UserError: If there is no input.
    """
    if not shapes:
        example = getattr(model, "example_input_array", None)
        if example is None:
            raise UserError(
                f"the data flow of {type(model).__name__} can only be seen with an input. Give its shape, such as "
                "--input-shape 1,3,32,32 (once per argument of forward), or set example_input_array in the model."
            )
        return cast(InputData, example)
    named = [make_tensor(shape) for shape in shapes]
    names = [name for name, _ in named if name is not None]
    if not names:
        return tuple(tensor for _, tensor in named)
    if len(names) < len(named) or len(set(names)) < len(names):
        raise UserError(f"--input-shape {' '.join(shapes)}: give a name of its own to all inputs, or to none.")
    return {str(name): tensor for name, tensor in named}


def make_tensor(text: str) -> tuple[str | None, Tensor]:
    """Make a tensor of a shape: floats are random numbers (always the same), integers 0, booleans true.

    Args:
        text: ``[NAME=]SIZE,SIZE,...[:DTYPE]``.

    Returns:
        The name, if there is one, and the tensor.

    Raises:
        UserError: If the text is something else.

    Example:
        >>> name, tensor = make_tensor("input_ids=1,128:int64")
        >>> name, tensor.shape, tensor.dtype
        ('input_ids', torch.Size([1, 128]), torch.int64)
    """
    found = _SHAPE.fullmatch(text.replace(" ", ""))
    if found is None or (found["sizes"] is None and found["dtype"] is None):
        raise UserError(f"--input-shape {text}: must be like 1,3,32,32 or 1,128:int64 or input_ids=1,128:int64.")
    name, kind = found["name"], found["dtype"] or "float32"
    if kind not in _DTYPES:
        raise UserError(f"--input-shape {text}: there is no dtype '{kind}'; use one of {', '.join(_DTYPES)}.")
    dtype: torch.dtype = getattr(torch, kind)
    sizes = [int(size) for size in (found["sizes"] or "").split(",") if size]
    if dtype.is_floating_point:
        return name, torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(dtype)
    return name, torch.full(sizes, kind == "bool", dtype=dtype)


def find_part(model: nn.Module, name: str | None) -> nn.Module:
    """Return the part of a model with a dotted name, all of it for ``None``.

    Args:
        model: The model.
        name: The name.

    Raises:
        UserError: If there is no such part.
    """
    try:
        return model if name is None else model.get_submodule(name)
    except AttributeError:
        children: list[Any] = [f"'{child}'" for child, _ in model.named_children()]
        raise UserError(
            f"--submodule {name}: {type(model).__name__} has no such module; its children are {', '.join(children)}."
        ) from None
