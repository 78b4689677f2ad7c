"""Models with the state and the record with which AMCT wrote its golden exports."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from amct_lightning import QuantRecord, convert_amct_state_dict, create_quant_retrain_model
from tests.golden_data import GOLDEN, ModelCase, model_case


@dataclass(frozen=True)
class GoldenExport:
    """What AMCT exported, and the model here that is to give the same."""

    case: ModelCase
    export: dict[str, Any]
    model: nn.Module
    config_file: str
    record_file: str

    @property
    def fake_quant_output(self) -> torch.Tensor:
        """What onnxruntime made of AMCT's fake-quant file."""
        return load_file(GOLDEN / "fake_quant_outputs.safetensors")[self.case.meta["case"]]

    @property
    def input_data(self) -> tuple[torch.Tensor, ...]:
        return self.case.group("eval_x/")


def golden_export(name: str, folder: Path) -> GoldenExport:
    """Convert the model of a case and give it the state at the end of the recorded run."""
    case = model_case(name)
    config, record = folder / "config.json", folder / "record.txt"
    config.write_text(case.meta["config_used"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = create_quant_retrain_model(str(config), case.float_model(), str(record), case.group("cal/"))
        model.load_state_dict(_state(case, model))
    record.write_text(case.meta["record_text"])
    return GoldenExport(case, read_export(name), model.eval(), str(config), str(record))


@cache
def read_export(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / "models_data" / name / "export.json").read_text())


def _state(case: ModelCase, model: nn.Module) -> dict[str, torch.Tensor]:
    """The recorded state in this package's names; of recurrent layers the biases that AMCT exports, untrained ones."""
    amct = {key.removeprefix("final/"): value for key, value in case.tensors.items() if key.startswith("final/")}
    for key in [key for key in amct if ".comp_module.bias" in key]:
        amct[key] = amct[key.replace("comp_module", "replaced_module")]
    return convert_amct_state_dict(amct, model)


def record_of(golden: GoldenExport) -> QuantRecord:
    return QuantRecord.load(golden.record_file)
