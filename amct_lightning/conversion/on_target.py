"""Whether what a network is meant for, hardware or servers, runs it as configured; asked before any training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

from torch import nn

from amct_lightning.config import DataConfig, LayerConfig, RetrainConfig, WeightConfig
from amct_lightning.config.fit import without_int4
from amct_lightning.layer_types import supported_class
from amct_lightning.targets import Fact, OnUnsupported, Target, TargetName, find_target
from amct_lightning.wording import cut_off

TargetLike = TargetName | int | None
"""A target as users give it; YAML reads 950 as a number."""


NONE: Mapping[str, Fact] = MappingProxyType({})

Way = Literal["INT8", "one scale", "float"]
"""What helps where a target does not run a layer as configured; float always does."""


class Obstacle(NamedTuple):
    """Why a target does not run a layer as configured, or may not.

    Attributes:
        layer: Name of the layer.
        kind: Its class.
        types: The widths of activations and weights, such as ``"A8W8"``, or of weights alone, such as ``"W8"``.
        fact: What is known.
        way: What helps.
    """

    layer: str
    kind: str
    types: str
    fact: Fact
    way: Way


@dataclass(frozen=True)
class TargetRules:
    """What a target allows, and what is done about the rest.

    Attributes:
        target: The generation, or servers.
        on_unsupported: What to do about layers that it does not run.
        dtype: The dtype that servers have where the model has none of theirs and nothing else is said.

    Example:
        >>> rules = TargetRules.of("950", "fallback", "prepare_qat")
        >>> [obstacle.layer for obstacle in rules.obstacles({"0": LayerConfig()}, {"0": nn.GRU(4, 4)})]
        ['0']
    """

    target: Target
    on_unsupported: OnUnsupported = "error"
    dtype: str = "bfloat16"

    @classmethod
    def of(cls, target: object, on_unsupported: str, where: str) -> TargetRules | None:
        """Return the rules for a target, or ``None`` for no target.

        Args:
            target: Its name.
            on_unsupported: What to do about layers that it does not run.
            where: Whose arguments these are, for messages.

        Raises:
            ValueError: If an argument has a value that is not allowed.
        """
        if on_unsupported not in get_args(OnUnsupported):
            raise ValueError(f"{where}(on_unsupported={on_unsupported!r}): must be 'error', 'fallback' or 'warn'.")
        if target is None:
            return None
        return cls(find_target(target, f"{where}: target"), on_unsupported)  # type: ignore[arg-type]

    @property
    def linear_by_channel(self) -> bool:
        """Whether a Linear has a weight scale per output channel where nothing else is said."""
        return self.target.serves

    def serving_dtype(self, layers: Iterable[nn.Module], source: str) -> str | None:
        """Return the name of the dtype that servers have, or ``None`` if the target stands for none.

        Args:
            layers: The layers to quantize.
            source: What the configuration is called in messages.

        Raises:
            ValueError: If they have several of the dtypes of servers, or none that the target allows.
        """
        allowed = self.target.serves_in
        found = {str(layer.weight.dtype).removeprefix("torch.") for layer in layers} & {"bfloat16", "float16"}
        if not self.target.serves:
            return None
        if len(found) > 1 or found - {*allowed}:
            raise ValueError(
                f"{source}: target {self.target.name} ({self.target.products}) has weights of one dtype, "
                f"{' or '.join(allowed)}; those to be quantized are of {' and '.join(sorted(found))}. Convert the "
                "model first, e.g. with model.bfloat16(), or give target='serving'."
            )
        return next(iter(found), self._usual_dtype)

    def serving_as(self, before: str | None) -> str | None:
        """Return the dtype that servers have of a model that was converted before, or ``None`` if there are none.

        Args:
            before: The one that it was converted for.
        """
        if not self.target.serves:
            return None
        return before if before in self.target.serves_in else self._usual_dtype

    def obstacles(
        self, layers: Mapping[str, LayerConfig], modules: Mapping[str, nn.Module], in_float: Mapping[str, Fact] = NONE
    ) -> list[Obstacle]:
        """Return what the target does not run as configured, or may not.

        Args:
            layers: The settings of all layers.
            modules: These layers.
            in_float: What is known of layers that it runs in float only, for their place in the model.
        """
        found = []
        for name, layer in layers.items():
            if layer.retrain_enable:
                found += self._of_layer(name, layer, modules[name], in_float.get(name))
        return found

    def check(
        self,
        layers: Mapping[str, LayerConfig],
        modules: Mapping[str, nn.Module],
        source: str,
        in_float: Mapping[str, Fact] = NONE,
    ) -> list[Obstacle]:
        """Refuse what the target does not run, or warn of it, as the user chose; warn of what is doubtful.

        Args:
            layers: The settings of all layers.
            modules: These layers.
            source: What the configuration is called in messages.
            in_float: What is known of layers that it runs in float only, for their place in the model.

        Returns:
            What has to be avoided by other settings, see :func:`fall_back`.

        Raises:
            ValueError: If the target does not run a layer and the user chose ``"error"``, or if it runs none.
        """
        found = self.obstacles(layers, modules, in_float)
        doubtful = [obstacle for obstacle in found if obstacle.fact.verdict == "doubtful"]
        unsupported = [obstacle for obstacle in found if obstacle.fact.verdict == "unsupported"]
        head = f"{source}: target {self.target.name} ({self.target.products})"
        if unsupported:
            text = f"{head} does not run as configured: {listed(unsupported)}."
            if self.on_unsupported == "error":
                raise ValueError(f"{text} {self._allowed()} {_remedy(unsupported)}")
            avoided = self.on_unsupported == "fallback"
            if avoided:
                _check_left(layers, unsupported, f"{text} {self._allowed()}")
            done = _taken(unsupported) if avoided else "They train as configured all the same."
            warnings.warn(f"{text} {done}", stacklevel=4)
        if doubtful:
            warnings.warn(f"{head}, worth a second look: {listed(doubtful)}.", stacklevel=4)
        return unsupported if self.on_unsupported == "fallback" else []

    def fitted(self, config: RetrainConfig, modules: Mapping[str, nn.Module], source: str) -> RetrainConfig:
        """Return a complete configuration with what the target runs, see :meth:`check`.

        Args:
            config: The configuration.
            modules: The layers that it lists.
            source: What it is called in messages.
        """
        return replace(config, layers=fall_back(config.layers, self.check(config.layers, modules, source)))

    @property
    def _usual_dtype(self) -> str:
        return self.dtype if self.dtype in self.target.serves_in else self.target.serves_in[0]

    def _of_layer(self, name: str, layer: LayerConfig, module: nn.Module, in_float: Fact | None) -> list[Obstacle]:
        data, weight = layer.retrain_data_config, layer.retrain_weight_config
        kind = supported_class(module).__name__
        types = f"A{data.num_bits}W{weight.num_bits}" if data.is_quantized else f"W{weight.num_bits}"
        of_kind = in_float or self.target.layers[kind]
        facts: list[tuple[Fact, Way]] = [(of_kind, "float")]
        if of_kind.verdict != "unsupported":
            facts.append((self._of_types(data, weight), "INT8"))
            if getattr(module, "groups", 1) > 1:
                facts.append((self.target.grouped, "float"))
            if weight.channel_wise and kind == "Linear":
                facts.append((self.target.linear_by_channel, "one scale"))
        return [Obstacle(name, kind, types, fact, way) for fact, way in facts if fact.verdict != "runs"]

    def _of_types(self, data: DataConfig, weight: WeightConfig) -> Fact:
        if not data.is_quantized:
            return self.target.weight_only[weight.dst_type]
        of_types = self.target.pairs[data.dst_type, weight.dst_type]
        return of_types if data.has_clips or of_types.verdict != "runs" else self.target.per_token

    def _allowed(self) -> str:
        pairs = ", ".join("/".join(pair) for pair, fact in self.target.pairs.items() if fact.verdict != "unsupported")
        kinds = ", ".join(kind for kind, fact in self.target.layers.items() if fact.verdict != "unsupported")
        return f"Allowed there are the types (activations/weights) {pairs} and the layers {kinds}."


def fall_back(layers: Mapping[str, LayerConfig], obstacles: Iterable[Obstacle]) -> dict[str, LayerConfig]:
    """Take INT8 for layers whose types a target does not run, and float for layers that it does not run at all.

    A Linear that may not have a weight scale per channel gets a single one.

    Args:
        layers: The settings of all layers.
        obstacles: What has to be avoided.

    Example:
        >>> from amct_lightning.config import WeightConfig
        >>> int4 = LayerConfig(retrain_weight_config=WeightConfig(dst_type="INT4"))
        >>> rules = TargetRules.of("950", "fallback", "prepare_qat")
        >>> fall_back({"0": int4}, rules.obstacles({"0": int4}, {"0": nn.Linear(4, 4)}))["0"] == LayerConfig()
        True
    """
    changed = {**layers}
    for obstacle in obstacles:
        changed[obstacle.layer] = _avoiding(changed[obstacle.layer], obstacle.way)
    return changed


def _avoiding(layer: LayerConfig, way: Way) -> LayerConfig:
    if way == "float":
        return replace(layer, retrain_enable=False)
    if way == "INT8":
        return without_int4(layer)
    return replace(
        layer, retrain_weight_config=replace(layer.retrain_weight_config, channel_wise=False, group_size=None)
    )


def listed(obstacles: Iterable[Obstacle]) -> str:
    """List layers by what is known of them.

    Args:
        obstacles: The layers.
    """
    groups: dict[Fact, list[str]] = {}
    for obstacle in obstacles:
        groups.setdefault(obstacle.fact, []).append(f"'{obstacle.layer}' ({obstacle.kind}, {obstacle.types})")
    return "; ".join(f"{cut_off(names)}: {fact.why} ({fact.source})" for fact, names in groups.items())


def _remedy(unsupported: list[Obstacle]) -> str:
    ways: dict[Way, str] = {
        "INT8": "set the dst_type of activations and weights to INT8",
        "one scale": "set channel_wise to false for Linear",
        "float": "leave the layers in float",
    }
    needed = " and ".join(text for way, text in ways.items() if any(o.way == way for o in unsupported))
    return (
        f"{needed[0].upper()}{needed[1:]}, or give on_unsupported='fallback' to have that done, or 'warn' to train as "
        "configured."
    )


def _taken(unsupported: list[Obstacle]) -> str:
    ways: dict[Way, str] = {
        "INT8": "INT8 is used for {}",
        "one scale": "one weight scale is used for {}",
        "float": "{} stays in float",
    }
    named = {way: [repr(obstacle.layer) for obstacle in unsupported if obstacle.way == way] for way in ways}
    done = " and ".join(text.format(cut_off(named[way])) for way, text in ways.items() if named[way])
    return f"{done[0].upper()}{done[1:]}."


def _check_left(layers: Mapping[str, LayerConfig], unsupported: list[Obstacle], text: str) -> None:
    in_float = {obstacle.layer for obstacle in unsupported if obstacle.way == "float"}
    if not any(layer.retrain_enable and name not in in_float for name, layer in layers.items()):
        raise ValueError(f"{text} With these layers in float nothing is left to quantize. Choose another target.")
