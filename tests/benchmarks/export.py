"""Time and memory of exporting and verifying a network of the size of ResNet-50.

    python -m tests.benchmarks.export [--size 224] [--batch 1]

Memory is the growth of the peak of the process over what it has with the calibrated model, in sizes of the float model.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from amct_lightning import calibrate, prepare_qat, verify_export
from amct_lightning.export.onnx_file import export_forms

FORMS = ("deploy", "fake_quant", "qdq")


def peak() -> int:
    """The largest memory of the process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig())
    images = torch.randn(args.batch, 3, args.size, args.size)
    floats = sum(parameter.nbytes for parameter in model.parameters())
    model = prepare_qat(model, None, images, inplace=True)
    calibrate(model, [images])
    model.eval()(images)
    print(f"float model: {floats / 2**20:.0f} MiB, {sum(1 for _ in model.parameters())} parameters")
    with tempfile.TemporaryDirectory() as folder:
        files: Any = {form: Path(folder) / f"{form}.onnx" for form in FORMS}
        before, start = peak(), time.perf_counter()
        export_forms(model, files, images)
        print(f"export of three forms: {time.perf_counter() - start:.1f} s, +{(peak() - before) / floats:.2f} sizes")
        for form, file in files.items():
            print(f"  {form}: {file.stat().st_size / floats:.3f} of the float size")
        before, start = peak(), time.perf_counter()
        report = verify_export(model, files, [images])
        seconds, grown = time.perf_counter() - start, (peak() - before) / floats
        print(f"verification: {seconds:.1f} s, +{grown:.2f} sizes, ok={report.ok}")


if __name__ == "__main__":
    main()
