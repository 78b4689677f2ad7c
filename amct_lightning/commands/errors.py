"""From exceptions to one message and an exit status."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from amct_lightning.commands.base import PROGRAM, UserError, is_completing
from amct_lightning.wording import printable

INTERRUPTED = 130
TERMINATED = 143
PIPE_CLOSED = 141

_RUNS = ("fit", "validate", "test", "predict")
_OTHERS = ("config", "record", "report", "export", "verify")
_IMPORTING = ("config", "export", "verify")
"""Those that make a model from a class that the user names."""

# What jsonargparse says of each form that an option could have had, beside what is wrong with the one it has.
_NOISE = re.compile(
    r"\s*(- Expected a path but .* either not accessible or invalid|(- )?Does not validate against any of the Union.*"
    r"|Subtypes: .*|Errors:|- Expected a <class '(NoneType|list)'>|Given value type: .*|Given value: NestedArg.*)"
)


def guarded(run: Callable[[], int], arguments: Sequence[str], *, debug: bool) -> int:
    """Run a command; turn what it raises into a message on stderr and an exit status.

    Args:
        run: The command.
        arguments: Its arguments, for the message.
        debug: Let errors through, with their traceback.

    Returns:
        The exit status.
    """
    status = _run(run, arguments, debug)
    try:
        sys.stdout.flush()  # now, and not when the interpreter ends and can only complain
    except BrokenPipeError:
        status = _without_reader()
    return status


def _run(run: Callable[[], int], arguments: Sequence[str], debug: bool) -> int:
    try:
        with current_folder_importable(_command(arguments) in (*_RUNS, *_IMPORTING)):
            return run()
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as exit_:
        return _exit_status(exit_)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _command(arguments) not in _RUNS:
            return _without_reader()
        if is_completing():
            return 2  # the shell would print the message into the command line
        if debug:
            raise
        _report(error, arguments)
        return 2


@contextlib.contextmanager
def current_folder_importable(allowed: bool = True) -> Iterator[None]:
    """Let modules in the current folder be imported, as in a script that is there, or let none of them.

    Args:
        allowed: Whether they may be. What only reads files must not run those of a folder that was downloaded,
            whose names may be those of libraries; ``python -m`` would let it.
    """
    before, here = list(sys.path), ("", str(Path.cwd()))
    if not allowed:
        sys.path[:] = [folder for folder in sys.path if folder not in here]
    elif not {*here} & {*sys.path}:
        sys.path.insert(0, here[1])
    try:
        yield
    finally:
        sys.path[:] = before


def describe(error: Exception) -> str:
    """Say what happened, without what only a programmer of the parser wants to know.

    Args:
        error: The exception.

    Example:
        >>> describe(FileNotFoundError("There is no record file 'r.txt'."))
        "There is no record file 'r.txt'."
    """
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, argparse.ArgumentError):
        return _without_noise(text)
    # by name: this module does not import Lightning
    of_lightning = "MisconfigurationException" in (kind.__name__ for kind in type(error).__mro__)
    usual = of_lightning or type(error) in (ValueError, TypeError, RuntimeError, ImportError, ModuleNotFoundError)
    expected = isinstance(error, (UserError, OSError)) or (text and usual)
    return text if expected and not _own_frame(error) else f"{type(error).__name__}: {text}"


def _without_noise(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not _NOISE.fullmatch(line)]
    kept = [re.sub(r"^- ", "", line.strip()) for line in (lines if len(lines) > 1 else text.splitlines())]
    return re.sub(r'Parser key "([^"]+)":', r"\1:", " ".join(kept)).replace(" Given value:", ", given")


def _report(error: Exception, arguments: Sequence[str]) -> None:
    command = _command(arguments)
    name = f"{PROGRAM} {command}" if command in (*_RUNS, *_OTHERS) else PROGRAM
    text = describe(error).replace(f"required: {command}.", "required: --")  # as the user would write it
    lines = [f"{name}: error: {text}"]
    frame = _own_frame(error)
    if frame is not None:
        lines.append(f"It was raised in {frame.name}, line {frame.lineno} of '{frame.filename}'.")
    if isinstance(error, argparse.ArgumentError):
        lines.append(f"'{name} --help' lists and explains the options.")
    elif frame is not None and command in _RUNS:
        lines.append(f"The traceback is in '{_keep_traceback(error)}'; with --debug it is shown here.")
    elif not isinstance(error, UserError):
        lines.append("Add --debug to see the traceback.")
    sys.stderr.write("\n".join(printable(line) for text in lines for line in text.splitlines()) + "\n")


def _command(arguments: Sequence[str]) -> str:
    return next((word for word in arguments if not word.startswith("-")), "")


def _own_frame(error: Exception) -> traceback.FrameSummary | None:
    """Return where the error came out of the user's own code, if it did."""
    paths = sysconfig.get_paths()
    foreign = tuple({paths["stdlib"], paths["purelib"], paths["platlib"], str(Path(__file__).parents[1])})
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((*foreign, "<")) and "site-packages" not in f.filename]
    outer = [f for f in frames if f.filename == __file__]
    begin = frames.index(outer[-1]) if outer else 0  # what is above is who called the command
    return next((frame for frame in reversed(own) if frames.index(frame) > begin), None)


def _keep_traceback(error: Exception) -> str:
    """Write the traceback of a run, which may have taken hours, to a file."""
    descriptor, path = tempfile.mkstemp(prefix=f"{PROGRAM}-", suffix=".log")
    with os.fdopen(descriptor, "w") as file:
        file.writelines(traceback.format_exception(error))
    return path


def _exit_status(exit_: SystemExit) -> int:
    if isinstance(exit_.__context__, KeyboardInterrupt):  # Lightning ends a run that way
        return INTERRUPTED
    if type(exit_).__name__ == "SIGTERMException":  # Lightning's as well; it has no status of its own
        return TERMINATED
    if exit_.code is None or isinstance(exit_.code, int):
        return exit_.code or 0
    sys.stderr.write(f"{exit_.code}\n")
    return 1


def _without_reader() -> int:
    """End quietly when nobody reads stdout any more, as after ``... | head``; let nothing try to write there again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return PIPE_CLOSED
