"""The cluster environment: ranks, addresses, precedence over other launchers, and what it refuses."""

from __future__ import annotations

import pickle
import socket
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from amct_lightning.ascend.cluster.environment import AscendClusterEnvironment
from amct_lightning.ascend.cluster.host import host_names
from tests.ascend.cluster.tables import SCHEDULER_VARIABLES, named_table, super_pod_table, table, write


@pytest.fixture(autouse=True)
def _no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SCHEDULER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def _environment(folder: Path, host: str = "10.0.0.2") -> AscendClusterEnvironment:
    return AscendClusterEnvironment(write(folder, table()), host_names=[host])


@pytest.mark.parametrize("variable", ["RANK_TABLE_FILE", "RANKTABLE_FILE", "RANKTABLE"])
def test_the_table_is_found_through_each_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    assert not AscendClusterEnvironment.detect()
    monkeypatch.setenv(variable, write(tmp_path, table()))
    assert AscendClusterEnvironment.detect()
    assert AscendClusterEnvironment(host_names=["10.0.0.1"]).world_size() == 4


def test_the_variable_that_hccl_reads_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKTABLE", write(tmp_path, table(4), "other.json"))
    monkeypatch.setenv("RANK_TABLE_FILE", write(tmp_path, table()))
    assert AscendClusterEnvironment(host_names=["10.0.0.1"]).world_size() == 4


def test_without_a_table_the_error_names_the_variables() -> None:
    with pytest.raises(ValueError, match="none of RANK_TABLE_FILE, RANKTABLE_FILE, RANKTABLE"):
        AscendClusterEnvironment()


def test_torchrun_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK_TABLE_FILE", write(tmp_path, table()))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    assert TorchElasticEnvironment.detect()
    assert not AscendClusterEnvironment.detect()


@pytest.mark.parametrize(("job", "expected"), [("training", False), ("bash", True), ("interactive", True)])
def test_slurm_comes_first_unless_it_is_interactive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, expected: bool
) -> None:
    monkeypatch.setenv("RANK_TABLE_FILE", write(tmp_path, table()))
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_NAME", job)
    assert SLURMEnvironment.detect() is not expected
    assert AscendClusterEnvironment.detect() is expected


def test_ranks_follow_from_the_table_and_the_local_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = _environment(tmp_path)
    assert not environment.creates_processes_externally
    assert (environment.node_rank(), environment.local_rank(), environment.global_rank()) == (1, 0, 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert environment.creates_processes_externally
    assert (environment.node_rank(), environment.local_rank(), environment.global_rank()) == (1, 1, 3)
    assert environment.local_devices[1].device_id == 1


def test_one_process_per_device_is_known_by_its_rank_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK_ID", "3")
    monkeypatch.setenv("RANK_SIZE", "4")
    environment = AscendClusterEnvironment(write(tmp_path, table()), host_names=["unknown"])
    assert environment.creates_processes_externally
    assert (environment.node_rank(), environment.local_rank(), environment.global_rank()) == (1, 1, 3)


@pytest.mark.parametrize("value", ["2", "-1", "0,1"])
def test_a_local_rank_without_a_device_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("LOCAL_RANK", value)
    with pytest.raises(ValueError, match=rf"LOCAL_RANK is '{value}'\. Allowed are whole numbers from 0 to 1"):
        _environment(tmp_path).local_rank()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK_ID": "4"}, r"RANK_ID is '4'\. Allowed are whole numbers from 0 to 3"),
        ({"RANK_ID": "0", "RANK_SIZE": "8"}, r"RANK_SIZE is 8, but the rank table .*hccl\.json' has 4 devices"),
        (
            {"RANK_ID": "0", "SERVER_ID": "10.0.0.2"},
            r"found \['10\.0\.0\.2'\].* RANK_ID 0 belongs to server '10\.0\.0\.1'",
        ),
        (
            {"RANK_ID": "0", "XDL_IP": "10.0.0.2"},
            r"\(XDL_IP: 10\.0\.0\.2\)\. RANK_ID 0 belongs to server '10\.0\.0\.1'",
        ),
    ],
)
def test_a_rank_id_that_contradicts_the_table_or_the_host_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        AscendClusterEnvironment(write(tmp_path, table()), host_names=["unknown"])


def test_a_rank_id_that_contradicts_the_local_rank_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK_ID", "3")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="LOCAL_RANK is 0, but RANK_ID 3 is device 1"):
        _environment(tmp_path).local_rank()


@pytest.mark.parametrize(
    "variable", ["SERVER_ID", "POD_UID", "POD_IP", "XDL_IP", "MA_CURRENT_HOST_IP", "MA_CURRENT_IP"]
)
def test_what_the_scheduler_says_of_this_host_counts_more_than_its_own_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "10.0.0.2")
    assert _environment(tmp_path, "10.0.0.1").node_rank() == 1


def test_server_id_as_argument_counts_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDL_IP", "10.0.0.1")
    environment = AscendClusterEnvironment(write(tmp_path, table()), server_id="10.0.0.2", host_names=["10.0.0.1"])
    assert environment.node_rank() == 1


def test_this_host_is_found_by_its_own_name(tmp_path: Path) -> None:
    content = table()
    content["server_list"][1]["server_id"] = socket.gethostname()
    assert AscendClusterEnvironment(write(tmp_path, content)).node_rank() == 1


def test_two_spellings_of_an_address_are_the_same(tmp_path: Path) -> None:
    content = table()
    content["server_list"][1]["server_id"] = "FE80:0::0001"
    assert AscendClusterEnvironment(write(tmp_path, content), host_names=["fe80::1"]).node_rank() == 1


def test_a_table_of_other_hosts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found \['10\.0\.0\.1', '10\.0\.0\.2'\], none of them is this host \(th"):
        _environment(tmp_path, "10.0.0.3")


def test_a_server_id_that_is_not_in_the_table_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_ID", "10.0.0.9")
    with pytest.raises(ValueError, match=r"none of them is this host \(SERVER_ID: 10\.0\.0\.9\)"):
        _environment(tmp_path, "10.0.0.1")


def test_a_host_that_is_two_servers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"each of them is this host.* set SERVER_ID"):
        AscendClusterEnvironment(write(tmp_path, table()), host_names=["10.0.0.1", "10.0.0.2"])


def test_the_loopback_does_not_tell_servers_apart(tmp_path: Path) -> None:
    content = table()
    content["server_list"][0]["server_id"] = "127.0.0.1"
    with pytest.raises(ValueError, match="none of them is this host"):
        AscendClusterEnvironment(write(tmp_path, content), host_names=["127.0.0.1"])


@pytest.mark.parametrize("variable", ["NODE_RANK", "VC_TASK_INDEX"])
def test_the_number_of_the_node_tells_where_a_table_has_only_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    file = write(tmp_path, named_table())
    with pytest.raises(ValueError, match="set SERVER_ID"):
        AscendClusterEnvironment(file, host_names=["worker"])
    monkeypatch.setenv(variable, "1")
    assert AscendClusterEnvironment(file, host_names=["worker"]).node_rank() == 1
    monkeypatch.setenv(variable, "2")
    with pytest.raises(ValueError, match=rf"{variable} is '2'\. Allowed are whole numbers from 0 to 1"):
        AscendClusterEnvironment(file, host_names=["worker"])


def test_the_number_of_the_node_does_not_excuse_foreign_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VC_TASK_INDEX", "0")
    with pytest.raises(ValueError, match="none of them is this host"):
        _environment(tmp_path, "10.0.0.3")


def test_main_address_is_that_of_the_server_with_rank_0(tmp_path: Path) -> None:
    assert _environment(tmp_path).main_address == "10.0.0.1"
    environment = AscendClusterEnvironment(write(tmp_path, super_pod_table()), host_names=["172.16.0.102"])
    assert (environment.node_rank(), environment.main_address) == (2, "172.16.0.100")


def test_main_address_of_a_single_server_is_the_loopback(tmp_path: Path) -> None:
    environment = AscendClusterEnvironment(write(tmp_path, table(1)), host_names=["10.0.0.1"])
    assert environment.main_address == "127.0.0.1"


def test_main_address_of_named_servers_is_volcanos_first_worker_or_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = AscendClusterEnvironment(write(tmp_path, named_table()), server_id="node_1")
    with pytest.raises(ValueError, match=r"found 'node_0' for the server with rank 0, .* set MASTER_ADDR"):
        _ = environment.main_address
    monkeypatch.setenv("VC_WORKER_HOSTS", "job-worker-0.job,job-worker-1.job")
    assert environment.main_address == "job-worker-0.job"


def test_master_variables_override_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "main.example")
    monkeypatch.setenv("MASTER_PORT", "2222")
    environment = _environment(tmp_path)
    assert (environment.main_address, environment.main_port) == ("main.example", 2222)


@pytest.mark.parametrize("port", ["0", "65536", "port"])
def test_a_port_out_of_range_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(ValueError, match=rf"MASTER_PORT is '{port}'\. Allowed are whole numbers from 1 to 65535"):
        _ = _environment(tmp_path).main_port


def test_the_port_is_the_same_on_all_servers_and_another_for_another_job(tmp_path: Path) -> None:
    first, second = _environment(tmp_path, "10.0.0.1").main_port, _environment(tmp_path, "10.0.0.2").main_port
    assert first == second
    assert 20000 <= first < 30000
    content = table()
    for server in content["server_list"]:
        for device in server["device"]:
            device["device_id"] = str(int(device["device_id"]) + 2)
    assert AscendClusterEnvironment(write(tmp_path, content), host_names=["10.0.0.1"]).main_port != first


@pytest.mark.parametrize(("devices", "nodes"), [(4, 1), (1, 2), (2, 1), (2, 3)])
def test_a_trainer_that_does_not_fit_the_table_is_refused(tmp_path: Path, devices: int, nodes: int) -> None:
    environment = _environment(tmp_path)
    with pytest.raises(ValueError, match=r"hccl\.json' has 2 server\(s\).*Set Trainer\(devices=2, num_nodes=2\)"):
        environment.validate_settings(devices, nodes)
    environment.validate_settings(2, 2)


def test_the_table_decides_ranks_and_world_size(tmp_path: Path) -> None:
    environment = _environment(tmp_path)
    environment.set_global_rank(0)
    environment.set_world_size(4)
    assert (environment.global_rank(), environment.world_size()) == (2, 4)
    with pytest.raises(ValueError, match="asks for 2 processes"):
        environment.set_world_size(2)


def test_it_can_be_pickled_for_spawned_processes(tmp_path: Path) -> None:
    copied = pickle.loads(pickle.dumps(_environment(tmp_path)))
    assert (copied.node_rank(), copied.world_size()) == (1, 4)


def test_host_names_read_the_kernels_tables(tmp_path: Path) -> None:
    (tmp_path / "fib_trie").write_text(
        "Main:\n  +-- 10.0.0.0/24 2 0 2\n     |-- 10.0.0.0\n        /24 link UNICAST\n"
        "     |-- 10.0.0.7\n        /32 host LOCAL\n     |-- 10.0.0.255\n        /32 link BROADCAST\n"
    )
    (tmp_path / "if_inet6").write_text("fe800000000000000000000000000001 02 40 20 80     eth0\n")
    found = host_names(tmp_path)
    assert found[0] == socket.gethostname()
    assert found[-2:] == ("10.0.0.7", "fe80::1")
    assert host_names(tmp_path / "nothing") == tuple(dict.fromkeys(found[:-2]))
