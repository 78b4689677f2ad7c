# PYTHON_ARGCOMPLETE_OK
"""The command ``amct-lightning``: what it is given is handed to one of ``amct_lightning/commands/``.

:class:`QuantCLI` is here for scripts of your own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from amct_lightning.commands import dispatch
from amct_lightning.commands.errors import guarded

if TYPE_CHECKING:
    from amct_lightning.commands.quant_cli import QuantCLI
else:

    def __getattr__(name: str) -> Any:
        """Load QuantCLI when a script asks for it: it takes Lightning, and most commands do without."""
        if name != "QuantCLI":
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        from amct_lightning.commands.quant_cli import QuantCLI  # noqa: PLC0415

        return QuantCLI


__all__ = ["QuantCLI", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments after the name of the command; ``None`` takes those of the process.

    Returns:
        The exit status: 0 if all went well, 1 if ``record check``, ``record diff`` or the verification of an export
        found something, 2 after an error, which then stands on stderr in one message, 130 after Ctrl-C, 143 after
        SIGTERM.

    Example:
        >>> main(["--version"])  # doctest: +ELLIPSIS
        amct-lightning ...
        0
    """
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = [argument for argument in given if argument != "--debug"]
    return guarded(lambda: dispatch(arguments), arguments, debug=len(arguments) < len(given))
