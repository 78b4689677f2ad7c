"""What one weight scale for a Linear costs against one per channel or group: networks quantized without retraining.

    python -m tests.benchmarks.linear_scales

Trains the two transformers of the examples in float, quantizes them and compares what goes into their last layer, on
the held-out data, with what goes into it in float. The same for the tokens of a BERT with
random weights. Then the same for the choices of activations, with a weight scale per channel.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from torch import Tensor, nn

from amct_lightning import calibrate, prepare_qat
from examples.hugging_face import Classification, TokenData
from examples.tabular import TabularTransformer, Tumours

SEEDS = (7, 8, 9)
TYPES = (("INT8", "INT8"), ("INT16", "INT8"), ("INT8", "INT4"))
GROUPS = (64, 32)
INPUTS: dict[str, dict[str, Any]] = {
    "learned clips": {},
    "symmetric": {"symmetric": True},
    "per token": {"algo": "per_token"},
    "in float": {"algo": "none"},
}
Case = tuple[nn.Module, str, Any, Any]
"""A network in float, the name of a layer near its end, a batch to calibrate on and one to measure on."""


def main() -> None:
    """Print the errors, medians of three networks, and by what factor a scale per channel makes them smaller."""
    torch.set_num_threads(1)
    print(f"{'network':24}{'types':13}{'one scale':>11}{'per channel':>13}{'factor':>8}  {'factors'}")
    for name, make in CASES.items():
        cases = [make(seed) for seed in SEEDS]
        for types in TYPES:
            scales = ({"channel_wise": False}, {"channel_wise": True})
            errors = [[error(case, types, weights) for weights in scales] for case in cases]
            one, many = (statistics.median(column) for column in zip(*errors, strict=True))
            factors = [first / second for first, second in errors]
            text = ", ".join(f"{factor:.1f}" for factor in factors)
            middle = statistics.median(factors)
            print(f"{name:24}{'/'.join(types):13}{one:11.2e}{many:13.2e}{middle:8.1f}  {text}", flush=True)
    _print_groups()
    _print_inputs()


def _print_inputs() -> None:
    print(f"{'network, INT8, per channel':28}" + "".join(f"{name:>15}" for name in INPUTS))
    for name, make in CASES.items():
        cases = [make(seed) for seed in SEEDS]
        errors = (
            [error(case, ("INT8", "INT8"), {"channel_wise": True}, inputs) for case in cases]
            for inputs in INPUTS.values()
        )
        print(f"{name:28}" + "".join(f"{statistics.median(column):15.2e}" for column in errors), flush=True)


def _print_groups() -> None:
    cases = [_bert(seed) for seed in SEEDS]
    for size in GROUPS:
        errors = [error(case, ("INT8", "INT4"), {"group_size": size}) for case in cases]
        print(f"BERT, random weights, INT8/INT4 in groups of {size}: {statistics.median(errors):.2e}", flush=True)


def error(case: Case, types: tuple[str, str], weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> float:
    """Return the squared error of what goes into the layer, relative to its mean square.

    Args:
        case: The network and its data.
        types: Those of activations and weights.
        weights: Which weights of a Linear share a scale.
        inputs: How activations are quantized, if not with learned clips.
    """
    (model, name, calibration, x), (data, weight) = case, types
    activations = inputs or {"dst_type": data}
    choices = {"activations": activations, "weights": {"dst_type": weight, **weights}}
    quantized = prepare_qat(model, choices, calibration)
    calibrate(quantized, [calibration])
    wanted, found = (features(one, name, x) for one in (model, quantized.eval()))
    return float((found - wanted).square().mean() / wanted.square().mean())


@torch.no_grad()
def features(model: nn.Module, name: str, x: Any) -> Tensor:
    """Return what goes into a layer of a network."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model(**x) if isinstance(x, Mapping) else model(x)
    handle.remove()
    return seen[0]


def _digits(seed: int) -> Case:
    model, data = _trained(Classification, TokenData(seed), 15, seed), TokenData(seed)
    batches = [data.train[range(450)], data.test[range(450)]]
    return model, "model.classifier", *({k: v for k, v in batch.items() if k != "labels"} for batch in batches)


def _tabular(seed: int) -> Case:
    data = Tumours(seed)
    return _trained(TabularTransformer, data, 60, seed), "head", data.train.tensors[0], data.test.tensors[0]


def _bert(seed: int) -> Case:
    torch.manual_seed(seed)
    settings = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=500, **settings))
    words = ({"input_ids": torch.randint(500, (16, 32))} for _ in range(2))
    return model.eval(), "bert.encoder.layer.3.output.LayerNorm", *words


def _trained(kind: type[pl.LightningModule], data: pl.LightningDataModule, epochs: int, seed: int) -> nn.Module:
    pl.seed_everything(seed, verbose=False)
    model = kind()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", limit_val_batches=0, **quiet)
    trainer.fit(model, datamodule=data)
    return model.eval()


CASES: dict[str, Callable[[int], Case]] = {
    "digits transformer": _digits,
    "tabular transformer": _tabular,
    "BERT, random weights": _bert,
}


if __name__ == "__main__":
    main()
