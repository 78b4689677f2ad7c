"""Plans in files that are damaged, at any depth: a ValueError that names the file, or a plan that can be used."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from amct_lightning import QuantRetrainCallback, load_qat_checkpoint
from amct_lightning.run_report.checkpoint import read_facts
from amct_lightning.run_report.sources import load_run

REPLACEMENTS: tuple[Any, ...] = (None, 3, "other", [], {}, [None], {"a": 1}, [["a", "b", "c"]], {3: {}})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("run")
    trainer = pl.Trainer(
        max_steps=2,
        callbacks=[QuantRetrainCallback(record_file=folder / "record.txt")],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(BoringModel())
    trainer.save_checkpoint(folder / "a.ckpt")
    content: dict[str, Any] = torch.load(folder / "a.ckpt", weights_only=True)
    return content


def places(value: object, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value in plain data, itself left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*above, key)
        yield from places(inner, (*above, key))


def changed(checkpoint: dict[str, Any], way: tuple[Any, ...], new: object) -> dict[str, Any]:
    result = copy.deepcopy(checkpoint)
    inner: Any = result["amct_lightning"]
    for key in way[:-1]:
        inner = inner[key]
    inner[way[-1]] = new
    return result


def test_any_damage_is_a_value_error_that_names_the_file(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    refused = 0
    for way in places(checkpoint["amct_lightning"]):
        for new in REPLACEMENTS:
            torch.save(changed(checkpoint, way, new), path)
            try:
                read_facts(path, [])
            except ValueError as error:
                assert str(path) in str(error), (way, new)
                refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("way", "new", "message"),
    [
        (("plan", "layers", 0, "name"), "other", r"layer 'other' has no configuration"),
        (("plan", "layers", 0, "shares_input_of"), "other", r"shares the input of 'other', which is no layer"),
        (("plan", "layers", 0, "fixed_min"), "yes", r"fixed_min of 'layer' must be bool, found str"),
        (("plan", "layers"), None, r"plan in .*a\.ckpt is damaged"),
        (("plan",), [], r"a\.ckpt is damaged: it has no quantization plan"),
        (("observed",), None, r"a\.ckpt is damaged: its 'observed' must be lists of tensors by name, found NoneType"),
        (("observed",), {"layer.input_quantizer": [1.0]}, r"'observed' .* found dict with something else in it"),
        (("missed_layers",), 3, r"'missed_layers' must be a list of names, found int"),
        (("other_parts",), {"": 3}, r"'other_parts' must be plans by name"),
        (("calibration_steps",), "1", r"'calibration_steps' must be an integer"),
    ],
)
def test_what_is_wrong_is_said(
    checkpoint: dict[str, Any], tmp_path: Path, way: tuple[Any, ...], new: object, message: str
) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(changed(checkpoint, way, new), path)
    with pytest.raises(ValueError, match=message):
        load_qat_checkpoint(BoringModel, path)
    with pytest.raises(ValueError, match=message):
        trainer = pl.Trainer(
            callbacks=[QuantRetrainCallback(record_file=tmp_path / "r.txt")],
            logger=False,
            accelerator="cpu",
            enable_progress_bar=False,
            default_root_dir=tmp_path,
        )
        trainer.test(BoringModel(), ckpt_path=path, verbose=False)


def test_a_damaged_checkpoint_does_not_end_the_report_of_a_folder(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    torch.save(changed(checkpoint, ("plan", "layers", 0, "name"), "other"), tmp_path / "a.ckpt")
    (tmp_path / "metrics.csv").write_text("epoch,step,loss\n0,1,2\n0,2,1\n")
    run = load_run(tmp_path)
    assert run.checkpoint is None
    assert "is damaged" in " ".join(run.notes)
    assert list(run.logged) == ["loss"]
