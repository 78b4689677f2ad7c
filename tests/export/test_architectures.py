"""Whole architectures of the transformers library leave as ONNX and run in onnxruntime as in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from amct_lightning import calibrate, prepare_qat
from amct_lightning.export.onnx_file import export_forms
from tests.architectures.models import ARCHITECTURES, Architecture

NOT_EXPRESSIBLE = {
    "MixtralForCausalLM": r"scaled_dot_product_attention runs in 'model\.layers\.0\.self_attn' \(MixtralAttention\)"
}
"""Architectures whose float model torch cannot translate either, and the operator that it names."""
CHANGED_CODES = {"EfficientNetForImageClassification": 0.05, "SwitchTransformersForConditionalGeneration": 0.01}
"""Where a value lies so near to a tie that it is rounded the other way, and how much that makes of the output."""


def evaluated(architecture: Architecture, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The calibrated model, and an input without labels, which a deployed network does not get."""
    torch.manual_seed(0)
    model, inputs = architecture.build(), architecture.inputs()
    labels = inputs.pop("labels", None)
    inputs.pop("return_loss", None)
    if model.config.is_encoder_decoder and labels is not None:
        inputs["decoder_input_ids"] = labels
    quantized = prepare_qat(model, None, inputs, **options)
    calibrate(quantized, [inputs])
    return quantized.eval(), inputs


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_an_architecture_gives_the_same_in_onnxruntime(architecture: Architecture, tmp_path: Path) -> None:
    model, inputs = evaluated(architecture)
    files: Any = {form: tmp_path / f"{form}.onnx" for form in ("deploy", "fake_quant", "qdq")}
    if str(architecture) in NOT_EXPRESSIBLE:
        with pytest.raises(RuntimeError, match=NOT_EXPRESSIBLE[str(architecture)]):
            export_forms(model, files, inputs)
        assert not list(tmp_path.iterdir())
        return
    reports = export_forms(model, files, inputs)
    with torch.no_grad():
        expected = [leaf.numpy() for leaf in tree_leaves(model(**inputs)) if isinstance(leaf, Tensor)]
    for form in ("fake_quant", "qdq"):
        session = onnxruntime.InferenceSession(files[form])
        outputs = session.run(None, {entry.name: inputs[entry.name].numpy() for entry in session.get_inputs()})
        assert len(outputs) == len(expected) == len(reports["qdq"].outputs)
        for found, wanted in zip(outputs, expected, strict=True):
            tolerance = CHANGED_CODES.get(str(architecture), 1e-4)
            np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max())
