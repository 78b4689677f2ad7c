"""Reading rank tables: what valid ones give, and which contradictions are refused with which words."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from amct_lightning.ascend.cluster.rank_table import Device, RankTableNotReady, read_rank_table
from tests.ascend.cluster.tables import super_pod_table, table, write


def test_version_1_0_gives_servers_devices_and_ranks(tmp_path: Path) -> None:
    read = read_rank_table(write(tmp_path, table()))
    assert (read.world_size, read.devices_per_server) == (4, 2)
    assert [server.server_id for server in read.servers] == ["10.0.0.1", "10.0.0.2"]
    assert read.servers[1].devices == (Device(2, 0), Device(3, 1))
    assert read.servers[1].addresses == ("10.0.0.2",)


def test_version_1_2_gives_host_addresses(tmp_path: Path) -> None:
    read = read_rank_table(write(tmp_path, super_pod_table()))
    assert read.servers[3].addresses == ("172.16.0.103",)


def test_servers_are_in_the_order_of_their_ranks_and_not_of_the_file(tmp_path: Path) -> None:
    content = table()
    content["server_list"].reverse()
    content["server_list"][0]["device"].reverse()
    read = read_rank_table(write(tmp_path, content))
    assert [server.server_id for server in read.servers] == ["10.0.0.1", "10.0.0.2"]
    assert [device.rank for server in read.servers for device in server.devices] == [0, 1, 2, 3]


def test_the_address_of_the_pod_comes_before_that_of_its_host(tmp_path: Path) -> None:
    content = table(1)
    content["server_list"][0] |= {"container_ip": "192.168.247.11", "host_nic_ip": "reserve"}
    assert read_rank_table(write(tmp_path, content)).servers[0].addresses == ("192.168.247.11", "10.0.0.1")


def test_what_hccl_does_not_need_may_be_missing(tmp_path: Path) -> None:
    content = table(1)
    del content["server_count"]
    for device in content["server_list"][0]["device"]:
        del device["device_ip"]
    assert read_rank_table(write(tmp_path, content)).world_size == 2


def test_numbers_without_quotes_are_read_too(tmp_path: Path) -> None:
    content = table(1)
    content["server_count"] = 1
    content["server_list"][0]["device"][0] |= {"device_id": 0, "rank_id": 0}
    assert read_rank_table(write(tmp_path, content)).world_size == 2


@pytest.mark.parametrize("name", ["jobstart_hccl.json", "hccl.json"])
def test_a_folder_stands_for_the_table_in_it(tmp_path: Path, name: str) -> None:
    write(tmp_path, table(), name)
    assert read_rank_table(tmp_path).world_size == 4


def test_a_folder_without_a_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no rank table\. Allowed names: jobstart_hccl\.json"):
        read_rank_table(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'.*nothing\.json' does not exist\. .* unset the variable"):
        read_rank_table(tmp_path / "nothing.json")


def _change(content: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place: Any = content
    for part in parents:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("status", "failed", "key 'status': found 'failed'. Allowed is 'completed'."),
        ("status", None, "key 'status': it is missing."),
        ("version", "2.0", "key 'version': found '2.0'. Allowed are '1.0' and '1.2', in quotes."),
        ("version", 1.0, "key 'version': found 1.0."),
        ("version", ["1.0"], "key 'version': found a list of 1 entries."),
        ("version", None, "key 'version': it is missing."),
        ("server_count", "3", "key 'server_count': found '3'. 'server_list' has 2 entries"),
        ("server_count", "two", "key 'server_count': found 'two'. Allowed is a whole number"),
        ("server_count", True, "key 'server_count': found True."),
        ("server_list", [], "key 'server_list': found a list of 0 entries. Allowed is a list with at least one"),
        ("server_list", {}, "key 'server_list': found an object."),
        ("server_list.1", "10.0.0.2", "key 'server_list[1]': found '10.0.0.2'. Allowed is an object"),
        ("server_list.1.server_id", "10.0.0.1", "key 'server_list[].server_id': found '10.0.0.1' twice."),
        ("server_list.1.server_id", " ", "key 'server_list[1].server_id': found ' '. Allowed is a text in quotes"),
        ("server_list.1.server_id", None, "key 'server_list[1].server_id': it is missing."),
        ("server_list.1.host_ip", "node_1", "key 'server_list[1].host_ip': found 'node_1'. Allowed is an IPv4"),
        ("server_list.1.device.0.rank_id", "0", "rank_id': found 0 twice. Each must be there once."),
        ("server_list.1.device.1.rank_id", "4", "found [0, 1, 2, 4] on 4 devices, [3] missing. Allowed are the ranks"),
        ("server_list.1.device.1.rank_id", "-1", "key 'server_list[1].device[1].rank_id': found '-1'."),
        ("server_list.1.device.1.rank_id", "9" * 5000, "key 'server_list[1].device[1].rank_id': found '999"),
        ("server_list.1.device.1.rank_id", 10**30, "key 'server_list[1].device[1].rank_id': found 1000"),
        ("server_list.1.device.1.device_id", "0", "device_id': found 0 twice on server '10.0.0.2'."),
        ("server_list.1.device.1.device_id", None, "key 'server_list[1].device[1].device_id': it is missing."),
        ("server_list.1.device.1.device_ip", "192.168.0.1", "device_ip': found '192.168.0.1' twice."),
        ("server_list.1.device.1.device_ip", "here", "key 'server_list[1].device[1].device_ip': found 'here'."),
        ("group_list", [], "key 'group_list': found the form with groups and without ranks"),
        ("server_group_list", [], "key 'server_group_list': found a global rank table of several jobs."),
    ],
)
def test_a_table_that_is_wrong_is_refused_with_file_key_and_value(
    tmp_path: Path, path: str, value: object, words: str
) -> None:
    file = write(tmp_path, _change(table(), path, value))
    with pytest.raises(ValueError) as error:
        read_rank_table(file)
    assert str(error.value).startswith(f"Rank table '{file}', key ")
    assert words in str(error.value)


def test_servers_with_different_numbers_of_devices_are_refused(tmp_path: Path) -> None:
    content = table()
    content["server_list"][0]["device"].append({"device_id": "2", "rank_id": "4"})
    with pytest.raises(ValueError, match=r"found 2 devices on server '10\.0\.0\.2' and 3 on '10\.0\.0\.1'"):
        read_rank_table(write(tmp_path, content))


def test_ranks_that_alternate_between_servers_are_refused(tmp_path: Path) -> None:
    content = table()
    content["server_list"][0]["device"][1]["rank_id"] = "2"
    content["server_list"][1]["device"][0]["rank_id"] = "1"
    with pytest.raises(ValueError, match=r"found the ranks \[0, 2\] on server '10\.0\.0\.1'.*server by server"):
        read_rank_table(write(tmp_path, content))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("super_pod_list.1.server_list.1.server_id", "node_9", r"found \['node_9'\], which 'server_list' does not"),
        ("super_pod_list.1.server_list.1.server_id", "node_0", r"found 'node_0'\. The server is in super pod '0'"),
        ("super_pod_list.1.server_list.1", None, r"found \['node_3'\], of 'server_list' in no super pod"),
        ("super_pod_list.1.super_pod_id", "0", r"super_pod_list\[1\]\.super_pod_id': found '0'"),
        ("server_list.1.device.0.super_device_id", "0", r"found \('0', 0\) twice"),
    ],
)
def test_super_pods_that_contradict_the_servers_are_refused(
    tmp_path: Path, path: str, value: object, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        read_rank_table(write(tmp_path, _change(super_pod_table(), path, value)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "it is not valid JSON"),
        (b'{"status": "completed", // done\n}', "JSON without comments"),
        (b'{"status": "completed", "status": "completed"}', "the key 'status' occurs twice"),
        (b"\xff\xfe\x00", "it is not valid JSON"),
        (b"[" * 100_000, "it is not valid JSON"),
        (b'{"server_count": ' + b"1" * 5000 + b"}", "it is not valid JSON"),
        (b"[]", "found a list of 0 entries. Allowed is an object"),
    ],
)
def test_a_file_that_is_no_table_is_refused_with_its_name(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "hccl.json"
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_rank_table(file)
    assert str(file) in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize("content", ["", '{"status": "initializing"}'])
def test_a_table_that_is_not_finished_is_refused_as_such(tmp_path: Path, content: str) -> None:
    file = tmp_path / "hccl.json"
    file.write_text(content)
    with pytest.raises(RankTableNotReady, match=r"hccl\.json.*[Ww]ait until the scheduler"):
        read_rank_table(file)


def test_with_a_timeout_the_table_is_awaited(tmp_path: Path) -> None:
    (tmp_path / "hccl.json").write_text('{"status": "initializing"}')
    finished = tmp_path / "finished.json"
    finished.write_text(json.dumps(table()))
    timer = threading.Timer(0.2, finished.replace, [tmp_path / "hccl.json"])
    timer.start()
    try:
        assert read_rank_table(tmp_path / "hccl.json", timeout=60).world_size == 4
    finally:
        timer.join()


def test_a_contradiction_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="server_count"):
        read_rank_table(write(tmp_path, table() | {"server_count": "3"}), timeout=100_000)
