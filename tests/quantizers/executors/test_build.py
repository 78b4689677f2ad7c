"""Kernels that cannot be had, or not as they were written: training goes on, and says so once for each of them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from amct_lightning.modules.fused.choice import execution_of, set_execution
from amct_lightning.quantizers.executors import build, cache, check_execution, choice, executor_for, resolved
from amct_lightning.quantizers.executors.kernels import Kernel
from tests.modules.cases import Width
from tests.modules.executors.cases import calibrated, case_named, same

REBUILD = Kernel("rebuild", 8, False, torch.float32, "cpu")
NEEDED = {"train", "rebuild", "gradients", "weight"}
"""What a linear layer with one weight scale runs in training, beside the kernels of its weight that it shares."""

STEP = """
import json, logging, sys
import torch
from tests.modules.cases import Width
from tests.modules.executors.cases import Step, alike, calibrated, case_named, same

lines = []
logging.getLogger("amct_lightning").addHandler(h := logging.Handler())
h.emit = lambda record: lines.append(record.getMessage())
torch.set_num_threads(1)
case = case_named("linear")
models = alike(calibrated(case, Width()), ["composite", *sys.argv[1:]])
x = case.input()
steps = [Step.of(model, x) for model in models for _ in range(2)]
print(json.dumps({"same": all(same(steps[0].output, step.output) for step in steps), "lines": lines}))
"""


def run(*executions: str, **environment: str) -> tuple[dict[str, Any], str]:
    """Run a step in a process of its own; what it prints, and what it writes beside."""
    root = str(Path(__file__).parents[3])
    variables = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", STEP, *executions], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), done.stderr


def kernels_of(lines: list[str]) -> list[str]:
    return [line.split("without the kernel ")[1].split("-8-")[0] for line in lines if "without the kernel " in line]


def without_native(lines: list[str]) -> list[str]:
    """What is told of the kernels and the operator in C++, less the reasons."""
    return [said for line in lines if (said := line.partition(" (")[0]).endswith("C++")]


NOTHING_NATIVE = [
    "Quantization runs without the kernels in C++",
    "Quantized layers run without their operator in C++",
]


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of this test, which has the kernel ``rebuild`` in it, and executors that know of no other."""
    build.load(REBUILD)
    source = build.kernel_file(REBUILD)
    monkeypatch.setenv("AMCT_LIGHTNING_CACHE", str(tmp_path))
    cache.cache_folder().mkdir(parents=True)
    for file in source.parent.glob(f"{source.name}*"):
        shutil.copy(file, cache.cache_folder())
    executor_for.cache_clear()
    choice._kernel.cache_clear()
    yield cache.cache_folder()
    executor_for.cache_clear()
    choice._kernel.cache_clear()


def test_a_broken_compiler_is_told_once_for_each_kernel(tmp_path: Path) -> None:
    folder, inductor = tmp_path / "kernels", tmp_path / "inductor"
    environment = {"AMCT_LIGHTNING_CACHE": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(inductor), "CXX": "/bin/false"}
    told, _ = run("compiled", "compiled", "auto", **environment, AMCT_LIGHTNING_EXECUTION="compiled")
    assert told["same"]
    assert sorted(kernels_of(told["lines"])) == sorted(NEEDED)
    assert sorted(without_native(told["lines"])) == NOTHING_NATIVE
    assert sum("/bin/false ends with status 1" in line for line in told["lines"]) == len(NOTHING_NATIVE)
    assert not [*folder.rglob("*.pt2"), *folder.rglob("*.so")]


def test_without_a_compiler_auto_is_the_reference(tmp_path: Path) -> None:
    environment = {
        "PATH": str(tmp_path),
        "CXX": "",
        "AMCT_LIGHTNING_EXECUTION": "",
        "AMCT_LIGHTNING_CACHE": "/dev/null/a",
    }
    told, written = run("auto", **environment)
    assert told == {"same": True, "lines": []}
    assert "Compiling" not in written


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told, _ = run("compiled", AMCT_LIGHTNING_CACHE=str(tmp_path / "file" / "folder"))
    assert told["same"]
    assert sorted(kernels_of(told["lines"])) == sorted(NEEDED)
    assert sorted(without_native(told["lines"])) == NOTHING_NATIVE


def damaged(file: Path, how: str) -> None:
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(
        {
            "empty": b"",
            "truncated": whole[: len(whole) // 3],
            "other bytes": whole[:middle] + bytes(1000) + whole[middle + 1000 :],
        }[how]
    )


@pytest.mark.parametrize("how", ["empty", "truncated", "other bytes", "without digest"])
def test_a_damaged_kernel_is_never_loaded(own_folder: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compiled again; here in a word, as what is compiled is not the matter."""
    file, loaded, compiled = build.kernel_file(REBUILD), [], []
    digest = file.with_name(f"{file.name}.sha256")
    good = file.read_bytes()
    if how == "without digest":
        digest.unlink()
    else:
        damaged(file, how)

    def compile_(_kernel: Kernel, path: Path) -> None:
        compiled.append(path.name)
        path.write_bytes(good)

    load = build._loaded
    monkeypatch.setattr(build, "_compile", compile_)
    monkeypatch.setattr(build, "_loaded", lambda path: (loaded.append(path.read_bytes() == good), load(path))[1])
    for _ in range(2):
        values = build.load(REBUILD)([torch.tensor([0.26, 9.0]), torch.tensor(0.5), torch.tensor(0.0)])[0]
        assert values.tolist() == [0.5, 9.0]
    assert compiled == [file.name]
    assert loaded == [True, True]
    assert digest.read_text() == hashlib.sha256(good).hexdigest()


def test_what_is_whole_but_cannot_be_loaded_falls_back(
    own_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where temporary files may not be executed: not compiled anew each time, which would not help."""
    file, bad = build.kernel_file(REBUILD), b"not a package"
    file.write_bytes(bad)
    file.with_name(f"{file.name}.sha256").write_text(hashlib.sha256(bad).hexdigest())
    monkeypatch.setattr(choice, "native_kernel", lambda kernel: None)
    executor = executor_for("compiled", "cpu")
    model = calibrated(case_named("linear"), Width())
    x, quantizer = torch.randn(4, 8), model.eval().layer.input_quantizer
    with caplog.at_level(logging.WARNING), torch.no_grad():
        values = [executor.quantize_input(quantizer, x)[0] for _ in range(3)]
        expected, _ = executor_for("composite", "cpu").quantize_input(quantizer, x)
    assert all(same(expected, value) for value in values)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("amct_lightning")]
    assert kernels_of(lines) == ["rebuild"]


def test_a_kernel_that_is_there_takes_no_compiler(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_compile", None)
    kernel = build.load(REBUILD)
    assert kernel([torch.tensor([0.26, 9.0]), torch.tensor(0.5), torch.tensor(0.0)])[0].tolist() == [0.5, 9.0]
    assert own_folder.parent.parent == Path(os.environ["AMCT_LIGHTNING_CACHE"])


def test_two_processes_compile_a_kernel_once(tmp_path: Path) -> None:
    """The second waits for the first, and loads what that wrote."""
    script = (
        "import torch\n"
        "from amct_lightning.quantizers.executors import build\n"
        "from amct_lightning.quantizers.executors.kernels import Kernel\n"
        "kernel = build.load(Kernel('codes', 8, False, torch.float32, 'cpu'))\n"
        "print(kernel([torch.tensor([0.26, 9.0]), torch.tensor(0.5), torch.tensor(-128.0)])[0].tolist())\n"
    )
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": root, "AMCT_LIGHTNING_CACHE": str(tmp_path)}
    start = [sys.executable, "-c", script]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = [subprocess.Popen(start, **pipes) for _ in range(2)]
    written = [process.communicate(timeout=300) for process in processes]
    assert [out.strip() for out, _ in written] == ["[1, 18]"] * 2, written
    assert sum("Compiling" in err for _, err in written) == 1
    assert len(list(tmp_path.rglob("*.pt2"))) == 1
    assert not list(tmp_path.rglob("tmp*"))


def test_another_cpu_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels use every instruction there is, and a home folder may be shared by machines."""
    key: Any = cache._machine
    before = key.__wrapped__()
    monkeypatch.setattr(cache, "_cpu", lambda: "flags: fpu")
    assert key.__wrapped__() != before


def test_other_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^here\(execution='eager'\): must be one of auto, comp"):
        check_execution("eager", "here")
    monkeypatch.setenv("AMCT_LIGHTNING_EXECUTION", "fast")
    with pytest.raises(ValueError, match="AMCT_LIGHTNING_EXECUTION"):
        resolved("auto", "cpu")
    assert resolved("composite", "cpu") == "composite"


def test_devices_without_kernels_run_the_reference_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    assert resolved("compiled", "npu") == "composite"
    executor_for.cache_clear()
    model = calibrated(case_named("linear"), Width())
    set_execution(model, "compiled")
    model.to("meta")
    for _ in range(2):
        assert model(torch.empty(3, 8, device="meta")).shape == (3, 5)
    assert execution_of(model) == "composite"
    assert caplog.messages == [
        "There are no compiled kernels for devices of type 'meta': quantization runs as 'composite'."
    ]


def test_kernels_of_a_process_are_shared_by_the_executors(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Kernel] = []
    load = build.load
    monkeypatch.setattr(build, "load", lambda kernel: (loaded.append(kernel), load(kernel))[1])
    monkeypatch.setattr(choice, "native_kernel", lambda kernel: None)
    monkeypatch.setenv("AMCT_LIGHTNING_EXECUTION", "compiled")
    case = case_named("linear")
    model = calibrated(case, Width()).eval()
    for execution in ("compiled", "auto"):
        set_execution(model, execution)
        with torch.no_grad():
            executor_for(execution, "cpu").quantize_input(model.layer.input_quantizer, case.input())
    assert loaded == [REBUILD]
