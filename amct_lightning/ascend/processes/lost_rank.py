"""The end of a process that would wait for a rank that is gone."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

# A rank whose collective fails by itself has this long to come out of the run, with its traceback; then it is ended.
PATIENCE = 5.0
_LONGEST_SAVING = 300.0


class LostRank:
    """Ends this process if it does not leave its run soon after another rank is gone.

    Args:
        patience: Seconds that the main thread gets to come out of the run by itself.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self.message: str | None = None
        self.reported = threading.Event()
        self.saving = threading.Lock()
        self._patience = patience
        self._out = threading.Event()

    def report(self, message: str) -> None:
        """Say that a rank is gone; the first one counts, what follows is its consequence.

        Args:
            message: Who it was, and why.
        """
        if self.message is None and not self._out.is_set():
            self.message = message
            self.reported.set()
            threading.Thread(target=self._end, name="lost-rank", daemon=True).start()

    def run_is_over(self) -> None:
        """Say that the main thread is out of the run: there is nothing to end any more."""
        self._out.set()

    def _end(self) -> None:
        if self._out.wait(self._patience):
            return
        waited = self.saving.acquire(timeout=_LONGEST_SAVING)  # what is being written to a file is finished
        if self._out.is_set():
            if waited:
                self.saving.release()
            return
        end_process(f"{self.message}\nThis process ends too: it would wait for that rank.")


def end_process(message: str) -> None:
    """End this process although its main thread is in a call that does not return.

    Args:
        message: Why, for stderr.
    """
    speaker = threading.Thread(target=say, args=(message,), daemon=True)
    speaker.start()
    speaker.join(PATIENCE)  # a pipe that nobody reads does not keep this process
    os._exit(1)


def say(message: str) -> None:
    """Write to stderr, on every rank.

    Args:
        message: What is to be said.
    """
    with suppress(OSError, ValueError):  # closed streams
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)  # noqa: T201
