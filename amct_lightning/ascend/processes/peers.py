"""How the ranks of a run notice that one of them is gone, and end instead of waiting for it.

HCCL itself says nothing when a process dies: a collective that the others have begun waits until its timeout, half an
hour by default. So every rank keeps a connection to rank 0. The operating system closes the connection of a process
that ends, however it ends, and rank 0 tells the others who it was. Nothing is sent while all is well, so a process
that computes for long, or is stopped in a debugger, is not taken for a dead one.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from amct_lightning.ascend.processes.lost_rank import LostRank, say

_CONNECT_TIMEOUT = 30.0
_LONGEST_LINE = 1 << 16
_MOST_WAITING = 1024


class Peers:
    """The connections of one rank, served by a thread of their own.

    Args:
        rank: The rank of this process.
        lost: Who to tell of a rank that is gone.
        secret: What a process has to know to be taken for a rank.
        server: On rank 0, the socket that the others connect to.
        first: On the others, the connection to rank 0.
        first_name: What rank 0 is called in messages.
    """

    def __init__(
        self,
        rank: int,
        lost: LostRank,
        secret: str,
        *,
        server: socket.socket | None = None,
        first: socket.socket | None = None,
        first_name: str = "",
    ) -> None:
        self.lost = lost
        self._rank = rank
        self._secret = secret
        self._server = server
        self._names: dict[socket.socket, str] = {}
        self._buffers: dict[socket.socket, bytes] = {}
        self._last_word: dict[str, Any] = {}
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        if server is not None:
            self._selector.register(server, selectors.EVENT_READ)
        if first is not None:
            self._add(first, first_name)
            _send(first, {"secret": secret, "name": f"Rank {rank} ({_process()})"})
        self._close_in_forked_children()
        self._thread = threading.Thread(target=self._serve, name="peers", daemon=True)
        self._thread.start()

    def leave(self, failure: str | None = None) -> None:
        """Say goodbye: this rank will not be missed.

        Args:
            failure: What went wrong in this rank, so that the others cannot go on. None if all is well.
        """
        self.lost.run_is_over()
        self._last_word = {"failure": failure}
        self._wake.close()
        self._thread.join()

    def fail(self, exception: BaseException) -> None:
        """Leave because of an exception; if another rank is the reason, that is added to it.

        Args:
            exception: What ended the run in this rank.
        """
        own = _shortened(f"{type(exception).__name__}: {exception}".removesuffix(": "))
        if isinstance(exception, RuntimeError):  # a collective may fail before the message about the other rank is here
            self.lost.reported.wait(1.0)
        message = self.lost.message
        self.leave(None if message else own)
        if message is None or own in message:  # the same has happened to all
            return
        if isinstance(exception, RuntimeError) and exception.args:
            exception.args = (f"{exception.args[0]}\n{message}", *exception.args[1:])
        else:
            say(message)

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    self._say_goodbye()
                    return
                if key.fileobj is self._server:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket):
                    self._read(key.fileobj)

    def _say_goodbye(self) -> None:
        failure = self._last_word["failure"]
        if self._rank == 0 and failure:
            self._tell({"lost": _failure_message(f"Rank 0 ({_process()})", failure)})
        else:
            self._tell(self._last_word)
        self._close()

    def _accept(self) -> None:
        assert self._server is not None
        with suppress(OSError):
            self._add(self._server.accept()[0], "")

    def _add(self, connection: socket.socket, name: str) -> None:
        _keep_alive(connection)
        self._names[connection] = name
        self._buffers[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ)

    def _remove(self, connection: socket.socket) -> str:
        self._selector.unregister(connection)
        connection.close()
        del self._buffers[connection]
        return self._names.pop(connection)

    def _read(self, connection: socket.socket) -> None:
        try:
            received = connection.recv(4096)
        except OSError:  # e.g. no answer to the kernel's own keep-alive messages: the host is down
            received = b""
        if not received:
            name = self._remove(connection)
            if name:
                self._lose(_death_message(name))
            return
        *lines, self._buffers[connection] = (self._buffers[connection] + received).split(b"\n")
        for line in lines:
            if connection in self._names and not self._understand(connection, line):
                self._remove(connection)
        if len(self._buffers.get(connection, b"")) > _LONGEST_LINE:
            self._remove(connection)

    def _understand(self, connection: socket.socket, line: bytes) -> bool:
        """Take note of a line; False if the connection is of no more use."""
        try:
            word = json.loads(line)
        except (ValueError, RecursionError):  # anybody may connect and say anything
            return False
        name = self._names[connection]
        if not isinstance(word, dict):
            return False
        if not name:
            said = word.get("secret")
            known = isinstance(said, str) and secrets.compare_digest(ascii(said), ascii(self._secret))
            self._names[connection] = str(word.get("name")) if known else ""
            return known
        if word.get("lost"):
            self._lose(str(word["lost"]))
        elif word.get("failure"):
            self._lose(_failure_message(name, str(word["failure"])))
        return False

    def _lose(self, message: str) -> None:
        if self._rank == 0:
            self._tell({"lost": message})
        self.lost.report(message)

    def _tell(self, word: dict[str, Any]) -> None:
        for connection, name in self._names.items():
            if name:
                _send(connection, word)

    def _close(self) -> None:
        for connection in (self._server, self._wake, self._woken, *self._names):
            if connection is not None:
                connection.close()
        self._selector.close()

    def _close_in_forked_children(self) -> None:
        """The workers of a DataLoader hold no connections, which would stay open when their rank is killed."""
        reference = weakref.ref(self)

        def close() -> None:
            peers = reference()
            if peers is not None:
                peers._close()

        os.register_at_fork(after_in_child=close)


def connect_peers(rank: int, address: str, share: Callable[[Any], Any]) -> Peers | None:
    """Connect this rank with the others of its run; called by all of them.

    Args:
        rank: The rank of this process.
        address: The address of the host with rank 0.
        share: Gives every rank what rank 0 calls it with.

    Returns:
        The connections; None, after a warning, where none can be made.

    Example:
        >>> peers = connect_peers(0, "127.0.0.1", lambda offer: offer)
        >>> peers.leave()
    """
    server = _listen(address) if rank == 0 else None
    port = None if server is None else server.getsockname()[1]
    port, secret, name = share((port, secrets.token_hex(16), f"Rank 0 ({_process()})"))
    if server is not None:
        return Peers(rank, LostRank(), secret, server=server)
    try:
        if port is None:
            raise OSError("no port can be opened there")
        first = socket.create_connection((address, port), timeout=_CONNECT_TIMEOUT)
    except OSError as error:
        warnings.warn(
            f"Rank {rank} is not connected with rank 0 on '{address}' (port {port}): {error}. The others do not "
            f"notice if it dies; they wait for the timeout of the process group (AscendStrategy(timeout=...)).",
            stacklevel=2,
        )
        return None
    first.settimeout(None)
    return Peers(rank, LostRank(), secret, first=first, first_name=name)


def _listen(address: str) -> socket.socket | None:
    try:
        if address == "localhost" or address.startswith("127."):
            return socket.create_server((address, 0), backlog=_MOST_WAITING)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_MOST_WAITING)
        return socket.create_server(("", 0), backlog=_MOST_WAITING)
    except OSError:
        return None


def _keep_alive(connection: socket.socket) -> None:
    """A host that is switched off closes nothing: let the kernel ask, and give up after a minute and a half."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _send(connection: socket.socket, word: dict[str, Any]) -> None:
    with suppress(OSError):  # it is gone; reading from it says so
        connection.sendall(json.dumps(word).encode() + b"\n")


def _process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _shortened(text: str, limit: int = 1000) -> str:
    return text if len(text) <= limit else text[:limit] + "..."


def _death_message(name: str) -> str:
    return (
        f"{name} has ended without a word: it was killed, or its host is down. If nobody killed it, the kernel may "
        f"have, for want of memory (dmesg tells). Start the job again: with trainer.fit(..., ckpt_path='last') it "
        f"continues from its last checkpoint."
    )


def _failure_message(name: str, failure: str) -> str:
    return f"{name} has failed: {failure}"
