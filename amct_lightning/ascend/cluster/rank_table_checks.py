"""What must hold between the entries of a rank table: it may not contradict itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from amct_lightning.ascend.cluster.rank_table_entry import Entry, rank_table_error
from amct_lightning.wording import abbreviated


def check_table(servers: Sequence[Entry], pods: Mapping[str, str]) -> None:
    """Refuse a table that contradicts itself, or that Lightning's numbering of processes cannot express.

    Args:
        servers: The entries of ``server_list``.
        pods: Super pod of each server; empty if the table has none.

    Raises:
        ValueError: If a value is malformed, an identity occurs twice, ranks have gaps, servers differ in their number
            of devices or have ranks that do not follow each other, or the super pods do not hold exactly the servers.

    Example:
        >>> devices = [{"rank_id": "0", "device_id": "0"}, {"rank_id": "2", "device_id": "1"}]
        >>> check_table([Entry("hccl.json", "server_list[0]", {"server_id": "a", "device": devices})], {})
        Traceback (most recent call last):
        ...
        ValueError: Rank table 'hccl.json', key 'server_list[].device[].rank_id': found [0, 2] on 2 devices, [1] \
missing. Allowed are the ranks from 0 to 1, each once.
    """
    file = servers[0].file
    names = [server.child("server_id").text() for server in servers]
    devices = [server.child("device").items() for server in servers]
    ranks = [sorted(device.child("rank_id").number() for device in own) for own in devices]
    numbers = [[device.child("device_id").number() for device in own] for own in devices]
    # HCCL reads the following two; the check finds what was copied and not changed
    addresses = [address for own in devices for device in own for address in device.addresses("device_ip")]
    in_pods = [
        (pods.get(name), number.number())
        for name, own in zip(names, devices, strict=True)
        for device in own
        if (number := device.optional("super_device_id")) is not None
    ]
    _check_unique(file, "server_list[].server_id", names)
    for name, own_numbers in zip(names, numbers, strict=True):
        _check_unique(file, "server_list[].device[].device_id", own_numbers, f" on server {name!r}")
    _check_unique(file, "server_list[].device[].device_ip", addresses)
    _check_ranks(file, [rank for own_ranks in ranks for rank in own_ranks])
    _check_blocks(file, dict(zip(names, ranks, strict=True)))
    if pods:
        _check_super_pods(file, set(names), pods)
        _check_unique(file, "(super_pod_id, super_device_id)", in_pods)


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
            f"found [{abbreviated(sorted(ranks))}] on {len(ranks)} devices, [{abbreviated(missing)}] missing",
            f"Allowed are the ranks from 0 to {len(ranks) - 1}, each once.",
        )


def _check_blocks(file: str, servers: Mapping[str, Sequence[int]]) -> None:
    counts = {name: len(ranks) for name, ranks in servers.items()}
    if len(set(counts.values())) > 1:
        least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        raise rank_table_error(
            file,
            "server_list[].device",
            f"found {counts[least]} devices on server {least!r} and {counts[most]} on {most!r}",
            "Trainer(devices=...) is one number for all servers: each must have the same number of devices.",
        )
    for name, ranks in servers.items():
        if ranks[0] % len(ranks) or ranks[-1] - ranks[0] != len(ranks) - 1:
            raise rank_table_error(
                file,
                "server_list[].device[].rank_id",
                f"found the ranks [{abbreviated(ranks)}] on server {name!r}",
                f"Lightning numbers the processes server by server: allowed are {len(ranks)} ranks that follow each "
                f"other, from a multiple of {len(ranks)} on.",
            )


def _check_super_pods(file: str, names: set[str], pods: Mapping[str, str]) -> None:
    for wrong, found, allowed in (
        (sorted(set(pods) - names), "which 'server_list' does not have", "Allowed are the servers of 'server_list'."),
        (sorted(names - set(pods)), "of 'server_list' in no super pod", "Each server must be in one super pod."),
    ):
        if wrong:
            key = "super_pod_list[].server_list[].server_id"
            raise rank_table_error(file, key, f"found [{abbreviated(wrong)}], {found}", allowed)
