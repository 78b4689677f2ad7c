"""Nothing that lies in a folder or stands in a file is run by reading it, and no name of a layer is obeyed."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from amct_lightning import QuantRecord, load_qat_checkpoint
from amct_lightning.ascend.fsdp.reading import SafePlanner, SafeReader
from amct_lightning.cli import main
from amct_lightning.record import LayerRecord
from amct_lightning.run_report import write_report
from tests.faults.test_files import trained

LAYER = LayerRecord(0.5, 0, [0.25], [0])


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("EXECUTED"),)


class Model(BoringModel):
    def __init__(self, head: Any = None, width: int = 2) -> None:
        super().__init__()
        self.width = width


@pytest.mark.parametrize(
    ("module", "action"),
    [
        *((module, ("record", "check")) for module in ("attr", "google", "yaml", "rich")),
        ("attr", ("record", "show")),
        ("attr", ("report",)),
    ],
)
def test_reading_a_file_runs_no_code_of_the_current_folder(
    module: str, action: tuple[str, ...], tmp_path: Path
) -> None:
    QuantRecord({"a": LAYER}).save(tmp_path / "record.txt")
    (tmp_path / f"{module}.py").write_text("open('EXECUTED', 'w')")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "amct-lightning").write_text("from amct_lightning.cli import main\nmain()\n")
    for start in (["-m", "amct_lightning"], ["bin/amct-lightning"]):
        subprocess.run([sys.executable, *start, *action, "record.txt"], cwd=tmp_path, capture_output=True, check=False)
    assert not (tmp_path / "EXECUTED").exists()


def test_a_checkpoint_folder_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(RuntimeError, match=r"\.metadata' is damaged.*it would run '.*', which describes no tensor"):
        SafeReader(tmp_path).read_metadata()
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(RuntimeError, match="is not the description of a checkpoint, but a dict"):
        SafeReader(tmp_path).read_metadata()
    assert not (tmp_path / "EXECUTED").exists()


def test_neither_does_what_is_no_tensor_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save

    monkeypatch.chdir(tmp_path)
    save({"weight": torch.arange(3.0), "groups": {"lr": 0.5}}, checkpoint_id=tmp_path / "good")
    state = {"weight": torch.zeros(3), "groups": {"lr": 0.0}}
    load(state, storage_reader=SafeReader(tmp_path / "good"), planner=SafePlanner())
    assert state["weight"].tolist() == [0, 1, 2] and state["groups"] == {"lr": 0.5}
    save({"groups": Bomb()}, checkpoint_id=tmp_path / "evil")
    with pytest.raises(BaseException, match=r"[Ww]eights.?only"):
        load({"groups": 0}, storage_reader=SafeReader(tmp_path / "evil"), planner=SafePlanner())
    assert not (tmp_path / "EXECUTED").exists()


def changed(folder: Path, **parameters: Any) -> Path:
    path = folder / "a.ckpt"
    trained(folder, folder / "run.txt").save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"] = {"_instantiator": "lightning.pytorch.cli.instantiate_module", **parameters}
    torch.save(content, path)
    return path


@pytest.mark.parametrize("head", [{"class_path": "evil.X"}, [{"of": {"class_path": "evil.X"}}]])
def test_classes_that_a_checkpoint_names_are_not_imported(
    head: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('EXECUTED', 'w')\nclass X: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = changed(tmp_path, head=head, width=3)
    with pytest.raises(
        ValueError, match=r"its hyper parameters hold 'evil\.X'\. If you trust the file, make the module"
    ):
        load_qat_checkpoint(Model, path)
    assert load_qat_checkpoint(Model, path, head=None).width == 3
    assert load_qat_checkpoint(Model(), path).width == 2
    assert not (tmp_path / "EXECUTED").exists()


def test_the_function_that_a_checkpoint_names_is_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("def make(*a, **k): open('EXECUTED', 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = changed(tmp_path, width=3)
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["_instantiator"] = "evil.make"
    torch.save(content, path)
    assert load_qat_checkpoint(Model, path).width == 3
    assert not (tmp_path / "EXECUTED").exists()


def test_names_of_layers_are_shown_and_not_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["a[red]b", "ab", "\x1b]0;pwned\x07", "[/x]", "a\nb", "\u202egpj.exe"]
    QuantRecord(dict.fromkeys(names, LAYER)).save(tmp_path / "r.txt")
    QuantRecord({"ab": LAYER}).save(tmp_path / "s.txt")
    assert main(["record", "show", str(tmp_path / "r.txt")]) == 0
    shown = capsys.readouterr().out
    assert "a[red]b" in shown and "[/x]" in shown and r"\x1b]0;pwned\x07" in shown and r"\u202egpj.exe" in shown
    assert len(shown.splitlines()) == len(names) + 1
    assert main(["record", "diff", str(tmp_path / "r.txt"), str(tmp_path / "s.txt")]) == 1
    found = capsys.readouterr().out
    assert "\x1b" not in shown + found and "\u202e" not in shown + found and "[/x]" in found
    assert main(["record", "show", str(tmp_path / "\x1b]0;pwned\x07.txt")]) == 2
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry["plan"]["layers"][0].update(name="other"),
        lambda entry: entry["plan"]["layers"][0].update(shares_input_of="other"),
        lambda entry: entry["plan"].update(layers=3),
        lambda entry: entry["plan"].update(layers=[[]]),
        lambda entry: entry["plan"].update(config=None),
        lambda entry: entry["plan"].update(float_parts=[1]),
        lambda entry: entry.update(plan=None),
        lambda entry: entry.update(plan=[]),
    ],
)
def test_a_damaged_plan_is_named_and_does_not_end_the_report_of_a_folder(damage: Any, tmp_path: Path) -> None:
    path = tmp_path / "run" / "a.ckpt"
    trained(tmp_path, tmp_path / "run.txt").save_checkpoint(path)
    (tmp_path / "run" / "metrics.csv").write_text("epoch,step,loss\n0,1,2\n0,2,1\n")
    content = torch.load(path, weights_only=True)
    damage(content["amct_lightning"])
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"a\.ckpt.*(damaged|must)"):
        load_qat_checkpoint(BoringModel, path)
    write_report(tmp_path / "run", tmp_path / "report.html")
    assert "damaged" in (tmp_path / "report.html").read_text() or "must" in (tmp_path / "report.html").read_text()
