"""Which server of a rank table this process runs on: the names of this host, and the variables of the schedulers."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from amct_lightning.ascend.cluster.rank_table import RankTable, Server
from amct_lightning.ascend.cluster.rank_table_entry import as_address, rank_table_error
from amct_lightning.wording import abbreviated

# MindCluster's job templates set XDL_IP (address of the host) and POD_UID, POD_IP; ModelArts sets the MA_ ones.
NAME_VARIABLES = ("POD_UID", "POD_IP", "XDL_IP", "MA_CURRENT_HOST_IP", "MA_CURRENT_IP")
# Number of the node: Lightning's and torchrun's name for it, Volcano's and ModelArts' name for it.
INDEX_VARIABLES = ("NODE_RANK", "VC_TASK_INDEX")
_LOCAL_IPV4 = re.compile(r"\|-- ([0-9.]+)\n[^\n]*/32 host LOCAL")


def host_names(proc_net: str | Path = "/proc/net") -> tuple[str, ...]:
    """Names and addresses of this host, from the kernel's tables: no name server is asked.

    Args:
        proc_net: Where the kernel lists the addresses of the network interfaces.

    Returns:
        The host name, its first part, and the addresses of this host. Where the tables cannot be read there are no
        addresses.

    Example:
        >>> socket.gethostname() in host_names()
        True
    """
    name = socket.gethostname()
    addresses = _LOCAL_IPV4.findall(_read(Path(proc_net) / "fib_trie"))
    for line in _read(Path(proc_net) / "if_inet6").splitlines():
        digits = line.split()[0]
        addresses.append(":".join(digits[start : start + 4] for start in range(0, 32, 4)))
    return tuple(dict.fromkeys([name, name.split(".")[0], *map(_normal, addresses)]))


@dataclass(frozen=True)
class Candidates:
    """Servers of a table that are this host, as far as names and addresses can tell.

    Attributes:
        table: The rank table.
        servers: Indices of the servers; empty if none is.
        evidence: What they were compared with, for messages: where it comes from, and the name.
    """

    table: RankTable
    servers: tuple[int, ...]
    evidence: Mapping[str, str]

    def error(self, allowed: str) -> ValueError:
        """The error for a table in which this host is not, or more than once.

        Args:
            allowed: A sentence: what is allowed, and what to do.

        Returns:
            The error, to be raised by the caller.
        """
        shown = [self.table.servers[index].server_id for index in self.servers or range(len(self.table.servers))]
        which = ("none of them is", "which is", "each of them is")[min(len(self.servers), 2)]
        evidence = "; ".join(f"{name}: {value}" for name, value in self.evidence.items())
        return rank_table_error(
            self.table.file,
            "server_list[].server_id",
            f"found [{abbreviated(shown)}], {which} this host ({evidence})",
            allowed,
        )


def candidates(table: RankTable, names: Sequence[str], server_id: str | None = None) -> Candidates:
    """Compare the servers of a table with this host, from the strongest evidence to the weakest.

    First ``server_id`` or the variable ``SERVER_ID``, which must be in the table; then the names that the scheduler
    gives this host in variables; then the host's own names and addresses.

    Args:
        table: The rank table.
        names: Names and addresses of this host.
        server_id: The server's ``server_id``, where it is known.

    Returns:
        The servers that the first evidence with any success points to.

    Raises:
        ValueError: If ``server_id`` or ``SERVER_ID`` is not in the table.

    Example:
        >>> from amct_lightning.ascend.cluster.rank_table import Device
        >>> servers = (Server("node_0", (Device(0, 0),)), Server("node_1", (Device(1, 0),)))
        >>> candidates(RankTable("hccl.json", servers), ["worker-1"], server_id="node_1").servers
        (1,)
    """
    stated = server_id or os.environ.get("SERVER_ID")
    if stated:
        found = Candidates(table, _matching(table, [stated]), {"server_id" if server_id else "SERVER_ID": stated})
        if not found.servers:
            raise found.error(f"Allowed is one of the table's: correct {'server_id' if server_id else 'SERVER_ID'}.")
        return found
    variables = {name: os.environ[name] for name in NAME_VARIABLES if os.environ.get(name)}
    found = Candidates(table, _matching(table, variables.values()), variables)
    if found.servers:
        return found
    own = [name for name in names if len(table.servers) == 1 or not _is_loopback(name)]
    return Candidates(table, _matching(table, own), {**variables, "this host": ", ".join(own)})


def find_server(table: RankTable, names: Sequence[str], server_id: str | None = None) -> int:
    """The index of this host's server: the only one of the ``candidates``.

    Where the table has names of its own choice (such as ``node_0``) and no addresses, so that nothing can be
    compared, the number of the node in ``NODE_RANK`` or ``VC_TASK_INDEX`` tells.

    Args:
        table: The rank table.
        names: Names and addresses of this host.
        server_id: The server's ``server_id``, where it is known.

    Returns:
        The index of the server in ``table.servers``: the node rank.

    Raises:
        ValueError: If no server of the table is this host, or the evidence points to several.

    Example:
        >>> from amct_lightning.ascend.cluster.rank_table import Device
        >>> servers = (Server("10.0.0.1", (Device(0, 0),), ("10.0.0.1",)), Server("10.0.0.2", (Device(1, 0),)))
        >>> find_server(RankTable("hccl.json", servers), ["worker-1", "10.0.0.2"])
        1
    """
    found = candidates(table, names, server_id)
    if len(found.servers) == 1:
        return found.servers[0]
    if found.servers:
        raise found.error("Allowed is one: set SERVER_ID to this host's 'server_id'.")
    if not any(server.addresses for server in table.servers):
        for variable in INDEX_VARIABLES:
            if os.environ.get(variable):
                return environment_number(variable, len(table.servers), f"the servers of '{table.file}'")
    raise found.error(
        "Allowed is a table with this host in it: point RANK_TABLE_FILE to the table of this job, or set SERVER_ID to "
        "this host's 'server_id'."
    )


def environment_number(variable: str, end: int, meaning: str, start: int = 0) -> int:
    """The value of a variable of the environment that must be a whole number in a range.

    Args:
        variable: Name of the variable, which is set.
        end: The first number that is too large.
        meaning: What the range stands for, for the message.
        start: The smallest number that is allowed.

    Returns:
        The number.

    Raises:
        ValueError: If it is no number, or out of range.

    Example:
        >>> os.environ["EXAMPLE_RANK"] = "3"
        >>> environment_number("EXAMPLE_RANK", 8, "the devices of a server")
        3
        >>> del os.environ["EXAMPLE_RANK"]
    """
    text = os.environ[variable].strip()
    if not re.fullmatch(r"[0-9]{1,9}", text) or not start <= int(text) < end:
        raise ValueError(
            f"The environment variable {variable} is {text!r}. Allowed are whole numbers from {start} to {end - 1} "
            f"({meaning}): correct it, or unset it."
        )
    return int(text)


def _matching(table: RankTable, names: Iterable[str]) -> tuple[int, ...]:
    wanted = {_normal(name) for name in names}
    return tuple(index for index, server in enumerate(table.servers) if wanted & _names(server))


def _names(server: Server) -> set[str]:
    return {_normal(name) for name in (server.server_id, *server.addresses)}


def _normal(name: str) -> str:
    return as_address(name.strip()) or name.strip().casefold()


def _is_loopback(name: str) -> bool:
    address = as_address(name)
    return address is not None and ipaddress.ip_address(address).is_loopback


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):  # another operating system, or a container that hides it
        return ""
