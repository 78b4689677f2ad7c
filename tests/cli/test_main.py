"""The command as a whole: help, statuses, messages, and the process around it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from amct_lightning import QuantRecord
from amct_lightning.record import LayerRecord
from tests.cli.conftest import MODULE, Folder

README_RUN = """
model: demo_module.Classifier
data: demo_module.Noise
trainer: {max_epochs: 1, accelerator: cpu}
quant:
  record_file: record.txt
  config: {weights: {dst_type: INT4}, skip_layers: [net.0]}
"""


# What needs no model, and how it ends.
WITHOUT_A_MODEL = {
    "--help": 0,
    "--version": 0,
    "recrod": 2,
    "record show record.txt": 0,
    "record check record.txt": 0,
    "record diff record.txt record.txt": 0,
    "record show missing.txt": 2,
    "config --help": 0,
    "config --format xml": 2,
    "report missing": 2,
    "export --help": 0,
    "export last.ckpt": 2,
    "verify last.ckpt net.onnx --model Net --random 0": 2,
}


def process(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "amct_lightning", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_without_arguments_it_shows_the_commands(folder: Folder) -> None:
    status, out, _ = folder()
    assert status == 0
    names = ("fit", "validate", "test", "predict", "config", "record", "report", "export", "verify")
    assert all(f"\n    {name} " in out for name in names)


@pytest.mark.parametrize(
    "command",
    ["fit", "validate", "test", "predict", "config", "record", "record show", "record check", "record diff",
     "record extract", "report", "export", "verify"],
)  # fmt: skip
def test_every_help_has_examples(folder: Folder, command: str) -> None:
    status, out, _ = folder(*command.split(), "--help")
    assert status == 0
    examples = out.partition("\nexamples:\n")[2]
    assert f"  amct-lightning {command} " in examples
    assert "``" not in out


def test_the_help_of_fit_explains_the_options_of_the_callback(folder: Folder) -> None:
    out = " ".join(folder("fit", "--help").out.split())
    for option in ("config", "record_file", "schedule", "submodule", "quant_lr_scale", "float_checkpoint", "enabled"):
        assert f"--quant.{option} " in out
    assert "What to quantize: a preset such as" in out


def test_version(folder: Folder) -> None:
    assert folder("--version").out.startswith("amct-lightning 0.")


def test_an_unknown_command_is_told_with_the_closest_one(folder: Folder) -> None:
    status, _, err = folder("recrod", "show")
    assert status == 2
    assert err.startswith("amct-lightning: error: there is no command 'recrod'. Did you mean 'record'?")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("fit --model demo_module.Clasifier", "module 'demo_module' has no attribute 'Clasifier'"),
        ("fit --model demo_module.Classifier --model.with 3", "Option 'with' is not accepted"),
        ("fit --config missing.yaml", "File does not exist"),
        ("fit", "the following arguments are required: --model"),
        ("fit --model demo_module.Classifier --trainer.max_epochs many", "Expected a <class 'int'>, given many"),
        ("fit --model demo_module.Classifier --quant.schedule.freeze_bm=3", "Did you mean 'freeze_bn'?"),
        ("record", None),
        ("record show", "the following arguments are required"),
        ("record show missing.txt", "there is no file 'missing.txt'"),
        ("record show .", "is a folder"),
        ("record diff a b --rtol=-1", "--rtol -1.0: must be a number >= 0"),
        ("config", "the following arguments are required: --model"),
        ("report missing", "there is no folder or checkpoint 'missing'"),
    ],
)
def test_errors_are_one_message_and_status_2(folder: Folder, arguments: str, message: str | None) -> None:
    status, out, err = folder(*arguments.split())
    if message is None:
        assert (status, out.partition("\n")[0]) == (0, "usage: amct-lightning record ACTION ...")
        return
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert "usage:" not in err


def test_debug_lets_the_exception_through(folder: Folder) -> None:
    with pytest.raises(Exception, match=r"no file 'missing.txt'"):
        folder("record", "show", "missing.txt", "--debug")


def test_the_yaml_of_a_run_works_in_a_folder_with_nothing_but_the_module(tmp_path: Path) -> None:
    (tmp_path / "demo_module.py").write_text(MODULE)
    (tmp_path / "run.yaml").write_text(README_RUN)
    finished = process(tmp_path, "fit", "--config", "run.yaml")
    assert finished.returncode == 0, finished.stderr[-2000:]
    record = QuantRecord.load(tmp_path / "record.txt")
    assert {name: layer.wts_type for name, layer in record.items()} == {"net.4": "INT4"}
    assert (tmp_path / "lightning_logs" / "version_0" / "config.yaml").exists()


def test_commands_that_need_no_model_load_neither_torch_nor_lightning(tmp_path: Path) -> None:
    layer = LayerRecord(scale_d=0.5, offset_d=0, scale_w=[0.1], offset_w=[0])
    QuantRecord({"fc": layer}).save(tmp_path / "record.txt")
    script = f"""
import sys
from amct_lightning.cli import main
for line in {WITHOUT_A_MODEL}:
    status = main(line.split())
    print("->", status, *sorted({{"torch", "lightning", "numpy", "matplotlib", "onnx"}} & {{*sys.modules}}))
"""
    finished = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    ends = [line for line in finished.stdout.splitlines() if line.startswith("->")]
    assert ends == [f"-> {status}" for status in WITHOUT_A_MODEL.values()], finished.stderr[-2000:]


def test_a_shell_gets_completions(tmp_path: Path) -> None:
    answers, imports = {}, {}
    for line in ("amct-lightning record ", "amct-lightning fit --quant.record", "amct-lightning export --dyn"):
        read, write = os.pipe()
        environment = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "_ARGCOMPLETE": "1"}
        imports[line] = subprocess.run(
            ["/bin/bash", "-c", f"'{sys.executable}' -X importtime -m amct_lightning 8>&{write} 9>/dev/null"],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment, "_ARGCOMPLETE_IFS": "\n"},
            pass_fds=[write],
            check=False,
            timeout=120,
        ).stderr
        os.close(write)
        with os.fdopen(read) as pipe:
            answers[line] = pipe.read().split()
    assert {"show", "check", "diff", "extract"} <= set(answers["amct-lightning record "])
    assert answers["amct-lightning fit --quant.record"] == ["--quant.record_file"]
    assert answers["amct-lightning export --dyn"] == ["--dynamic-batch"]
    assert [bool(re.search(r"\| +torch$", listed, re.MULTILINE)) for listed in imports.values()] == [False, True, False]


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    layer = LayerRecord(scale_d=0.5, offset_d=0, scale_w=[0.1] * 512, offset_w=[0] * 512)
    QuantRecord({f"layer{n}": layer for n in range(50)}).save(tmp_path / "record.txt")
    with subprocess.Popen(
        [sys.executable, "-m", "amct_lightning", "record", "show", "record.txt", "--json"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 141
