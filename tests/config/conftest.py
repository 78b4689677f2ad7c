"""Shared objects of the config tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

GOLDEN = Path(__file__).parent.parent / "golden"


def full_raw() -> dict[str, Any]:
    """The default configuration of a small network, as plain JSON content."""
    return {"version": 1, "batch_num": 1, "conv1": _layer(True), "conv2": _layer(True), "fc": _layer(False)}


def _layer(channel_wise: bool) -> dict[str, Any]:
    return {
        "retrain_enable": True,
        "retrain_data_config": {"algo": "ulq_quantize", "dst_type": "INT8"},
        "retrain_weight_config": {"algo": "arq_retrain", "channel_wise": channel_wise, "dst_type": "INT8"},
    }


@pytest.fixture
def raw() -> dict[str, Any]:
    return full_raw()


@pytest.fixture
def eligible() -> dict[str, nn.Module]:
    return {"conv1": nn.Conv2d(3, 8, 3), "conv2": nn.Conv2d(8, 12, 3), "fc": nn.Linear(12, 10)}


@pytest.fixture
def write(tmp_path: Path):
    """Write plain content or text to config.json and give its path."""

    def _write(content: Any) -> Path:
        path = tmp_path / "config.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return _write
