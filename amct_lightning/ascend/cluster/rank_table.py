"""Reading the rank table of HCCL, version 1.0 and 1.2, as Ascend's schedulers write it.

A rank table says which servers and which of their devices take part in a job, and which rank each device has. What
this process is within the table is not decided here, but in ``host.py``. What only HCCL needs is not kept.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from amct_lightning.ascend.cluster.rank_table_checks import check_table
from amct_lightning.ascend.cluster.rank_table_entry import Entry, as_address, rank_table_error, shown

VERSIONS = ("1.0", "1.2")
# ModelArts gives the folder of the file, MindCluster and CCE mount it under these names.
FILE_NAMES = ("jobstart_hccl.json", "hccl.json", "ranktable.json")
# The pod's own address comes first: the host's is not reachable from other pods without the host's network.
ADDRESS_KEYS = ("container_ip", "server_ip", "host_ip")
_POLL_SECONDS = 1.0


class RankTableNotReady(ValueError):  # noqa: N818 - a state that passes, named for what it is
    """The scheduler has not finished the rank table yet."""


@dataclass(frozen=True)
class Device:
    """One device of a server.

    Attributes:
        rank: Rank of the process that drives the device.
        device_id: Physical number of the device within its server.
    """

    rank: int
    device_id: int


@dataclass(frozen=True)
class Server:
    """One server (or pod) with its devices.

    Attributes:
        server_id: What the table calls it: an address, or any name.
        devices: Its devices in the order of their ranks.
        addresses: Addresses of the server, the one that other servers reach it by first.
    """

    server_id: str
    devices: tuple[Device, ...]
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True)
class RankTable:
    """A rank table that has passed all checks.

    Attributes:
        file: The file that it was read from.
        servers: The servers in the order of their ranks: the index of a server is its node rank.
    """

    file: str
    servers: tuple[Server, ...]

    @property
    def devices_per_server(self) -> int:
        """Number of devices of each server; all have the same number."""
        return len(self.servers[0].devices)

    @property
    def world_size(self) -> int:
        """Number of devices of all servers."""
        return len(self.servers) * self.devices_per_server


def read_rank_table(path: str | Path, timeout: float = 0.0) -> RankTable:
    """Read and check a rank table.

    Args:
        path: The file, or the folder that holds ``jobstart_hccl.json``, ``hccl.json`` or ``ranktable.json``.
        timeout: Seconds to wait for a scheduler that has not finished the table: the file is missing or empty, or
            its status is ``initializing``.

    Returns:
        The table.

    Raises:
        ValueError: If the content is no valid rank table, or contradicts itself.
        RankTableNotReady: If the table is still not complete after ``timeout`` seconds; it is a ``ValueError``.
        OSError: If the file cannot be read.

    Example:
        >>> import json, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "hccl.json"
        >>> devices = [{"device_id": "0", "rank_id": "0"}, {"device_id": "1", "rank_id": "1"}]
        >>> table = {"version": "1.0", "status": "completed", "server_count": "1"}
        >>> table["server_list"] = [{"server_id": "10.0.0.1", "device": devices}]
        >>> _ = path.write_text(json.dumps(table))
        >>> read_rank_table(path).world_size
        2
    """
    end = time.monotonic() + timeout
    while True:
        try:
            return parse_rank_table(_read(Path(path)), str(path))
        except (RankTableNotReady, FileNotFoundError):
            left = end - time.monotonic()
            if left <= 0:
                raise
            time.sleep(min(_POLL_SECONDS, left))


def parse_rank_table(content: bytes, file: str) -> RankTable:
    """Check the content of a rank table.

    Args:
        content: What stands in the file.
        file: The file's name, for messages.

    Returns:
        The table.

    Raises:
        ValueError: If the content is no valid rank table, or contradicts itself.

    Example:
        >>> parse_rank_table(b"{}", "hccl.json")
        Traceback (most recent call last):
        ...
        ValueError: Rank table 'hccl.json', key 'status': it is missing. It must be there.
    """
    root = Entry(file, "", _load(content, file))
    _check_form(root)
    _check_status(root.child("status"))
    version = root.child("version")
    if version.value not in VERSIONS:
        raise version.error(f"Allowed are {' and '.join(map(repr, VERSIONS))}, in quotes.")
    entries = root.child("server_list").items()
    count = root.optional("server_count")  # HCCL takes the length of the list where it is missing
    if count is not None and count.number() != len(entries):
        raise count.error(f"'server_list' has {len(entries)} entries: both must be the same.")
    check_table(entries, _super_pods(root) if version.value == "1.2" else {})
    servers = sorted(map(_server, entries), key=lambda server: server.devices[0].rank)
    return RankTable(file, tuple(servers))


def _read(path: Path) -> bytes:
    if path.is_dir():
        files = [path / name for name in FILE_NAMES if (path / name).is_file()]
        if not files:
            raise FileNotFoundError(f"The folder '{path}' has no rank table. Allowed names: {', '.join(FILE_NAMES)}.")
        return files[0].read_bytes()
    if path.exists() and not path.is_file():
        raise OSError(f"The rank table '{path}' is neither a file nor a folder.")
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The rank table '{path}' does not exist. Give the path of the file that the scheduler writes, or unset "
            f"the variable to train without a rank table."
        ) from error


def _load(content: bytes, file: str) -> object:
    if not content.strip():
        raise RankTableNotReady(f"Rank table '{file}': it is empty. Wait until the scheduler has written it.")
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise rank_table_error(
            file,
            "",
            f"it is not valid JSON ({error})",
            "Allowed is UTF-8 text in JSON without comments, with each key once in an object.",
        ) from error


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(next(key for key in keys if keys.count(key) > 1))} occurs twice")
    return found


def _check_form(root: Entry) -> None:
    for key, found, allowed in (
        (
            "group_list",
            "found the form with groups and without ranks (ModelArts' template 2)",
            "Allowed is the form with 'server_list', version 1.0 or 1.2: point RANK_TABLE_FILE to it; ModelArts names "
            "one in RANK_TABLE_FILE_V_1_0 where it has made it.",
        ),
        (
            "server_group_list",
            "found a global rank table of several jobs",
            "Allowed is the table of one job, with 'server_list' at the top (hccl.json).",
        ),
    ):
        if root.optional(key) is not None:
            raise rank_table_error(root.file, key, found, allowed)


def _check_status(status: Entry) -> None:
    if status.value == "initializing":
        raise RankTableNotReady(
            f"Rank table '{status.file}', key 'status': found 'initializing'. Allowed is 'completed': wait until the "
            f"scheduler has finished the table, for example with AscendClusterEnvironment(timeout=300)."
        )
    if status.value != "completed":
        raise status.error("Allowed is 'completed'.")


def _server(entry: Entry) -> Server:
    server_id = entry.child("server_id").text()
    devices = [
        Device(item.child("rank_id").number(), item.child("device_id").number())
        for item in entry.child("device").items()
    ]
    found = [address for key in ADDRESS_KEYS for address in entry.addresses(key)]
    nic = entry.optional("host_nic_ip")  # 'reserve' where it is not used
    candidates = (nic.value if nic is not None else None, server_id)
    found += [known for text in candidates if isinstance(text, str) and (known := as_address(text)) is not None]
    return Server(server_id, tuple(sorted(devices, key=lambda device: device.rank)), tuple(dict.fromkeys(found)))


def _super_pods(root: Entry) -> dict[str, str]:
    """Super pod of each server; empty where the table has none, which HCCL allows."""
    pods: dict[str, str] = {}
    listed = root.optional("super_pod_list")
    names: set[str] = set()
    for pod in listed.items() if listed is not None else []:
        name = pod.child("super_pod_id")
        if name.text() in names:
            raise name.error("Each super pod must be listed once.")
        names.add(name.text())
        for server in pod.child("server_list").items():
            server_id = server.child("server_id")
            if server_id.text() in pods:
                raise server_id.error(f"The server is in super pod {pods[server_id.text()]!r} already: list it once.")
            pods[server_id.text()] = name.text()
    return pods
