"""Time and memory of exporting and verifying a network of the size of ResNet-50, and the time of the integer reference.

    python -m tests.benchmarks.export [--size 224] [--batch 1]

Memory is how far the peak of the process lies above what it has with the calibrated model, in sizes of the float model.
The reference runs a ResNet-18 on a batch of 32 images of 32x32 pixels.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from amct_lightning import calibrate, export_onnx, prepare_qat, verify_export
from amct_lightning.export.integer import DeployedNetwork
from amct_lightning.export.onnx_file import export_forms

FORMS = ("deploy", "fake_quant", "qdq")


def memory(field: str) -> int:
    """What Linux says of the memory of the process, in bytes: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def calibrated(config: transformers.ResNetConfig, images: torch.Tensor) -> torch.nn.Module:
    """A quantized model that has run once."""
    torch.manual_seed(0)
    model = prepare_qat(transformers.ResNetForImageClassification(config), None, images, inplace=True)
    calibrate(model, [images])
    model.eval()(images)
    return model


def reference() -> None:
    """Time a ResNet-18 in the integer reference, with torch's evaluation beside it."""
    images = torch.randn(32, 3, 32, 32)
    config = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic"
    )
    model = calibrated(config, images)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        network = DeployedNetwork(export_onnx(model, Path(folder) / "deploy.onnx", images, "deploy").path)
        feed = {next(iter(network.file.inputs)): images.numpy()}
        times: dict[str, list[float]] = {"reference": [], "torch": []}
        for _ in range(5):
            for name, run in (("reference", lambda: network.run(feed)), ("torch", lambda: model(images))):
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    medians = {name: sorted(values)[2] for name, values in times.items()}
    print(f"ResNet-18, 32 images: reference {medians['reference']:.2f} s, torch {medians['torch']:.2f} s")


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    reference()
    images = torch.randn(args.batch, 3, args.size, args.size)
    model = calibrated(transformers.ResNetConfig(), images)
    floats = sum(parameter.nbytes for parameter in model.parameters())
    print(f"float model: {floats / 2**20:.0f} MiB, {sum(1 for _ in model.parameters())} parameters")
    with tempfile.TemporaryDirectory() as folder:
        files: Any = {form: Path(folder) / f"{form}.onnx" for form in FORMS}
        before, start = memory("VmRSS"), time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        export_forms(model, files, images)
        print(f"export: {time.perf_counter() - start:.1f} s, +{(memory('VmHWM') - before) / floats:.2f} sizes")
        for form, file in files.items():
            print(f"  {form}: {file.stat().st_size / floats:.3f} of the float size")
        start = time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")
        report = verify_export(model, files, [images])
        seconds, grown = time.perf_counter() - start, (memory("VmHWM") - before) / floats
        print(f"verification: {seconds:.1f} s, +{grown:.2f} sizes, ok={report.ok}")


if __name__ == "__main__":
    main()
