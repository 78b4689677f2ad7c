"""The options that name a model and its input; :mod:`~amct_lightning.commands.model_input` makes them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from jsonargparse import ArgumentParser


def add_model_options(parser: ArgumentParser, part: str) -> None:
    """Add the options that name a model, a part of it and the input that it takes.

    Args:
        parser: The parser of the command.
        part: What is done with the part alone, for the help.
    """
    parser.add_argument(
        "--model",
        required=True,
        metavar="CLASS_PATH|YAML",
        help="Class path of a LightningModule or any module, or the YAML of a run, whose model is taken.",
    )
    parser.add_argument(
        "--init-arg",
        action="append",
        metavar="KEY=VALUE",
        help="An argument of the class; may be repeated. --model.KEY=VALUE is the same.",
    )
    parser.add_argument(
        "--input-shape",
        action="append",
        metavar="[NAME=]SHAPE[:DTYPE]",
        help="Shape of an argument of forward, such as 1,3,32,32 or ids=1,128:int64; repeat it for each. Without "
        "it, the example_input_array of the model is used.",
    )
    parser.add_argument("--submodule", metavar="NAME", help=part)


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """Spell ``--model.width=16`` as ``--init-arg width=16``.

    Args:
        arguments: The arguments of a command with :func:`add_model_options`.

    Example:
        >>> spelled_out(["--model", "Net", "--model.width", "16"])
        ['--model', 'Net', '--init-arg', 'width=16']
    """
    result: list[str] = []
    waiting = ""
    for argument in arguments:
        found = re.fullmatch(r"--model\.([^=]+)(=.*)?", argument, re.DOTALL)
        if waiting:
            result.append(f"{waiting}={argument}")
            waiting = ""
        elif found is None:
            result.append(argument)
        else:
            result.append("--init-arg")
            waiting = "" if found[2] else found[1]
            result += [f"{found[1]}{found[2]}"] if found[2] else []
    return [*result, waiting] if waiting else result
