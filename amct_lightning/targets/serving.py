"""What servers of language models run that load AscendV1 checkpoints: vllm-ascend, SGLang and MindIE.

Nothing here was run on hardware, nor on such a server.
"""

from __future__ import annotations

from types import MappingProxyType

from amct_lightning.targets.kinds import Fact, Target, TargetName

_TYPES = "[read] vllm-ascend, types registered for linear layers (2026-08-22); msmodelslim 26.1.0"


def _runs(type_name: str) -> Fact:
    return Fact("runs", f"the servers have the type {type_name}", _TYPES)


def _refused(why: str) -> Fact:
    return Fact("unsupported", why, _TYPES)


_LINEAR_ONLY = _refused("the servers load quantized weights of linear layers only")
_INT4 = _refused("the servers have no type with INT4 weights and activations of a fixed integer scale")
_PAIRS = MappingProxyType(
    {
        ("INT8", "INT8"): _runs("W8A8"),
        ("INT16", "INT8"): _refused("the servers have no type with INT16 activations"),
        ("INT8", "INT4"): _INT4,
        ("INT4", "INT4"): _INT4,
    }
)
_WEIGHT_ONLY = MappingProxyType(
    {
        "INT8": _runs("W8A16"),
        "INT4": Fact(
            "doubtful",
            "AscendV1 has no type for it; vLLM loads W4A16 with weights in groups in its own format",
            "[read] vllm-ascend, types registered for linear layers (2026-08-22); compressed-tensors",
        ),
    }
)
_OTHERS = "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "LSTM", "GRU"
_NAMES: dict[TargetName, tuple[str, ...]] = {
    "serving": ("bfloat16", "float16"),
    "serving_bfloat16": ("bfloat16",),
    "serving_float16": ("float16",),
}

SERVING = tuple(
    Target(
        name=name,
        products="vllm-ascend, SGLang, MindIE" + ("" if len(serves_in) > 1 else f" in {serves_in[0]}"),
        pairs=_PAIRS,
        layers=MappingProxyType({"Linear": _runs("W8A8"), **dict.fromkeys(_OTHERS, _LINEAR_ONLY)}),
        grouped=_LINEAR_ONLY,
        linear_by_channel=_runs("W8A8"),
        per_token=_runs("W8A8_DYNAMIC"),
        weight_only=_WEIGHT_ONLY,
        serves_in=serves_in,
    )
    for name, serves_in in _NAMES.items()
)
"""The servers: in the dtype that the model has, or in a given one."""
