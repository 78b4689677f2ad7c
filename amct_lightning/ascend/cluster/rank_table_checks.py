"""What must hold between the entries of a rank table: it may not contradict itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from amct_lightning.ascend.cluster.rank_table_entry import rank_table_error

if TYPE_CHECKING:
    from amct_lightning.ascend.cluster.rank_table import Server

_MOST_SHOWN = 8


def check_table(file: str, servers: Sequence[Server], pods: Mapping[str, str]) -> None:
    """Refuse a table that contradicts itself, or that Lightning's numbering of processes cannot express.

    Args:
        file: The file, for messages.
        servers: The servers in the order of the file, each with its devices in the order of their ranks.
        pods: Super pod of each server; empty if the table has none.

    Raises:
        ValueError: If an identity occurs twice, ranks have gaps, servers differ in their number of devices or have
            ranks that do not follow each other, or the super pods do not hold exactly the servers.

    Example:
        >>> from amct_lightning.ascend.cluster.rank_table import Device, Server
        >>> check_table("hccl.json", [Server("a", (Device(0, 0), Device(2, 1)))], {})
        Traceback (most recent call last):
        ...
        ValueError: Rank table 'hccl.json', key 'server_list[].device[].rank_id': found [0, 2] on 2 devices, [1] \
missing. Allowed are the ranks from 0 to 1, each once.
    """
    _check_unique(file, "server_list[].server_id", [server.server_id for server in servers])
    for server in servers:
        ids = [device.device_id for device in server.devices]
        _check_unique(file, "server_list[].device[].device_id", ids, f" on server {server.server_id!r}")
    devices = [device for server in servers for device in server.devices]
    _check_unique(file, "server_list[].device[].device_ip", [ip for device in devices for ip in device.device_ips])
    _check_ranks(file, [device.rank for device in devices])
    _check_blocks(file, servers)
    _check_super_pods(file, servers, pods)


def _check_unique(file: str, key: str, values: Iterable[object], where: str = "") -> None:
    seen: set[object] = set()
    for value in values:
        if value in seen:
            raise rank_table_error(file, key, f"found {value!r} twice{where}", "Each must be there once.")
        seen.add(value)


def _check_ranks(file: str, ranks: Sequence[int]) -> None:
    key = "server_list[].device[].rank_id"
    _check_unique(file, key, ranks)
    missing = sorted(set(range(len(ranks))) - set(ranks))
    if missing:
        raise rank_table_error(
            file,
            key,
            f"found {_some(sorted(ranks))} on {len(ranks)} devices, {_some(missing)} missing",
            f"Allowed are the ranks from 0 to {len(ranks) - 1}, each once.",
        )


def _check_blocks(file: str, servers: Sequence[Server]) -> None:
    counts = {server.server_id: len(server.devices) for server in servers}
    if len(set(counts.values())) > 1:
        least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        raise rank_table_error(
            file,
            "server_list[].device",
            f"found {counts[least]} devices on server {least!r} and {counts[most]} on {most!r}",
            "Trainer(devices=...) is one number for all servers: each must have the same number of devices.",
        )
    for server in servers:
        ranks = [device.rank for device in server.devices]
        if ranks[0] % len(ranks) or ranks[-1] - ranks[0] != len(ranks) - 1:
            raise rank_table_error(
                file,
                "server_list[].device[].rank_id",
                f"found the ranks {_some(ranks)} on server {server.server_id!r}",
                f"Lightning numbers the processes server by server: allowed are {len(ranks)} ranks that follow each "
                f"other, from a multiple of {len(ranks)} on.",
            )


def _check_super_pods(file: str, servers: Sequence[Server], pods: Mapping[str, str]) -> None:
    if not pods:
        return
    names = {server.server_id for server in servers}
    key = "super_pod_list[].server_list[].server_id"
    for wrong, found, allowed in (
        (sorted(set(pods) - names), "which 'server_list' does not have", "Allowed are the servers of 'server_list'."),
        (sorted(names - set(pods)), "of 'server_list' in no super pod", "Each server must be in one super pod."),
    ):
        if wrong:
            raise rank_table_error(file, key, f"found {_some(wrong)}, {found}", allowed)
    devices = [(pods[server.server_id], device.super_device_id) for server in servers for device in server.devices]
    known = [identity for identity in devices if identity[1] is not None]
    _check_unique(file, "(super_pod_id, super_device_id)", known)


def _some(values: Sequence[object]) -> str:
    more = ", ..." if len(values) > _MOST_SHOWN else ""
    return f"[{', '.join(map(repr, values[:_MOST_SHOWN]))}{more}]"
