"""The subcommands of ``amct-lightning``, one file each.

A new one is a :class:`Command` in a file of its own and an entry in :func:`all_commands`.
"""

from __future__ import annotations

from collections.abc import Sequence

from amct_lightning.commands.base import Command, UserError, finished_words, is_completing, offer, root_parser
from amct_lightning.commands.config import ConfigCommand
from amct_lightning.commands.export.command import ExportCommand
from amct_lightning.commands.export.verify_command import VerifyCommand
from amct_lightning.commands.record.command import RecordCommand
from amct_lightning.commands.report import ReportCommand
from amct_lightning.commands.run import RunCommand
from amct_lightning.wording import closest

__all__ = ["Command", "all_commands", "dispatch"]


def all_commands() -> tuple[Command, ...]:
    """Return the subcommands in the order of the help.

    Example:
        >>> [command.name for command in all_commands()]
        ['fit', 'validate', 'test', 'predict', 'config', 'record', 'report', 'export', 'verify']
    """
    return (
        RunCommand("fit", "Train with quantization: a LightningModule and a Trainer from YAML or options."),
        RunCommand("validate", "Evaluate on the validation data."),
        RunCommand("test", "Evaluate on the test data."),
        RunCommand("predict", "Run the quantized model on data."),
        ConfigCommand(),
        RecordCommand(),
        ReportCommand(),
        ExportCommand(),
        VerifyCommand(),
    )


def dispatch(arguments: Sequence[str]) -> int:
    """Run the subcommand that the arguments name.

    Args:
        arguments: The arguments after the name of the command.

    Returns:
        The exit status.

    Raises:
        UserError: If there is no such subcommand.
    """
    commands = all_commands()
    if is_completing():
        _complete(commands)
        return 0
    name = next((word for word in arguments if not word.startswith("-")), None)
    chosen = next((command for command in commands if command.name == name), None)
    if chosen is not None:
        return chosen.execute(arguments, commands)
    if name is not None:
        names = [command.name for command in commands]
        raise UserError(f"there is no command '{name}'.{closest(name, names)} The commands are {', '.join(names)}.")
    root_parser(commands).parse_args(list(arguments) or ["--help"])
    return 0


def _complete(commands: Sequence[Command]) -> None:
    words = finished_words()
    chosen = next((command for command in commands if words[:1] == [command.name]), None)
    if chosen is None:
        offer(root_parser(commands))
    else:
        chosen.complete(words)
