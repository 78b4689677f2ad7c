"""The forward of a layer that has one product, on the grid of device or server, and of the BatchNorm folded into it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from amct_lightning.modules.deployed import folded_bias, folded_weight
from amct_lightning.modules.deployed import weight_codes as folded_codes
from amct_lightning.modules.folding import current_weight, deployed_scale, fold_sources
from amct_lightning.modules.grid.codes import Codes, input_codes, weight_codes
from amct_lightning.modules.grid.norm import FoldedNorm, has_lost_norm
from amct_lightning.modules.grid.sums import Operate, integer_product, output_dtype, replaced
from amct_lightning.quantizers import ChannelLayout
from amct_lightning.quantizers.executors.base import input_factors
from amct_lightning.quantizers.kept import evaluates, kept, kept_weight
from amct_lightning.quantizers.transforms import transforming


def forward_on_grid(layer: Any, norm: FoldedNorm | None, input: Tensor, operate: Operate) -> Tensor:
    """Run a layer with what the device computes with.

    Args:
        layer: The layer.
        norm: The BatchNorm that is folded into it now: its output is that of the layer.
        input: The input.
        operate: The operation of the layer without its bias, from input and weight.

    Returns:
        The output, in the dtype that the float layer would give it.
    """
    check_served(layer)
    dtype, terms = output_dtype(input), _terms(layer.weight, layer.weight_quantizer.layout)
    x = input_codes(layer.input_quantizer, input, input_factors(layer.input_quantizer, input, layer.calibrates_input))
    layer.weight_quantizer.forget(unless_evaluated=True)
    folded = None if norm is None else _folded_output(layer, norm, operate, x, terms).to(dtype)
    if folded is not None and not (torch.is_grad_enabled() or transforming()):
        return folded
    exact = not layer.training and folded is None
    if exact and has_lost_norm(layer):
        _warn_unfolded()
    weight = _weight_codes(layer)
    follows = layer.bias is not None and layer.bias_follows(input)
    output = integer_product(operate, x, weight, None if follows else layer.bias, terms, exact)
    output = output + layer.bias.float() if follows else output
    output = (output if x.dtype is None else output.to(x.dtype)).to(dtype)
    return output if norm is None or folded is None else replaced(norm.float_forward(output), folded)


def check_served(layer: Any) -> None:
    """Refuse a layer that computes as a server does in one half precision and has become of the other.

    Args:
        layer: The layer.
    """
    dtype = layer.weight.dtype
    if layer.serving is not None and dtype != layer.serving and dtype.itemsize == layer.serving.itemsize:
        names = [str(one).removeprefix("torch.") for one in (layer.serving, dtype)]
        raise RuntimeError(
            f"A layer that was converted for servers in {names[0]} has weights of {names[1]}, so it is no longer what "
            f"they compute. Convert with target='serving_{names[1]}', or keep the model in {names[0]} or float32."
        )


@torch.no_grad()
def _folded_output(layer: Any, norm: FoldedNorm, operate: Operate, x: Codes, terms: int) -> Tensor:
    """Return the output with the integers that an export writes; it has no gradient."""
    weight, quantizer = current_weight(layer), layer.weight_quantizer

    def fold() -> tuple[Codes, Tensor | None]:
        scale = deployed_scale(quantizer, weight, norm)
        codes = folded_codes(folded_weight(weight, norm), scale, quantizer.layout, quantizer.num_bits)
        return Codes(codes, scale, quantizer.num_bits), folded_bias(layer.bias, norm)

    if evaluates(quantizer):
        sources = weight, *quantizer.scale_sources(), layer.bias, *fold_sources(norm)
        codes, bias = kept(quantizer, sources, ("folded", norm.eps, quantizer.settings), fold)
    else:
        codes, bias = fold()
    return integer_product(operate, x, codes, bias, terms, exact=True)


def _weight_codes(layer: Any) -> Codes:
    """Return the codes of the weight alone."""
    quantizer, weight = layer.weight_quantizer, layer.weight
    if torch.is_grad_enabled() or not evaluates(quantizer):
        return weight_codes(quantizer, weight)
    return kept_weight(quantizer, weight, "codes", lambda: weight_codes(quantizer, weight))


def _terms(weight: Tensor, layout: ChannelLayout) -> int:
    """Return how many products one sum has, at most."""
    return weight.numel() // (layout.groups * weight.shape[1] if layout.transposed else weight.shape[0])


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _warn_unfolded() -> None:
    warnings.warn(
        "A BatchNorm that belongs to a layer of deploy_grid=True was replaced since the conversion, so evaluation "
        "does not fold it and differs from the deployed network by rounding. Convert to SyncBatchNorm before "
        "prepare_qat; with QuantRetrainCallback either order is right.",
        stacklevel=3,
    )
