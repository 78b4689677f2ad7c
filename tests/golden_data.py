"""Reading the golden data, and doing again what was done when it was recorded."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from amct_lightning import QuantRecord, create_quant_retrain_model
from tests.golden.models import MODELS

GOLDEN = Path(__file__).parent / "golden"
ALL_CASES = {path.parent.name: json.loads(path.read_text()) for path in sorted(GOLDEN.glob("models_data/*/meta.json"))}
"""Every recorded run: name -> what is known of it."""
MODEL_CASES = [name for name, meta in ALL_CASES.items() if meta.get("raised_in") in (None, "save_quant_retrain_model")]
"""The cases that AMCT trains to the end."""
FAILS_IN_TRAINING = [name for name, meta in ALL_CASES.items() if meta.get("raised_in") == "train"]
"""The cases that AMCT converts and then fails to train."""


@dataclass(frozen=True)
class OperatorCase:
    """One entry of an operator vector file."""

    name: str
    entry: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def params(self) -> dict[str, Any]:
        return self.entry["params"]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[f"{self.name}/{key}"]


def operator_cases(vectors: str, failed_in: str | None = None) -> list[OperatorCase]:
    """Read ``ops/<vectors>``: the cases for which AMCT gives a result, or whose backward (say) failed."""
    tensors = load_file(GOLDEN / "ops" / f"{vectors}.safetensors")
    entries = json.loads((GOLDEN / "ops" / f"{vectors}.json").read_text())
    return [
        OperatorCase(entry["case"], entry, tensors)
        for entry in entries
        if "params" in entry and entry.get("error_in", entry.get("error_type")) == failed_in
    ]


@dataclass(frozen=True)
class ModelCase:
    """One recorded training run."""

    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def record(self) -> QuantRecord:
        return QuantRecord.from_text(self.meta["record_text"])

    def group(self, prefix: str) -> tuple[Tensor, ...]:
        return tuple(self.tensors[key] for key in sorted(self.tensors) if key.startswith(prefix))

    def float_model(self) -> nn.Module:
        model = MODELS[self.meta["model"]]()
        prefix = "init/"
        state = {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}
        model.load_state_dict(state)
        return model

    def loss(self, output: Tensor, step: int) -> Tensor:
        kind = F.cross_entropy if self.meta["loss_kind"] == "cross_entropy" else F.mse_loss
        return kind(output, self.tensors[f"y/{step}"])

    def train(self, model: nn.Module) -> tuple[list[float], Tensor]:
        """Train a converted model as recorded; return the loss of every step and the first output."""
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=self.meta["lr"], momentum=self.meta["momentum"])
        losses, outputs = [], []
        for step in range(self.meta["steps"]):
            outputs.append(model(*self.group(f"x/{step}/")))
            loss = self.loss(outputs[-1], step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, outputs[0].detach()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Tensor:
        return model.eval()(*self.group("eval_x/"))


@cache
def model_case(name: str) -> ModelCase:
    folder = GOLDEN / "models_data" / name
    return ModelCase(ALL_CASES[name], load_file(folder / "tensors.safetensors"))


@dataclass(frozen=True)
class Run:
    """What this package makes of a model case."""

    losses: list[float]
    first_out: Tensor
    eval_out: Tensor
    record: QuantRecord
    record_text: str
    float_state_before: dict[str, Tensor]
    float_state_after: dict[str, Tensor]


def run_model_case(case: ModelCase, folder: Path) -> Run:
    """Do with the functions of this package what was done with AMCT's."""
    config, record = folder / "config.json", folder / "record.txt"
    config.write_text(case.meta["config_used"])
    model = case.float_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*INT8 is used instead of INT4.*")
        converted = create_quant_retrain_model(str(config), model, str(record), case.group("cal/"))
    losses, first_out = case.train(converted)
    eval_out = case.evaluate(converted)
    return Run(losses, first_out, eval_out, QuantRecord.load(record), record.read_text(), before, model.state_dict())
