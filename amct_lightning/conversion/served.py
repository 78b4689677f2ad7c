"""Whether a server would load a language model as it is to be quantized; asked before any training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from amct_lightning.config import LayerConfig, RetrainConfig
from amct_lightning.conversion.plan import LayerPlan
from amct_lightning.targets import SERVED, Fact, ServedNetwork
from amct_lightning.wording import cut_off

_TYPES_OF_LINEARS = "[read] vllm-ascend, modelslim_config"


class Served(NamedTuple):
    """A network that servers know, inside a model.

    Attributes:
        prefix: What the names of its layers begin with in the model; with a dot at the end, or empty.
        kind: The ``model_type`` of its configuration.
        network: What servers do with it.
    """

    prefix: str
    kind: str
    network: ServedNetwork


def find_served(model: nn.Module, source: str) -> Served | None:
    """Return the network of transformers inside a model, ``None`` if there is none.

    Args:
        model: The model, or what holds it.
        source: What the configuration is called in messages.

    Raises:
        ValueError: If the network is of a kind of which it is not known how servers compute it.
    """
    for name, module in model.named_modules():
        kind = getattr(getattr(module, "config", None), "model_type", None)
        if isinstance(kind, str) and kind:
            if kind not in SERVED:
                raise ValueError(
                    f"{source}: the target is a server, and {_named(name, module)} is of model_type '{kind}', of which "
                    f"it is not known which projections servers compute as one. Known are {', '.join(SERVED)}. "
                    "Take one of these, or leave the target out and export in another form."
                )
            return Served(f"{name}." if name else "", kind, SERVED[kind])
    return None


def float_layers(model: nn.Module, served: Served | None, names: Iterable[str]) -> dict[str, Fact]:
    """Return which layers a server takes in float only, with the reasons.

    Args:
        model: The model.
        served: The network in it that servers know.
        names: The layers that are to be quantized.

    Example:
        >>> model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
        >>> model["head"].weight = model["embed"].weight
        >>> float_layers(model, None, ["head"])["head"].why
        "its weight is that of the embedding 'embed', which servers keep in float"
    """
    embeddings = {id(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    modules = dict(model.named_modules())
    routers = () if served is None else served.network.routers
    found = {}
    for name in names:
        tied = embeddings.get(id(modules[name].weight))
        if tied is not None:
            why = f"its weight is that of the embedding '{tied}', which servers keep in float"
            found[name] = Fact("unsupported", why, _TYPES_OF_LINEARS)
        elif any(f".{name}".endswith(f".{router}") for router in routers):
            found[name] = Fact(
                "unsupported", "it sends tokens to experts, which servers do in float", _TYPES_OF_LINEARS
            )
    return found


def check_fused(
    served: Served, config: RetrainConfig, layers: Sequence[LayerPlan], modules: Mapping[str, nn.Module], source: str
) -> None:
    """Refuse projections that servers compute as one and that are to be quantized in different ways.

    Args:
        served: The network.
        config: The settings of all layers.
        layers: The plans of those that are quantized.
        modules: All modules of the model, by name.
        source: What the configuration is called in messages.

    Raises:
        ValueError: If they differ in type or do not share the quantizer of their input.
    """
    owners = {layer.name: layer.shares_input_of for layer in layers}
    for fused, names in _fused_groups(served, modules):
        ways = {name: _way(config[name]) if name in owners else "FLOAT" for name in names}
        head = f"{source}: servers compute {cut_off([repr(name) for name in names])} as one layer '{fused}'"
        if len(set(ways.values())) > 1:
            listed = ", ".join(f"'{name}': {way}" for name, way in ways.items())
            raise ValueError(
                f"{head}, which has one type, but they are to be quantized differently ({listed}). Give all of them "
                "the same settings, or name all of them in skip_layers."
            )
        shared = {owners[name] for name in names if name in owners and config[name].retrain_data_config.has_clips}
        if len(shared) > 1:
            raise ValueError(
                f"{head}, which has one input_scale, but they do not read the same tensor, or not with the same "
                "settings, so that each would learn its own. Name all of them in skip_layers."
            )


def _fused_groups(served: Served, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, list[str]]]:
    for parent, module in modules.items():
        if not f"{parent}.".startswith(served.prefix):
            continue
        children = dict(module.named_children())
        for fused, parts in served.network.fused.items():
            if all(part in children for part in parts):
                before = f"{parent}." if parent else ""
                yield f"{before}{fused}", [f"{before}{part}" for part in parts]


def _way(layer: LayerConfig) -> str:
    data, weight = layer.retrain_data_config, layer.retrain_weight_config
    text = f"A{data.num_bits}W{weight.num_bits}" if data.is_quantized else f"float activations, W{weight.num_bits}"
    text += "" if data.has_clips or not data.is_quantized else " per token"
    return f"{text} in groups of {weight.group_size}" if weight.group_size else text


def _named(name: str, module: nn.Module) -> str:
    return f"'{name}' ({type(module).__name__})" if name else type(module).__name__
