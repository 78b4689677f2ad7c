"""Rank tables for the tests, in the form that Huawei's documentation shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCHEDULER_VARIABLES = (
    *("RANK_TABLE_FILE", "RANKTABLE_FILE", "RANKTABLE", "RANK_TABLE_FILE_V_1_0"),
    *("SERVER_ID", "POD_UID", "POD_IP", "XDL_IP", "MA_CURRENT_HOST_IP", "MA_CURRENT_IP", "NODE_RANK", "VC_TASK_INDEX"),
    *("RANK_ID", "RANK_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "VC_WORKER_HOSTS", "WORLD_SIZE", "RANK"),
    *("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_JOB_NAME"),
)


def table(servers: int = 2, devices: int = 2) -> dict[str, Any]:
    """Version 1.0: servers 10.0.0.1, 10.0.0.2, ... with devices numbered from 0."""
    return {
        "status": "completed",
        "version": "1.0",
        "server_count": str(servers),
        "server_list": [
            {
                "server_id": f"10.0.0.{node + 1}",
                "device": [
                    {
                        "device_id": str(card),
                        "device_ip": f"192.168.{node}.{card + 1}",
                        "rank_id": str(node * devices + card),
                    }
                    for card in range(devices)
                ],
            }
            for node in range(servers)
        ],
    }


def super_pod_table() -> dict[str, Any]:
    """Version 1.2: two super pods with two servers each, named and with the addresses of their hosts."""
    made = table(4)
    made["version"] = "1.2"
    for node, server in enumerate(made["server_list"]):
        server["server_id"] = f"node_{node}"
        server["host_ip"] = f"172.16.0.{100 + node}"
        for card, device in enumerate(server["device"]):
            device |= {"super_device_id": str(2 * (node % 2) + card), "device_port": "16666", "host_port": "16665"}
    made["super_pod_list"] = [
        {"super_pod_id": str(pod), "server_list": [{"server_id": f"node_{node}"} for node in nodes]}
        for pod, nodes in enumerate(((0, 1), (2, 3)))
    ]
    return made


def named_table() -> dict[str, Any]:
    """Version 1.0 with names of its own choice for the servers, and no address of them."""
    made = table()
    for node, server in enumerate(made["server_list"]):
        server["server_id"] = f"node_{node}"
    return made


def write(folder: Path, content: dict[str, Any], name: str = "hccl.json") -> str:
    path = folder / name
    path.write_text(json.dumps(content))
    return str(path)
