"""Lightning's cluster environment for jobs whose scheduler describes them in a rank table of HCCL."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch.distributed
from lightning.fabric.plugins import ClusterEnvironment
from typing_extensions import override

from amct_lightning.ascend.cluster.host import candidates, environment_number, find_server, host_names
from amct_lightning.ascend.cluster.rank_table import Device, RankTable, read_rank_table
from amct_lightning.ascend.cluster.rank_table_entry import rank_table_error

# RANK_TABLE_FILE is the one that torch_npu gives to HCCL, so it decides; ModelArts may set the last one besides.
PATH_VARIABLES = ("RANK_TABLE_FILE", "RANKTABLE_FILE", "RANKTABLE", "RANK_TABLE_FILE_V_1_0")
# Below Linux's range of ports for outgoing connections, and away from HCCL's own (16666 on, 60000 on).
_FIRST_PORT, _PORTS = 20000, 10000
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")


class AscendClusterEnvironment(ClusterEnvironment):
    """Takes addresses and ranks from the rank table that Volcano, MindCluster or ModelArts writes for a job.

    Start the same script once on every server, ``Trainer(devices=<devices per server>, num_nodes=<servers>)``; the
    processes for the other devices of the server are started by Lightning. Where the scheduler starts one process
    per device, which it says with ``RANK_ID`` or ``LOCAL_RANK``, nothing is started. MindCluster's operator puts the
    list of a pod's devices into ``LOCAL_RANK``, with which Lightning cannot even be imported: ``unset LOCAL_RANK`` in
    the job's script before it starts Python.

    - **Table:** ``rank_table``, or the first that is set of ``RANK_TABLE_FILE``, ``RANKTABLE_FILE``, ``RANKTABLE``
      and ``RANK_TABLE_FILE_V_1_0``. A table that contradicts itself, the trainer or this host is refused.
    - **This host:** ``RANK_ID``; else ``server_id`` or ``SERVER_ID``; else what ``POD_UID``, ``POD_IP``, ``XDL_IP``,
      ``MA_CURRENT_HOST_IP`` and ``MA_CURRENT_IP`` say; else the host's own name and addresses; else, if the table
      has names only, ``NODE_RANK`` or ``VC_TASK_INDEX``. Names and addresses may not contradict ``RANK_ID``.
      ``DEVICE_ID`` is not used: whether it is the physical or the logical number depends on who sets it.
    - **Main process:** ``MASTER_ADDR`` and ``MASTER_PORT`` if they are set. Else the address of the server with
      rank 0 and a port from 20000 to 29999 that follows from the servers and devices of the job.

    Args:
        rank_table: The file, or the folder with ``jobstart_hccl.json``, ``hccl.json`` or ``ranktable.json``.
        server_id: The ``server_id`` of this host.
        timeout: Seconds to wait for a table that the scheduler has not finished. ModelArts starts the script before
            the table is complete.
        host_names: Names and addresses of this host; from the operating system if not given.

    Raises:
        ValueError: If the table or a variable is not valid, or this host is not in the table.
        OSError: If the table cannot be read.

    Example:
        >>> import json, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "hccl.json"
        >>> servers = [
        ...     {"server_id": f"10.0.0.{node}", "device": [
        ...         {"device_id": str(card), "device_ip": f"10.1.{node}.{card}", "rank_id": str(2 * node + card)}
        ...         for card in range(2)]}
        ...     for node in range(2)
        ... ]
        >>> table = {"version": "1.0", "status": "completed", "server_count": "2", "server_list": servers}
        >>> _ = path.write_text(json.dumps(table))
        >>> environment = AscendClusterEnvironment(str(path), host_names=["10.0.0.1"])
        >>> environment.node_rank(), environment.world_size()
        (1, 4)

        With Lightning: ``Trainer(devices=2, num_nodes=2, plugins=[environment])``, or in YAML::

            trainer:
              devices: 8
              num_nodes: 2
              plugins:
                - class_path: amct_lightning.ascend.AscendClusterEnvironment
                  init_args: {timeout: 300}
    """

    def __init__(
        self,
        rank_table: str | Path | None = None,
        server_id: str | None = None,
        timeout: float = 0.0,
        host_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self._table = read_rank_table(rank_table or _path_from_environment(), timeout)
        self._node_rank = self._find_node(server_id, host_names)

    @staticmethod
    @override
    def detect() -> bool:
        """Tell whether a rank table is named and no stronger launcher is at work; the file is not opened.

        torchrun comes first, since it can run inside any scheduler; then SLURM's ``srun``, unless its job is an
        interactive one.

        Returns:
            Whether this environment is the right one.

        Example:
            >>> AscendClusterEnvironment.detect()
            False
        """
        if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
            return False
        if "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
            return False
        return any(os.environ.get(name) for name in PATH_VARIABLES)

    @property
    def rank_table(self) -> RankTable:
        """The rank table, as it was read."""
        return self._table

    @property
    def local_devices(self) -> tuple[Device, ...]:
        """The devices of this host in the order of their local ranks."""
        return self._table.servers[self._node_rank].devices

    @property
    @override
    def creates_processes_externally(self) -> bool:
        """Whether each device has a process of its own already: ``RANK_ID`` or ``LOCAL_RANK`` is set."""
        return bool(os.environ.get("RANK_ID") or os.environ.get("LOCAL_RANK"))

    @property
    @override
    def main_address(self) -> str:
        """``MASTER_ADDR``, or the address of the server that has rank 0; the loopback if there is one server."""
        if os.environ.get("MASTER_ADDR"):
            return os.environ["MASTER_ADDR"]
        if len(self._table.servers) == 1:
            return "127.0.0.1"
        first = self._table.servers[0]
        workers = os.environ.get("VC_WORKER_HOSTS", "").split(",")[0].strip()
        for address in (*first.addresses, workers, first.server_id):
            if _HOST_NAME.fullmatch(address) or ":" in address:
                return address
        raise rank_table_error(
            self._table.file,
            "server_list[].server_id",
            f"found {first.server_id!r} for the server with rank 0, which is no address or host name",
            "Add its 'host_ip' to the table, or set MASTER_ADDR on all servers to its address.",
        )

    @property
    @override
    def main_port(self) -> int:
        """``MASTER_PORT``, or the same port on all servers, which follows from the job's servers and devices."""
        if os.environ.get("MASTER_PORT"):
            return environment_number("MASTER_PORT", 65536, "ports", start=1)
        job = [[server.server_id, [device.device_id for device in server.devices]] for server in self._table.servers]
        return _FIRST_PORT + zlib.crc32(json.dumps(job).encode()) % _PORTS

    @override
    def world_size(self) -> int:
        """Number of devices in the table."""
        return self._table.world_size

    @override
    def set_world_size(self, size: int) -> None:
        """Check the number that Lightning has worked out: the table decides.

        Called when the trainer is made, by every distributed strategy, so an error comes before any process.

        Args:
            size: ``devices * num_nodes`` of the trainer.

        Raises:
            ValueError: If the table has another number of devices.
        """
        if size != self.world_size():
            raise self._trainer_error(f"asks for {size} processes (devices * num_nodes)")

    @override
    def global_rank(self) -> int:
        """Rank of this process, which is the ``rank_id`` of its device."""
        return self._node_rank * self._table.devices_per_server + self.local_rank()

    @override
    def set_global_rank(self, rank: int) -> None:
        """Do nothing: the table decides.

        Args:
            rank: Lightning's own count.
        """

    @override
    def local_rank(self) -> int:
        """Rank of this process within its server."""
        size = self._table.devices_per_server
        stated = None
        if os.environ.get("LOCAL_RANK"):
            stated = environment_number("LOCAL_RANK", size, f"devices of a server in '{self._table.file}'")
        if not os.environ.get("RANK_ID"):
            return stated or 0
        rank = self._rank_id() % size
        if stated is not None and stated != rank:
            raise ValueError(
                f"LOCAL_RANK is {stated}, but RANK_ID {os.environ['RANK_ID']} is device {rank} of its server in the "
                f"rank table '{self._table.file}'. Unset one of them."
            )
        return rank

    @override
    def node_rank(self) -> int:
        """Rank of this host: servers are counted in the order of their ranks."""
        return self._node_rank

    @override
    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Check the trainer's numbers against the table.

        Args:
            num_devices: The trainer's devices on each server.
            num_nodes: The trainer's ``num_nodes``.

        Raises:
            ValueError: If the table has another number of servers or devices.
        """
        if (num_devices, num_nodes) != (self._table.devices_per_server, len(self._table.servers)):
            raise self._trainer_error(f"has devices={num_devices} and num_nodes={num_nodes}")

    def _find_node(self, server_id: str | None, names: Sequence[str] | None) -> int:
        known = host_names() if names is None else names
        if not os.environ.get("RANK_ID"):
            return find_server(self._table, known, server_id)
        node = self._rank_id() // self._table.devices_per_server
        found = candidates(self._table, known, server_id)
        if found.servers and node not in found.servers:
            raise found.error(
                f"RANK_ID {os.environ['RANK_ID']} belongs to server {self._table.servers[node].server_id!r}: correct "
                f"RANK_ID, or unset it if this script is started once on the whole server."
            )
        return node

    def _rank_id(self) -> int:
        size = self._table.world_size
        if os.environ.get("RANK_SIZE") and environment_number("RANK_SIZE", 10**9, "processes of the job") != size:
            raise ValueError(
                f"RANK_SIZE is {os.environ['RANK_SIZE']}, but the rank table '{self._table.file}' has {size} devices. "
                f"Both must be the same: unset RANK_SIZE, or point RANK_TABLE_FILE to the table of this job."
            )
        return environment_number("RANK_ID", size, f"the ranks in '{self._table.file}'")

    def _trainer_error(self, found: str) -> ValueError:
        devices, nodes = self._table.devices_per_server, len(self._table.servers)
        return ValueError(
            f"The trainer {found}, but the rank table '{self._table.file}' has {nodes} server(s) (server_list) with "
            f"{devices} device(s) each. Set Trainer(devices={devices}, num_nodes={nodes}), or use the table of this "
            f"job; without a table, unset {', '.join(name for name in PATH_VARIABLES if os.environ.get(name)) or 'it'}."
        )


def _path_from_environment() -> str:
    for name in PATH_VARIABLES:
        if os.environ.get(name):
            return os.environ[name]
    raise ValueError(
        f"AscendClusterEnvironment needs a rank table, and none of {', '.join(PATH_VARIABLES)} is set. Set "
        f"RANK_TABLE_FILE to the file that the scheduler writes, or give AscendClusterEnvironment(rank_table=...)."
    )
