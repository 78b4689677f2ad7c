"""Any valid table is read as it was meant; whatever else a file holds, the error is a ValueError that names it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amct_lightning.ascend.cluster.rank_table import RankTable, parse_rank_table

NAME = "folder/ranks.json"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["0", "1", "1.2"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def valid_tables(draw: st.DrawFn) -> tuple[dict[str, Any], list[tuple[str, list[tuple[int, int]]]]]:
    """A table, and what it means: for each server in the order of ranks its id and (rank, device id)."""
    count, size = draw(st.integers(1, 5)), draw(st.integers(1, 16))
    name = st.from_regex(r"[a-z][a-z0-9_-]{0,9}", fullmatch=True) | st.ip_addresses().map(str)
    names = draw(st.lists(name, min_size=count, max_size=count, unique=True))
    pods = draw(st.lists(st.sampled_from(["0", "1", "pod"]), min_size=count, max_size=count))
    version = draw(st.sampled_from(["1.0", "1.2"]))
    with_pods = version == "1.2" and draw(st.booleans())
    servers, meaning = [], []
    for node, server_id in enumerate(names):
        ids = draw(st.permutations(range(16)))[:size]
        ranks = range(node * size, (node + 1) * size)
        devices = [
            {"rank_id": str(rank), "device_id": str(device), "device_ip": f"10.{node}.0.{device}"}
            for rank, device in zip(ranks, ids, strict=True)
        ]
        servers.append({"server_id": server_id, "device": draw(st.permutations(devices)), "host_nic_ip": "reserve"})
        meaning.append((server_id, list(zip(ranks, ids, strict=True))))
    made = {"version": version, "status": "completed", "server_list": draw(st.permutations(servers))}
    if draw(st.booleans()):
        made["server_count"] = draw(st.sampled_from([str(count), count]))
    if with_pods:
        members = {pod: [{"server_id": n} for n, of in zip(names, pods, strict=True) if of == pod] for pod in pods}
        made["super_pod_list"] = [{"super_pod_id": pod, "server_list": listed} for pod, listed in members.items()]
    return made, meaning


def _meaning(read: RankTable) -> list[tuple[str, list[tuple[int, int]]]]:
    return [
        (server.server_id, [(device.rank, device.device_id) for device in server.devices]) for server in read.servers
    ]


@given(valid_tables())
@settings(max_examples=100, deadline=None)
def test_a_valid_table_is_read_as_it_was_meant(made: tuple[dict[str, Any], list[Any]]) -> None:
    content, meaning = made
    read = parse_rank_table(json.dumps(content, indent=2).encode(), NAME)
    assert _meaning(read) == meaning


def _places(value: object) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return [place for key in value for place in [(value, key), *_places(value[key])]]
    if isinstance(value, list):
        return [place for index, item in enumerate(value) for place in [(value, index), *_places(item)]]
    return []


@given(valid_tables(), st.data())
@settings(max_examples=300, deadline=None)
def test_a_changed_table_is_read_or_refused_with_the_files_name(
    made: tuple[dict[str, Any], list[Any]], data: st.DataObject
) -> None:
    content = copy.deepcopy(made[0])
    for _ in range(data.draw(st.integers(1, 3))):
        places = _places(content)
        if not places:
            break
        container, key = data.draw(st.sampled_from(places))
        if data.draw(st.booleans()):
            del container[key]
        else:
            container[key] = data.draw(JSON)
    try:
        read = parse_rank_table(json.dumps(content).encode(), NAME)
    except ValueError as error:
        assert NAME in str(error)
        return
    assert [device.rank for server in read.servers for device in server.devices] == list(range(read.world_size))
    assert {len(server.devices) for server in read.servers} == {read.devices_per_server}
    assert len({server.server_id for server in read.servers}) == len(read.servers) == len(content["server_list"])


@given(valid_tables(), st.data())
@settings(max_examples=100, deadline=None)
def test_two_devices_never_share_a_rank(made: tuple[dict[str, Any], list[Any]], data: st.DataObject) -> None:
    devices = [device for server in made[0]["server_list"] for device in server["device"]]
    if len(devices) < 2:
        return
    first, second = data.draw(st.permutations(devices))[:2]
    first["rank_id"] = second["rank_id"]
    with pytest.raises(ValueError, match=r"folder/ranks\.json.*rank_id.* twice"):
        parse_rank_table(json.dumps(made[0]).encode(), NAME)


@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=200, deadline=None)
def test_no_other_content_is_taken_for_a_table(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"folder/ranks\.json"):
        parse_rank_table(content, NAME)


@given(valid_tables(), st.data())
@settings(max_examples=100, deadline=None)
def test_a_damaged_file_is_read_or_refused_with_its_name(
    made: tuple[dict[str, Any], list[Any]], data: st.DataObject
) -> None:
    content = bytearray(json.dumps(made[0]).encode())
    start = data.draw(st.integers(0, len(content) - 1))
    content[start : start + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=4))
    try:
        parse_rank_table(bytes(content), NAME)
    except ValueError as error:
        assert NAME in str(error)
