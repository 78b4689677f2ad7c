"""How a network is trained: in float, quantized by this package, quantized by others."""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amct_lightning import QuantRecord, calibrate, prepare_qat

FP32, LOOP, OWN, COMPILED = "fp32", "fp32-loop", "amct_lightning", "+compile"
EXECUTORS = ("composite", "compiled", "integer")


@dataclass(frozen=True)
class Variant:
    """A way of training.

    Attributes:
        title: What it is called in tables.
        convert: Makes of a float network and a batch the network that is trained; the float one is left as it is.
        calibrate: What comes once before the training, if anything does.
        record: Gives the factors that training has found, if it can.
        needs: The module that has to be installed.
        is_own: Whether it is this package's.
        compiled: Whether the whole network goes through ``torch.compile``.
    """

    title: str
    convert: Callable[[nn.Module, Tensor], nn.Module]
    calibrate: Callable[[nn.Module, Tensor], object] | None = None
    record: Callable[[nn.Module], object] | None = None
    needs: str = "torch"
    is_own: bool = False
    compiled: bool = False

    @property
    def missing(self) -> str:
        """Why it cannot be measured here; empty if it can."""
        if find_spec(self.needs):
            return ""
        install = ".venv/bin/pip install --constraint constraints.txt --editable '.[bench]'"
        how = "it comes with Ascend's toolkit" if self.needs == "amct_pytorch" else install
        return f"{self.needs} is not installed: {how}"


def executors() -> list[str]:
    """Return the executors that this package lets one choose."""
    return list(EXECUTORS) if "execution" in inspect.signature(prepare_qat).parameters else []


def own(**execution: str) -> Variant:
    """Return a variant of this package."""
    title = f"{OWN}, {execution['execution']}" if execution else OWN
    return Variant(
        title,
        lambda model, x: prepare_qat(model, None, x, **execution),
        lambda model, x: calibrate(model, [x]),
        QuantRecord.from_model,
        is_own=True,
    )


def variants() -> dict[str, Variant]:
    """Return all variants by name."""
    return {
        FP32: Variant("FP32", lambda model, x: copy.deepcopy(model)),
        OWN: own(),
        **{name: own(execution=name) for name in executors()},
        "torch.ao": Variant("torch.ao FX", _torch_ao),
        "torchao": Variant("torchao", _torchao, needs="torchao"),
        "modelopt": Variant("modelopt", _modelopt, needs="modelopt"),
        "amct": Variant("amct_pytorch", partial(amct, "amct_pytorch"), lambda model, x: model(x), needs="amct_pytorch"),
    }


def usual(names: list[str]) -> list[str]:
    """Leave out what another variant measures already: this package's choice among the executors it has."""
    return [name for name in names if name != OWN or not executors()]


def whole(variant: Variant) -> Variant:
    """Return the variant with the whole network compiled."""
    return replace(variant, title=f"{variant.title}, torch.compile", compiled=True)


def _torch_ao(model: nn.Module, x: Tensor) -> nn.Module:
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    _check_share(model, "torch.ao", nn.Linear, nn.Conv2d)
    mapping = get_default_qat_qconfig_mapping("x86").set_object_type(nn.Embedding, None)  # it needs another one
    return prepare_qat_fx(copy.deepcopy(model).train(), mapping, (x,))


def _torchao(model: nn.Module, x: Tensor) -> nn.Module:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    _check_share(model, "torchao", nn.Linear)
    quantized = copy.deepcopy(model)
    activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    quantize_(quantized, QATConfig(activation_config=activations, weight_config=weights, step="prepare"))
    return quantized


def _check_share(model: nn.Module, package: str, *quantized: type[nn.Module]) -> None:
    """Refuse to compare with a package that leaves half of a network in float, or more."""
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d, nn.LSTM))]
    count = sum(isinstance(layer, quantized) for layer in layers)
    if count <= len(layers) / 2:
        raise ValueError(f"{package} would quantize {count} of {len(layers)} layers")


def _modelopt(model: nn.Module, x: Tensor) -> nn.Module:
    from modelopt.torch import quantization

    config = quantization.INT8_DEFAULT_CFG
    return quantization.quantize(copy.deepcopy(model), config, forward_loop=lambda quantized: quantized(x))


def amct(module: str, model: nn.Module, x: Tensor) -> nn.Module:
    """Convert as a script for AMCT does, which calibrates in its first training step.

    Args:
        module: The name of the module that has AMCT's functions.
        model: The float network.
        x: A batch.
    """
    functions: Any = import_module(module)
    folder = tempfile.TemporaryDirectory()
    config, record = (str(Path(folder.name) / name) for name in ("config.json", "record.txt"))
    source = copy.deepcopy(model)
    functions.create_quant_retrain_config(config, source, x)
    quantized: nn.Module = functions.create_quant_retrain_model(config, source, record, x)
    quantized.folder_of_record = folder  # AMCT may write there for as long as the network lives
    return quantized
