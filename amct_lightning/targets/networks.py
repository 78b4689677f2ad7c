"""What servers of language models do with the projections of the networks that they know.

A server computes several projections of one tensor as one: it puts their weights below each other, and loads the
network only if all have one quantization type. Imports the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_STACKED = MappingProxyType(
    {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
)


@dataclass(frozen=True)
class ServedNetwork:
    """What a server does with the layers of a kind of network.

    Attributes:
        fused: The layers that it computes as one, by the name that it has for them.
        routers: The last parts of the names of the layers that send a token to its experts, which stay in float.
        source: Where that is written.
    """

    fused: Mapping[str, tuple[str, ...]]
    routers: tuple[str, ...]
    source: str


_DENSE = ServedNetwork(_STACKED, (), "[read] vLLM, packed_modules_mapping of the model's class")
_EXPERTS = ServedNetwork(
    _STACKED,
    ("mlp.gate", "mlp.shared_expert_gate"),
    "[read] vllm-ascend, packed_modules_model_mapping of its modelslim_config",
)

SERVED: Mapping[str, ServedNetwork] = MappingProxyType(
    {
        "llama": _DENSE,
        "mistral": _DENSE,
        "qwen2": _DENSE,
        "qwen3": _DENSE,
        "qwen2_moe": _EXPERTS,
        "qwen3_moe": _EXPERTS,
    }
)
"""The networks, by the ``model_type`` of their configuration in transformers."""
