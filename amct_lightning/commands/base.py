"""What all subcommands have in common: how they are listed, parsed, completed and started."""

from __future__ import annotations

import argparse
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import metadata

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from typing_extensions import override

PROGRAM = "amct-lightning"

_DESCRIPTION = "Quantization-aware training for Ascend hardware in PyTorch Lightning, from the command line."
_EPILOG = """\
examples:
  amct-lightning fit --model my_module.Classifier --data my_module.Digits --trainer.max_epochs 5
  amct-lightning fit --config run.yaml --quant.config choices.yaml
  amct-lightning config --model my_module.Classifier --input-shape 1,3,32,32 --explain
  amct-lightning record show record.txt
  amct-lightning export last.ckpt --model run.yaml --input-shape 1,3,32,32

Each command explains itself: amct-lightning fit --help. Modules in the current folder can be named as in a script.

Completion in the shell (needs: pip install argcomplete), in bash or zsh:
  eval "$(register-python-argcomplete amct-lightning)"
"""
_LITERAL = re.compile(r"``([^`]+)``")
_ROLE = re.compile(r":\w+:`~?([^`]*)`")


class UserError(Exception):
    """Something that the user can put right; its text is all that is shown."""


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """jsonargparse's help, with the line breaks of examples kept and without the markup of docstrings."""

    # These methods are named as private in argparse, but overriding them is how all its formatters work.
    def _expand_help(self, action: argparse.Action) -> str:
        text = _ROLE.sub(r"\1", super()._expand_help(action))
        text = _LITERAL.sub(lambda found: found[1] if found[1][0] in "'\"" else f"'{found[1]}'", text)
        for nothing in (" (default: null)", " (default: False)", ", default: null"):
            text = text.replace(nothing, "")
        return text


class Command(ABC):
    """A subcommand.

    Attributes:
        name: The word on the command line.
        summary: One line for the list of commands.
    """

    name: str
    summary: str

    @abstractmethod
    def execute(self, arguments: Sequence[str], commands: Sequence[Command]) -> int:
        """Parse the arguments, do the work, return the exit status.

        Args:
            arguments: All arguments, the name of the command among them.
            commands: All commands, for the help.
        """

    @abstractmethod
    def complete(self, words: list[str]) -> None:
        """Answer a shell that asks for completions.

        Args:
            words: What is on the command line before the word that is being typed, the name of the command first.
        """


class ParsedCommand(Command):
    """A subcommand whose arguments stand in a parser of this package."""

    description: str
    epilog: str = ""

    @abstractmethod
    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the arguments to the parser of the command."""

    @abstractmethod
    def run(self, options: Namespace) -> int:
        """Do the work.

        Args:
            options: The parsed arguments.

        Returns:
            The exit status.
        """

    @override
    def execute(self, arguments: Sequence[str], commands: Sequence[Command]) -> int:
        """Parse the arguments, do the work, return the exit status."""
        parser = root_parser(commands, self)
        options = parser.parse_args(self.prepare(arguments))
        return self.run(options[self.name])

    @override
    def complete(self, words: list[str]) -> None:
        """Answer a shell that asks for completions."""
        parser = new_parser()
        self.add_arguments(parser)
        offer(parser, words[:1])

    def prepare(self, arguments: Sequence[str]) -> list[str]:
        """Return the arguments as the parser takes them.

        Args:
            arguments: The arguments as they were given.
        """
        return list(arguments)


def root_parser(commands: Sequence[Command], chosen: ParsedCommand | None = None) -> ArgumentParser:
    """Return a parser that lists all commands and knows the arguments of one.

    Args:
        commands: All commands.
        chosen: The one whose arguments are needed.
    """
    parser = new_parser(_DESCRIPTION, _EPILOG, prog=PROGRAM, version=_version())
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error; after any command.")
    subcommands = parser.add_subcommands(title="commands", description=None, metavar="COMMAND")
    for command in commands:
        if chosen is None or command is not chosen:  # it is only listed
            subcommands.add_subcommand(command.name, new_parser(), help=command.summary)
            continue
        child = new_parser(chosen.description, chosen.epilog)
        subcommands.add_subcommand(chosen.name, child, help=chosen.summary)
        child.prog = f"{PROGRAM} {chosen.name}"
        chosen.add_arguments(child)
    return parser


def new_parser(
    description: str | None = None, epilog: str | None = None, *, prog: str | None = None, version: str | None = None
) -> ArgumentParser:
    """Return a parser that raises its errors and shows help as all commands do.

    Args:
        description: What stands above the options.
        epilog: What stands below them, its line breaks kept.
        prog: What the usage line begins with.
        version: What ``--version`` prints.

    Example:
        >>> parser = new_parser("Counts layers.")
        >>> _ = parser.add_argument("--model", help="A class path.")
        >>> parser.parse_args(["--model", "torch.nn.Linear"]).model
        'torch.nn.Linear'
    """
    return ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        version=version,
        exit_on_error=False,
        formatter_class=HelpFormatter,
    )


# Completion in the shell is jsonargparse's, by argcomplete, which sets environment variables and calls the command.


def is_completing() -> bool:
    """Tell whether a shell asks for completions."""
    return "_ARGCOMPLETE" in os.environ


def finished_words() -> list[str]:
    """Return the words on the shell's command line after the program, without the one that is being typed."""
    line = os.environ.get("COMP_LINE", "")
    line = line[: int(os.environ.get("COMP_POINT", len(line)))]
    words = line.split() if line.endswith(" ") else line.split()[:-1]
    return words[int(os.environ["_ARGCOMPLETE"]) :]


def offer(parser: ArgumentParser, used: Sequence[str] = ()) -> None:
    """Answer the shell with what a parser takes; the process ends.

    argcomplete (seen in 3.7) fails in the subcommands of jsonargparse (seen in 4.53), so the parser is that of the
    subcommand alone, and argcomplete begins its work behind the words that lead there.

    Args:
        parser: The parser.
        used: The words that lead to it.
    """
    skip(len(used))
    parser.parse_args([])


def skip(words: int) -> None:
    """Let argcomplete begin some words later."""
    os.environ["_ARGCOMPLETE"] = str(int(os.environ["_ARGCOMPLETE"]) + words)


def _version() -> str:
    try:
        return metadata.version("amct-lightning")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
