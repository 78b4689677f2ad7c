"""Integer codes that differ from the reference's with the other executors, after one forward and after some steps.

python -m tests.benchmarks.flips [--steps 20] [resnet vit mlp]
"""

from __future__ import annotations

import argparse
import copy
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from amct_lightning import prepare_qat
from amct_lightning.modules import quantized_layers
from amct_lightning.modules.deployed import weight_codes
from amct_lightning.modules.fused.choice import set_execution
from amct_lightning.quantizers.executors import Execution
from amct_lightning.quantizers.functional import quantize
from tests.benchmarks.networks import CLASSES, networks

Codes = dict[str, list[Tensor]]
EXECUTORS: tuple[Execution, ...] = ("composite", "compiled", "integer")
NUDGED = "composite, weights nudged"
"""The reference with weights that differ in the last bit, as rounded sums do: how far that alone leads away."""


def codes_of(model: nn.Module, x: Tensor) -> Codes:
    """Return the codes of all inputs and weights in a forward of training, which leaves the model as it was."""
    model = copy.deepcopy(model)
    found: Codes = {"activations": [], "weights": []}

    def note(layer: Any, args: tuple[Tensor, ...]) -> None:
        quantizer = layer.input_quantizer
        found["activations"].append(quantize(args[0].detach(), quantizer.scale, quantizer.num_bits, quantizer.offset))
        weight, kept = layer.weight.detach(), layer.weight_quantizer
        scale = kept.present_scale(weight)
        found["weights"].append(weight_codes(weight, scale, kept.layout, kept.num_bits))

    for layer in quantized_layers(model).values():
        layer.register_forward_pre_hook(note)
    with torch.no_grad():
        model(x)
    return found


def train(model: nn.Module, x: Tensor, steps: int) -> None:
    """Do steps of SGD on one batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    target = torch.arange(len(x)) % CLASSES
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), target).backward()
        optimizer.step()


@torch.no_grad()
def nudged(model: nn.Module) -> nn.Module:
    """Return a copy whose quantized layers have weights that are larger by their last bit."""
    model = copy.deepcopy(model)
    for layer in quantized_layers(model).values():
        weight: Any = layer.weight
        weight.mul_(1 + 2**-23)
    return model


def flipped(codes: Codes, reference: Codes) -> list[str]:
    """Say for inputs and weights how many codes differ, out of how many, and by how much at the most."""
    cells = []
    for kind, tensors in codes.items():
        steps = [(a.float() - b.float()).abs() for a, b in zip(tensors, reference[kind], strict=True)]
        count, number = sum(int((s > 0).sum()) for s in steps), sum(s.numel() for s in steps)
        most = max(int(s.max()) for s in steps)
        share = f" ({count / number:.2%}), by at most {most}" if count else ""
        cells.append(f"{count:,} of {number:,}{share}")
    return cells


def compare(title: str, model: nn.Module, x: Tensor, steps: int) -> None:
    """Print the lines of a network."""
    start = prepare_qat(model, None, x, execution="composite").train()
    start(x)  # calibrates
    models = {name: copy.deepcopy(start) for name in EXECUTORS}
    for name, trained in models.items():
        set_execution(trained, name)
    models[NUDGED] = nudged(models["composite"])
    for after in (0, steps):
        for trained in models.values():
            train(trained, x, after)
        codes = {name: codes_of(trained, x) for name, trained in models.items()}
        when = f"{after} steps" if after else "one forward"
        for name in [*EXECUTORS[1:], NUDGED]:
            cells = flipped(codes[name], codes["composite"])
            print(f"| {title} | {name} | {when} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=["resnet", "vit", "mlp"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16, help="rows of a batch that are taken")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, load {os.getloadavg()[0]:.1f}\n")
    print("| network | executor | after | codes of activations that differ | codes of weights |\n|---|---|---|---|---|")
    for name, network in networks().items():
        if name in args.networks:
            compare(network.title.split(",")[0], network.model, x=network.x[: args.batch], steps=args.steps)


if __name__ == "__main__":
    main()
