"""What is said of a target: its facts, each with a source, and what ATC calls it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

TargetName = Literal["A2", "A3", "950", "310P", "serving", "serving_bfloat16", "serving_float16"]
"""Atlas A2 and A3, Ascend 950PR/950DT, the inference cards with Ascend 310P, and the servers that load AscendV1."""

Verdict = Literal["runs", "doubtful", "unsupported"]
"""Whether the matrix unit computes with it; of what is doubtful there is no word, or one against another."""

OnUnsupported = Literal["error", "fallback", "warn"]
"""What to do about layers that the target does not run: refuse, take INT8 (or float where that is not enough), warn."""


@dataclass(frozen=True)
class Fact:
    """What is known of a pair of types or of a layer on a target.

    Attributes:
        verdict: Whether it runs as it is meant to.
        why: A clause for messages, such as ``"the matrix unit has no INT4"``.
        source: Where that is written.
    """

    verdict: Verdict
    why: str
    source: str


@dataclass(frozen=True)
class Atc:
    """What ATC, the Ascend compiler, calls a generation.

    Attributes:
        soc_prefix: What all values of ``atc --soc_version`` begin with.
        soc_examples: Some of these values.
        soc_version: The value that is meant if none is given; ``None`` where there are several, as an offline model
            runs on that one only.
        soc_query: How to find out the value of a device.
    """

    soc_prefix: str
    soc_examples: tuple[str, ...]
    soc_version: str | None
    soc_query: str


@dataclass(frozen=True)
class Target:
    """A generation of Ascend hardware that ATC compiles for, or servers that load a checkpoint.

    Attributes:
        name: How it is chosen.
        products: What it is called in documentation.
        pairs: What is known of pairs of activation and weight types, such as ``("INT8", "INT4")``.
        layers: What is known of layers with a class of this name, whatever their types.
        grouped: What is known of convolutions with groups, depthwise ones among them.
        linear_by_channel: What is known of a Linear with a weight scale per output channel.
        per_token: What is known of activations whose scale is found for each token when it runs.
        weight_only: What is known of layers with float activations, by the type of their weights.
        atc: What ATC calls it; ``None`` for servers, which compile nothing.
        serves_in: For servers, the dtypes that the model may have there, the usual one first.
    """

    name: TargetName
    products: str
    pairs: Mapping[tuple[str, str], Fact]
    layers: Mapping[str, Fact]
    grouped: Fact
    linear_by_channel: Fact
    per_token: Fact
    weight_only: Mapping[str, Fact]
    atc: Atc | None = None
    serves_in: tuple[str, ...] = ()

    @property
    def serves(self) -> bool:
        """Whether it stands for servers."""
        return bool(self.serves_in)
