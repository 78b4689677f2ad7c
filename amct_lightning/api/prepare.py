"""Converting a model without Lightning: ``prepare_qat``."""

from __future__ import annotations

import copy
import logging
import warnings

from torch import nn

from amct_lightning.config import ConfigLike, config_source, load_config
from amct_lightning.conversion.convert import convert_layers
from amct_lightning.conversion.make_plan import make_plan
from amct_lightning.conversion.on_target import TargetLike, TargetRules
from amct_lightning.graph.float_model import check_float_model
from amct_lightning.graph.forward import InputData
from amct_lightning.modules.degenerate import OnDegenerate, check_on_degenerate, set_on_degenerate
from amct_lightning.modules.fused.choice import set_execution
from amct_lightning.quantizers.executors import Execution, check_execution
from amct_lightning.targets import OnUnsupported

_logger = logging.getLogger(__name__)


def prepare_qat(
    model: nn.Module,
    config: ConfigLike,
    input_data: InputData,
    *,
    inplace: bool = False,
    source: str = "",
    allow_reuse: bool = False,
    search_n: bool = False,
    deploy_grid: bool = False,
    execution: Execution = "auto",
    on_degenerate: OnDegenerate = "amct",
    target: TargetLike = None,
    on_unsupported: OnUnsupported = "error",
) -> nn.Module:
    """Convert a model for quantization-aware training.

    Parameter names stay as they are; each quantized layer gets an ``input_quantizer`` and a ``weight_quantizer``.

    Args:
        model: The float model.
        config: What to quantize and how: a preset such as ``"INT8"`` or ``"A4W4"``, the path of a JSON, ``.cfg`` or
            YAML file, the content of a JSON or YAML one as a mapping, or a :class:`RetrainConfig` or
            :class:`QuantChoices`. ``None`` quantizes every layer that can be, with AMCT's defaults,
            but for ``fixed_min``, which is propagated through the data flow.
        input_data: Input for which the model works: a tensor, a tuple of positional arguments or a mapping of
            keyword arguments. It only shows the data flow; layers that it does not reach stay in float.
        inplace: Convert ``model`` itself instead of a copy.
        source: What the config is called in messages; by default its path.
        allow_reuse: Also quantize layers that are called several times in one forward, with one set of factors for
            all their calls. AMCT leaves them in float.
        search_n: Search, in evaluation passes, by how many bits the hardware has to shift the int32 sums of each
            convolution and linear layer to keep them in int16; the record carries the result as ``shift_bit``.
        deploy_grid: Compute with what the device computes with, so that the deployed network gives the same codes in
            every layer: quantize by the float32 reciprocal of the scale, add a bias of int32 to integer sums, keep 19
            bits of their scale, and in evaluation fold the BatchNorm into its convolution. AMCT's training does not.
        execution: What runs the formulas of the quantizers. ``"composite"``, the reference, runs operators of torch one
            by one, on any device. ``"compiled"`` runs kernels that Inductor compiles once for a machine: the same
            integers, and gradients of clips and learned scales whose sums are in another order. ``"auto"`` takes the
            compiled ones on CPUs where a compiler is found, and else the others.
            ``"integer"`` computes the products of a forward in integers where the device can, the rest as ``"auto"``.
            LSTM, GRU, the evaluation of ``deploy_grid``, ``torch.compile``, transforms and exports do without it.
        on_degenerate: What a calibration does with a batch in which nothing but 0, or nearly so, reaches a layer: with
            ``"amct"`` it counts, the scale becomes 1 as in AMCT and a warning says so; with ``"wait"`` it does not
            count, and the layer calibrates on until a batch has values. It is no part of the state.
        target: The hardware that the network is meant for: ``"A2"`` or ``"A3"`` (Atlas), ``"950"`` or ``"310P"``
            (Ascend); or ``"serving"``, servers of language models. Layers and types are checked, and what is doubtful
            is said. For servers Linear layers of INT8 have a weight scale per output channel by default, and compute
            with what servers compute with, in the dtype of the model, or in bfloat16 if that is float32;
            ``"serving_bfloat16"`` and ``"serving_float16"`` name the dtype. ``None`` checks nothing.
        on_unsupported: What to do about layers that the target does not run: ``"error"`` refuses them; ``"fallback"``
            takes INT8, or float for layers that it does not quantize at all, and says so; ``"warn"`` goes on.

    Returns:
        The converted model.

    Raises:
        TypeError: If ``model`` or ``config`` has the wrong type.
        ValueError: If the configuration does not fit the model or the target or nothing is left to quantize, or a
            weight is NaN or infinite.
        RuntimeError: If the model is quantized already or fails on the input.

    Example:
        >>> import torch
        >>> prepare_qat(nn.Sequential(nn.Linear(4, 2)), None, torch.ones(1, 4))[0]
        QATLinear(
          in_features=4, out_features=2, bias=True
          (input_quantizer): ActivationQuantizer(num_bits=8, fixed_min=False, calibrating)
          (weight_quantizer): WeightQuantizer(num_bits=8, channel_wise=False)
        )
    """
    check_on_degenerate(on_degenerate, "prepare_qat")
    check_execution(execution, "prepare_qat")
    check_float_model(model)
    rules, name = TargetRules.of(target, on_unsupported, "prepare_qat"), source or config_source(config)
    plan = make_plan(model, load_config(config), input_data, name, allow_reuse, search_n, rules, deploy_grid)
    converted = model if inplace else _copy(model)
    convert_layers(converted, plan)
    set_on_degenerate(converted, on_degenerate)
    set_execution(converted, execution)
    return converted


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        warnings.warn(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), so it is converted in place, "
            "as AMCT does. Use the model that is returned, and no longer the one that was given.",
            stacklevel=3,
        )
        return model
