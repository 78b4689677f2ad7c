"""The examples run, and the demo survives being killed."""

from __future__ import annotations

import importlib
import json
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from amct_lightning import QuantRecord
from tests.examples.running import EXAMPLES, ONE_THREAD, command, fit, printed_accuracies, run

SHORT = ["--epochs", "2", "--qat-epochs", "2"]
FORKING = Path(__file__).with_name("forking.py")
PHASES = ("fp32", "fp32_longer", "int8", "a4w4")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, float]:
    out = tmp_path_factory.mktemp("uninterrupted")
    start = time.monotonic()
    printed = run(command("digits.py", out, *SHORT))
    return out, printed, time.monotonic() - start


def test_the_demo_ends_with_its_table_and_files(uninterrupted: tuple[Path, str, float]) -> None:
    out, printed, _ = uninterrupted
    for word in ("FP32", "INT8", "A4W4", "not retrained", "deployed", "training step", "Logs:"):
        assert word in printed
    assert re.search(r"FP32, trained as long +│ +- │ +[\d.]+% │ +- │ +- │", printed)
    for name in ("int8", "a4w4"):
        _, retrained, deployed = printed_accuracies(printed, name.upper())
        assert deployed == retrained
        assert json.loads((out / f"{name}_verification.json").read_text())["ok"]
        assert (out / f"{name}_deploy_model.onnx").stat().st_size < 40_000
        assert len(QuantRecord.load(out / f"{name}.record.txt")) == 22
        assert (out / name / "last.record.txt").read_text() == (out / f"{name}.record.txt").read_text()


def test_the_float_network_of_the_comparison_was_trained_as_long_as_the_quantized_ones(
    uninterrupted: tuple[Path, str, float],
) -> None:
    out, _, _ = uninterrupted
    begun, *compared = (torch.load(out / phase / "last.ckpt", weights_only=True) for phase in PHASES)
    assert len({(run["epoch"], run["global_step"]) for run in compared}) == 1
    weights = [run["state_dict"]["net.0.weight"] for run in (begun, *compared)]
    assert not any(torch.equal(weights[0], other) for other in weights[1:])


def test_a_yaml_file_quantizes_the_float_checkpoint_of_the_demo_equal_to_the_bit(
    uninterrupted: tuple[Path, str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, _ = uninterrupted
    weights = f"--quant.float_checkpoint={out / 'fp32' / 'last.ckpt'}"
    fit(monkeypatch, tmp_path, "digits_finetune", weights, "--trainer.max_epochs=2")
    record = tmp_path / "runs" / "digits_finetune" / "record.txt"
    assert record.read_bytes() == (out / "int8.record.txt").read_bytes()


def test_killed_at_random_moments_the_demo_still_ends_equal_to_the_bit(
    uninterrupted: tuple[Path, str, float], tmp_path: Path
) -> None:
    """Ten SIGKILLs; the moments are drawn anew in every run of the test, and printed if it fails."""
    expected, _, duration = uninterrupted
    moments = [random.uniform(0.05, 0.8) * duration for _ in range(10)]
    print("killed after", moments)
    python, *script = command("digits.py", tmp_path, *SHORT)
    with subprocess.Popen(
        [python, FORKING, *script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ONE_THREAD
    ) as runs:
        assert runs.stdin and runs.stdout
        for moment in [*moments, 250]:
            print(moment, file=runs.stdin, flush=True)
            status = int(runs.stdout.readline())
            assert status in (0, signal.SIGKILL)
            _assert_no_half_written_file(tmp_path)
        assert status == 0  # the last one had time enough
        runs.stdin.close()
    _assert_same_results(tmp_path, expected)
    assert not list(tmp_path.rglob(".*.tmp"))


def _assert_no_half_written_file(out: Path) -> None:
    for checkpoint in out.rglob("*.ckpt"):
        assert torch.load(checkpoint, weights_only=True)["state_dict"]
    for record in out.rglob("*.record.txt"):
        assert len(QuantRecord.load(record)) == 22


def _assert_same_results(out: Path, expected: Path) -> None:
    for phase in PHASES:
        ours, theirs = (torch.load(folder / phase / "last.ckpt", weights_only=True) for folder in (out, expected))
        assert ours["state_dict"].keys() == theirs["state_dict"].keys()
        for name, tensor in ours["state_dict"].items():
            assert torch.equal(tensor, theirs["state_dict"][name]), (phase, name)
    for name in ("int8", "a4w4"):
        assert (out / f"{name}.record.txt").read_bytes() == (expected / f"{name}.record.txt").read_bytes()


def test_the_plain_twin_writes_its_record(tmp_path: Path) -> None:
    printed = run(command("digits_plain.py", tmp_path, "--epochs", "1", "--qat-epochs", "1"))
    assert "INT8 accuracy" in printed
    assert len(QuantRecord.load(tmp_path / "record.txt")) == 22
    written = {path.name for path in tmp_path.glob("*.onnx")}
    assert written == {"digits_deploy_model.onnx", "digits_fake_quant_model.onnx"}


def test_a_momentum_teacher_is_the_average_of_its_quantized_student(tmp_path: Path) -> None:
    """And nobody is warned of pairs that do not fit."""
    finished = subprocess.run(
        command("mean_teacher.py", tmp_path, "--epochs", "1"),
        capture_output=True,
        text=True,
        check=True,
        env=ONE_THREAD,
    )
    assert re.search(r"student, INT8: [\d.]+% +teacher, float: [\d.]+%", finished.stdout)
    assert "float copy" not in finished.stderr
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    student, teacher = state["net.0.weight"], state["teacher.0.weight"]
    assert not torch.equal(student, teacher)
    assert torch.allclose(student, teacher, atol=0.3)
    assert "net.0.input_quantizer.clip_max" in state
    assert not any(name.startswith("teacher") and "quantizer" in name for name in state)


def test_the_step_that_the_demo_times_is_a_whole_one_and_the_networks_take_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    turns: list[str] = []

    def net(name: str) -> torch.nn.Module:
        module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        module.register_forward_hook(lambda *_: turns.append(name))
        return module

    nets = {"fp32": net("fp32"), "int8": net("int8")}
    before = nets["int8"][1].weight.detach().clone()
    times = importlib.import_module("digits").step_times(nets, seed=0, rounds=2, warm_up=1)
    assert turns == ["int8", "fp32", "fp32", "int8", "int8", "fp32"]
    assert times.keys() == nets.keys()
    assert not torch.equal(nets["int8"][1].weight, before)  # by the optimizer
