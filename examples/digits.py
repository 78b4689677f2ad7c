"""Quantization-aware training in Lightning, end to end, on real handwritten digits.

Trains a small depthwise-separable CNN in FP32, then fine-tunes it twice with ``QuantRetrainCallback``: with INT8,
and with INT4 (A4W4) where the hardware can pack it; and once more in FP32, for as long, so that the comparison is
fair. Then it exports the quantized networks and verifies them: the column "deployed" is the accuracy of the very file
that the Ascend compiler takes, computed as the device computes. Training computes so as well (``deploy_grid``), so that
nothing changes with the export. Stop it whenever you like, even with ``kill -9``: started again with the same ``--out``
it goes on where it was, to the bit.

    python examples/digits.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from digits_data import DigitsData, digits
from digits_model import Digits
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

from amct_lightning import QuantRetrainCallback, RetrainConfig, calibrate, export_onnx, prepare_qat, verify_export
from amct_lightning.callbacks import AtomicCheckpointIO
from amct_lightning.export.integer import run_deployed

EXAMPLE_INPUT = torch.zeros(1, 1, 8, 8)


class Row(NamedTuple):
    """A network of the table: its title, its name in file names, its accuracies, and how the files were verified."""

    title: str
    name: str
    before: float | None
    after: float | None
    deployed: float | None = None
    verified: str = ""


def int4_config(model: nn.Module) -> RetrainConfig:
    """A4W4 for all layers but the first and the depthwise ones, whose weights cannot be packed in pairs."""
    config = RetrainConfig.default(model, EXAMPLE_INPUT)
    for name, layer in config.items():
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear) or (module.groups == 1 and module.in_channels % 2 == 0):
            config[name] = replace(
                layer,
                retrain_data_config=replace(layer.retrain_data_config, dst_type="INT4"),
                retrain_weight_config=replace(layer.retrain_weight_config, dst_type="INT4"),
            )
    return config


def fit(name: str, model: Digits, epochs: int, out: Path, seed: int, callbacks: list[pl.Callback]) -> None:
    """Train one phase, or the rest of it if it was interrupted."""
    folder = out / name
    last = folder / "last.ckpt"
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=CSVLogger(out / "logs", name=name),
        plugins=[AtomicCheckpointIO()],
        callbacks=[
            ModelCheckpoint(
                folder, "{epoch}", save_last=True, save_on_train_epoch_end=True, enable_version_counter=False
            ),
            RichProgressBar(),
            *callbacks,
        ],
        log_every_n_steps=20,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=DigitsData(seed), ckpt_path=last if last.exists() else None)


@torch.no_grad()
def accuracy(net: nn.Module, seed: int) -> float:
    """Share of the held-out digits that a network reads correctly."""
    x, y = next(iter(digits(seed)[1]))
    return float((net.eval()(x).argmax(1) == y).float().mean())


def quantized_only(model: nn.Module, config: RetrainConfig, args: argparse.Namespace) -> nn.Module:
    """Quantize without retraining: calibrate on one training batch, change no weight."""
    quantized = prepare_qat(model, config, EXAMPLE_INPUT, deploy_grid=args.deploy_grid)
    calibrate(quantized, (x for x, _ in digits(args.seed)[0]))
    return quantized


def step_times(nets: dict[str, nn.Module], seed: int, rounds: int = 21, warm_up: int = 3) -> dict[str, float]:
    """Median milliseconds of a training step with its optimizer; the networks are trained in turns, in one process.

    Conversion and calibration are over, and the rounds for warming up do not count. It is the processor's time, as this
    is one thread: what else runs on the machine would lengthen the steps of one network and not those of another.
    """
    x, y = next(iter(digits(seed)[0]))
    optimizers = {name: torch.optim.AdamW(net.train().parameters(), lr=1e-4) for name, net in nets.items()}
    times: dict[str, list[float]] = {name: [] for name in nets}
    for number in range(warm_up + rounds):
        for name in sorted(nets, reverse=number % 2 == 0):  # none always follows the same one
            start = time.process_time()
            optimizers[name].zero_grad()
            functional.cross_entropy(nets[name](x), y).backward()
            optimizers[name].step()
            times[name].append(time.process_time() - start)
    return {name: 1000 * statistics.median(values[warm_up:]) for name, values in times.items()}


def deploy(title: str, name: str, net: nn.Module, args: argparse.Namespace) -> tuple[float, str]:
    """Write a network for the device and for onnxruntime, compare both with it, and test what the device will compute.

    The batch axis stays open so that one file takes all test digits; ``atc --input_shape`` fixes it for the device.
    """
    x, y = next(iter(digits(args.seed)[1]))
    files = {form: args.out / f"{name}_{form}_model.onnx" for form in ("deploy", "qdq")}
    for form, path in files.items():
        export_onnx(net.eval(), path, EXAMPLE_INPUT, form, dynamic_axes={"x": {0: "batch"}})
    report = verify_export(net, files, [x])
    report.save(args.out / f"{name}_verification.json")
    [scores] = run_deployed(files["deploy"], {"x": x.numpy()}).values()
    share = float((torch.from_numpy(scores).argmax(1) == y).float().mean())
    deployed = report.forms[0]
    [output] = deployed.outputs
    flipped, codes = (sum(getattr(layer, of) for layer in deployed.layers) for of in ("codes_flipped", "codes"))
    verdict = "computes what was trained" if report.ok else f"departs from what was trained: {report.first_departure}"
    return share, (
        f"{title}, deployed: {verdict}. Top class as in torch: {output.same_top} of {output.rows} digits, and "
        f"{output.ties} at a tie. {flipped:,} of {codes:,} codes differ by rounding."
    )


def finetune(name: str, start: nn.Module, args: argparse.Namespace, callbacks: list[pl.Callback]) -> Digits:
    """Train a copy of the float model for the same number of epochs and at the same rate, whatever is added to it."""
    model = Digits(lr=6e-3)
    model.load_state_dict(start.state_dict())
    fit(name, model, args.qat_epochs, args.out, args.seed, callbacks)
    return model


def main() -> None:
    """Run the four phases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/digits"), help="folder for checkpoints, records and logs"
    )
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=15, help="epochs of FP32 training")
    parser.add_argument("--qat-epochs", type=int, default=10, help="epochs of each fine-tuning")
    parser.add_argument(
        "--deploy-grid",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute with what the device computes with; without it as in AMCT",
    )
    args = parser.parse_args()

    torch.set_num_threads(1)  # a network this small is not faster with more, and much slower on a busy machine
    pl.seed_everything(args.seed)
    float_model = Digits(lr=1e-2)
    fit("fp32", float_model, args.epochs, args.out, args.seed, [])

    longer = finetune("fp32_longer", float_model, args, [])
    configs = {"int8": RetrainConfig.default(float_model, EXAMPLE_INPUT), "a4w4": int4_config(float_model)}
    nets: dict[str, nn.Module] = {"fp32": float_model}
    rows = [
        Row("FP32", "fp32", accuracy(float_model, args.seed), None),
        Row("FP32, trained as long", "fp32_longer", None, accuracy(longer, args.seed)),
    ]
    for name, config in configs.items():
        args.out.mkdir(parents=True, exist_ok=True)
        config.to_json(args.out / f"{name}.json")
        before = accuracy(quantized_only(float_model, config, args), args.seed)
        record = args.out / f"{name}.record.txt"
        callback = QuantRetrainCallback(args.out / f"{name}.json", record, deploy_grid=args.deploy_grid)
        nets[name] = finetune(name, float_model, args, [callback])
        after = accuracy(nets[name], args.seed)
        rows.append(Row(name.upper(), name, before, after, *deploy(name.upper(), name, nets[name], args)))
    show(rows, step_times(nets, args.seed), args.out)


def show(rows: list[Row], times: dict[str, float], out: Path) -> None:
    """Print the results, and where the files are."""
    results = Table(title="Accuracy on 450 held-out handwritten digits")
    for column in ("network", "not retrained", "retrained", "deployed", "training step"):
        results.add_column(column, justify="left" if column == "network" else "right")
    files = Table(title="Files", show_lines=False)
    for column in ("network", "checkpoint", "record file"):
        files.add_column(column, overflow="fold")
    for row in rows:
        time_of = times.get(row.name)
        step = "-" if time_of is None else f"{time_of:.0f} ms ({time_of / times['fp32']:.1f}x)"
        shares = ("-" if share is None else f"{share:.1%}" for share in (row.before, row.after, row.deployed))
        results.add_row(row.title, *shares, step)
        record = out / f"{row.name}.record.txt"
        files.add_row(row.title, str(out / row.name / "last.ckpt"), str(record) if record.exists() else "-")
    console = Console()
    console.print(results, *(f"- {row.verified}" for row in rows if row.verified), files, sep="\n", highlight=False)
    console.print(f"For the Ascend compiler: {out / '*_deploy_model.onnx'}", highlight=False)
    console.print(f"Logs: {out / 'logs'}", highlight=False)


if __name__ == "__main__":
    main()
