"""Batches for ``--verify`` from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from amct_lightning.commands.base import UserError
from amct_lightning.commands.export.batches import fitted, read_batches


def test_batches_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    x, y = torch.ones(2, 3), torch.zeros(2, 3)
    model = torch.nn.Bilinear(3, 3, 1)  # forward(input1, input2)
    torch.save((x, y), tmp_path / "a.pt")
    np.savez(tmp_path / "b.npz", x.double().numpy(), y.double().numpy())
    np.savez(tmp_path / "c.npz", input1=x.numpy(), input2=y.numpy())
    save_file({"input1": x, "input2": y}, tmp_path / "d.safetensors")
    for name in ("a.pt", "b.npz", "c.npz", "d.safetensors"):
        (batch,) = read_batches(str(tmp_path / name), model)
        values = tuple(batch.values()) if isinstance(batch, dict) else batch
        assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(values, (x, y), strict=True))
    save_file({"whatever": x}, tmp_path / "e.safetensors")
    np.save(tmp_path / "f.npy", x.numpy())
    linear = torch.nn.Linear(3, 1)
    assert torch.equal(read_batches(str(tmp_path / "e.safetensors"), linear)[0][0], x)  # type: ignore[index]
    assert torch.equal(read_batches(str(tmp_path / "f.npy"), linear)[0], x)  # type: ignore[arg-type]


def test_batches_are_cut_only_along_an_axis_of_samples() -> None:
    notes: list[str] = []
    whole = list(fitted([torch.zeros(5, 3)], {"x": (2, 3)}, notes.append))
    assert [len(batch) for batch in whole] == [2, 2]
    assert len(notes) == 1
    state = (torch.zeros(4, 2, 3), torch.zeros(1, 2, 8))  # a sequence and a hidden state
    assert list(fitted([state], {"x": (4, 2, 3), "h": (1, 2, 8)}, notes.append)) == [state]
    with pytest.raises(UserError, match="a batch holds 1 sample"):
        list(fitted([torch.zeros(1, 3)], {"x": (2, 3)}, notes.append))
