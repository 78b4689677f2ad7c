"""The command line of ATC: a shell reads from it what was meant."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from amct_lightning.export.atc import atc_command
from amct_lightning.targets import ATC_TARGETS, TARGETS

IMAGE = {"image": (1, 3, 32, 32)}


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Run a command with an ``atc`` that prints its arguments, one a line."""
    atc = tmp_path / "bin" / "atc"
    atc.parent.mkdir()
    atc.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    atc.chmod(atc.stat().st_mode | stat.S_IXUSR)

    def arguments(command: str, **environment: str) -> list[str]:
        script = tmp_path / "command.sh"
        script.write_text(command)
        variables = {"PATH": f"{atc.parent}{os.pathsep}{os.environ['PATH']}", **environment}
        done = subprocess.run(["sh", str(script)], env=variables, capture_output=True, encoding="utf-8", check=True)
        return done.stdout.splitlines()

    return arguments


def test_a_shell_reads_the_options(run: Any) -> None:
    shapes = {"ids": (1, 128), "mask": (1, 1, 128)}
    command = atc_command("out/net_deploy_model.onnx", "A2", soc_version="Ascend910B3", input_shapes=shapes)
    assert run(command) == [
        "--model=out/net_deploy_model.onnx",
        "--framework=5",
        "--output=out/net_deploy_model",
        "--soc_version=Ascend910B3",
        "--input_format=ND",
        "--input_shape=ids:1,128;mask:1,1,128",
    ]
    assert "#" not in command


@pytest.mark.parametrize("name", ["x", "input.1", "input:0", "it's", 'the "x"', "$HOME `id`", "图像"])
@pytest.mark.parametrize("path", ["net.onnx", "a b/$x 'y'.onnx", "模型/net.onnx"])
def test_names_and_paths_arrive_as_they_are(run: Any, name: str, path: str) -> None:
    got = run(atc_command(path, "310P", input_shapes={name: (2, 4)}))
    assert got[0] == f"--model={path}"
    assert got[2] == f"--output={path.removesuffix('.onnx')}"
    assert got[5] == f"--input_shape={name}:2,4"


def test_a_scalar_has_no_lengths(run: Any) -> None:
    assert run(atc_command("n.onnx", "310P", input_shapes={"t": (), "x": (1, 4)}))[5] == "--input_shape=t:;x:1,4"


@pytest.mark.parametrize("target", ATC_TARGETS)
def test_the_processor_is_that_of_the_target_or_asked_of_the_environment(run: Any, target: str) -> None:
    command, facts = atc_command("n.onnx", target, input_shapes=IMAGE), ATC_TARGETS[target]
    if facts.soc_version is not None:
        assert run(command)[3] == f"--soc_version={facts.soc_version}"
        return
    assert run(command, SOC_VERSION="Ascend_mine")[3] == "--soc_version=Ascend_mine"
    assert facts.soc_examples[0] in command
    assert "npu-smi info" in command
    with pytest.raises(subprocess.CalledProcessError):
        run(command)


def test_without_a_target_all_ways_to_the_processor_are_told() -> None:
    command = atc_command("n.onnx", input_shapes=IMAGE)
    assert all(f"#   {TARGETS[target].products}: export SOC_VERSION=" in command for target in ATC_TARGETS)
    assert "vllm" not in command


def test_servers_compile_nothing() -> None:
    with pytest.raises(ValueError, match=r"^atc_command: target 'serving' \(vllm.*ATC compiles for 'A2', 'A3', "):
        atc_command("n.onnx", "serving", input_shapes=IMAGE)


def test_a_processor_of_another_target_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'Ascend310P3'\): it belongs to target '310P'. Those of target 'A2' begin"):
        atc_command("n.onnx", "A2", soc_version="Ascend310P3", input_shapes=IMAGE)
    assert "Ascend910B3" in atc_command("n.onnx", soc_version="Ascend910B3", input_shapes=IMAGE)
    with pytest.raises(ValueError, match="atc_command: target='A7': there is no such target"):
        atc_command("n.onnx", "A7", input_shapes=IMAGE)


@pytest.mark.parametrize(
    ("shape", "text"), [((-1, 4), "-1,4"), (("batch", 4), "-1,4"), (("1~8", 4), "1~8,4"), (("2~-1", 4), "2~-1,4")]
)
def test_open_axes_are_written_and_said_not_to_go_with_quantized_models(run: Any, shape: Any, text: str) -> None:
    command = atc_command("n.onnx", "310P", input_shapes={"x": shape})
    assert run(command)[5] == f"--input_shape=x:{text}"
    assert command.startswith("# ATC does not convert quantized models with dynamic shapes (CANN 8.0 to 9.1)")


def test_sizes_of_a_batch(run: Any) -> None:
    shapes = {"x": ("batch", 4), "mask": (1, 4)}
    got = run(atc_command("n.onnx", "310P", input_shapes=shapes, dynamic_batch_size=[1, 2, 8]))
    assert got[5:] == ["--input_shape=x:-1,4;mask:1,4", "--dynamic_batch_size=1,2,8"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shapes": {}}, "found none"),
        ({"input_shapes": {"a;b": (1,)}}, "must have no ';', found 'a;b'"),
        ({"input_shapes": {"x": (0, 4)}}, "input 'x' has an axis of length 0"),
        ({"input_shapes": {"x": (-2, 4)}}, "input 'x' has an axis of length -2"),
        ({"input_shapes": {"x": (-1, 4)}, "dynamic_batch_size": [4]}, "takes two sizes or more"),
        ({"input_shapes": {"x": (1, -1)}, "dynamic_batch_size": [1, 2]}, r"axes that are: 'x': \[1\]"),
        ({"input_shapes": {"x": (1, 4)}, "dynamic_batch_size": [1, 2]}, r"axes that are: 'x': \[\]"),
    ],
)
def test_what_atc_would_refuse_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"atc_command.*{message}"):
        atc_command("n.onnx", "310P", **options)


def test_the_format_is_that_of_five_axes_where_all_inputs_have_five(run: Any) -> None:
    video = {"video": (1, 3, 4, 8, 8)}
    assert run(atc_command("n.onnx", "310P", input_shapes=video))[4] == "--input_format=NCDHW"
    assert run(atc_command("n.onnx", "310P", input_shapes=video | IMAGE))[4] == "--input_format=ND"
    assert run(atc_command("n.onnx", "310P", input_shapes=IMAGE, input_format="NCHW"))[4] == "--input_format=NCHW"


def test_a_path_that_atc_does_not_take_is_told() -> None:
    assert "# ATC takes letters" in atc_command("my nets/n.onnx", "310P", input_shapes=IMAGE)
    assert "#" not in atc_command("网络/n-1_a.onnx", "310P", input_shapes=IMAGE)


@pytest.mark.parametrize("output", ["out/mine", "out/mine.om", Path("out/mine")])
def test_the_offline_model_is_where_it_was_wanted(run: Any, output: Any) -> None:
    assert run(atc_command("n.onnx", "310P", input_shapes=IMAGE, output=output))[2] == "--output=out/mine"
