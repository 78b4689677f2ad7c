"""``amct-lightning record``: look at record files, check and compare them, take them out of checkpoints."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from jsonargparse import ArgumentParser, Namespace
from typing_extensions import override

from amct_lightning.commands.base import ParsedCommand, UserError, new_parser, offer
from amct_lightning.commands.output import deliver, show
from amct_lightning.commands.record.file import extract, find_problems, read_record, read_text
from amct_lightning.commands.record.table import as_plain, contents, difference_table
from amct_lightning.wording import printable

_EPILOG = """\
examples:
  amct-lightning record show record.txt
  amct-lightning record check record.txt
  amct-lightning record diff float16/record.txt float32/record.txt --rtol 1e-3
  amct-lightning record extract last.ckpt -o record.txt

Where a record file is asked for, a checkpoint of QuantRetrainCallback does as well. Checkpoints are read without
running code from them.
"""
_SHOW = """\
from and to are the values that the input can take: scale * (integer - offset) for the ends of the integer range.

examples:
  amct-lightning record show record.txt
  amct-lightning record show last.ckpt --json | python -m json.tool
"""
_CHECK = """\
The exit status is 0 if all files are valid, 1 if one is not, 2 if one cannot be read.

examples:
  amct-lightning record check record.txt
  amct-lightning record check runs/*/record.txt
"""
_DIFF = """\
The exit status is 0 if the records are equal, 1 if they differ, 2 if one cannot be read. Without tolerances, equal
means to the last bit of float32. Integers and types have no tolerance, and the order of the layers does not count.

examples:
  amct-lightning record diff old/record.txt new/record.txt
  amct-lightning record diff epoch=1.ckpt epoch=2.ckpt --rtol 0.01
"""
_EXTRACT = """\
examples:
  amct-lightning record extract last.ckpt -o record.txt
  amct-lightning record extract last.ckpt | less
"""


class RecordCommand(ParsedCommand):
    """Work with record files."""

    name = "record"
    summary = "Show, check, compare record files; extract them from checkpoints."
    description = "Work with record files, which hold the quantization factors that the Ascend tools read."
    epilog = _EPILOG

    @override
    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the arguments to the parser of the command."""
        actions = parser.add_subcommands(title="actions", description=None, metavar="ACTION")
        for name, action in _ACTIONS.items():
            child = new_parser(action.summary, action.epilog)
            actions.add_subcommand(name, child, help=action.summary)
            child.prog = f"{parser.prog} {name}"
            action.add_arguments(child)

    @override
    def complete(self, words: list[str]) -> None:
        """Answer a shell that asks for completions."""
        if len(words) > 1 and words[1] in _ACTIONS:
            parser = new_parser()
            _ACTIONS[words[1]].add_arguments(parser)
            offer(parser, words[:2])
        else:
            super().complete(words)

    @override
    def prepare(self, arguments: Sequence[str]) -> list[str]:
        """Show the help if no action is given."""
        return [*arguments, "--help"] if list(arguments) == [self.name] else list(arguments)

    @override
    def run(self, options: Namespace) -> int:
        """Do what the action says."""
        return _ACTIONS[options.subcommand].run(options[options.subcommand])


def _add_show(parser: ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="A record file or checkpoint.")
    parser.add_argument("--json", action="store_true", help="Print all factors as JSON.")


def _add_check(parser: ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="+", help="Record files or checkpoints.")


def _add_diff(parser: ArgumentParser) -> None:
    parser.add_argument("first", metavar="A", help="A record file or checkpoint.")
    parser.add_argument("second", metavar="B", help="Another one.")
    parser.add_argument("--atol", type=float, default=0.0, help="Absolute tolerance of the scales.")
    parser.add_argument("--rtol", type=float, default=0.0, help="Tolerance relative to the larger scale.")


def _add_extract(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="A checkpoint of QuantRetrainCallback.")
    parser.add_argument("-o", "--output", metavar="FILE", help="The file to write; without it, stdout.")
    parser.add_argument("--force", action="store_true", help="Replace the file if it exists.")


_WHY_EMPTY = "A record file is empty until the first evaluation or checkpoint after the calibration."


def _show(options: Namespace) -> int:
    record = read_record(options.file)
    if options.json:
        sys.stdout.write(json.dumps(as_plain(record), indent=2, ensure_ascii=False) + "\n")
    elif record:
        show(contents(record))
    else:
        sys.stdout.write(f"'{options.file}' holds no layers. {_WHY_EMPTY}\n")
    return 0


def _check(options: Namespace) -> int:
    status = 0
    for file in options.files:
        text, source = read_text(file)
        count, problems = find_problems(text)
        for problem in problems:
            sys.stdout.write(printable(f"{source}: {problem}") + "\n")
            status = 1
        if not problems:
            sys.stdout.write(f"{source}: valid, {count} layer(s).{'' if count else f' {_WHY_EMPTY}'}\n")
    return status


def _diff(options: Namespace) -> int:
    for name in ("atol", "rtol"):
        if not 0 <= options[name] < float("inf"):
            raise UserError(f"--{name} {options[name]}: must be a number >= 0.")
    first, second = read_record(options.first), read_record(options.second)
    found = first.compare(second, options.rtol, options.atol)
    if not found:
        return 0
    show(difference_table(found, options.first, options.second))
    return 1


def _extract(options: Namespace) -> int:
    deliver(extract(options.checkpoint), options.output, options.force, "record")
    return 0


class _Action(NamedTuple):
    summary: str
    epilog: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]


_ACTIONS: Mapping[str, _Action] = MappingProxyType(
    {
        "show": _Action("Show the factors of all layers as a table.", _SHOW, _add_show, _show),
        "check": _Action("Check that record files are valid.", _CHECK, _add_check, _check),
        "diff": _Action("Compare two records.", _DIFF, _add_diff, _diff),
        "extract": _Action("Write the record that is in a checkpoint to a file.", _EXTRACT, _add_extract, _extract),
    }
)
