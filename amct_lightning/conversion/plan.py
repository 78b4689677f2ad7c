"""The QuantPlan: everything the conversion and the record need to know, decided once and kept with the model.

A plan is plain data. It goes into every checkpoint, so that the same structure can be rebuilt without tracing the
model or reading a config file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from amct_lightning.config import DataConfig, RetrainConfig
from amct_lightning.config.layer import FixedMin, with_fixed_min
from amct_lightning.conversion.plan_check import check_plan
from amct_lightning.modules import QATLayer
from amct_lightning.modules.convert import PLAN_ATTRIBUTE


@dataclass(frozen=True)
class LayerPlan:
    """What is to be done with one layer.

    Attributes:
        name: Dotted name of the layer in the model.
        fixed_min: Whether the lower end of its input range stays 0: the config's word, else what its rule found.
        batch_norm: Name of the BatchNorm that the record folds into its weight scales.
        shares_input_of: Name of the layer that owns its activation quantizer; its own name if that is itself.
        calibrates_input: Whether it is the first of its sharing group to run.
        fixed_min_hidden: The same as ``fixed_min`` for the hidden state of a recurrent layer.
        calls: How often the layer is called in one forward.
        type: Name of its float class, for people.
        shares_in_amct: Name of the layer that owns its activation quantizer in AMCT, where that is another one than
            here: AMCT computes with INT4 also where it cannot be packed, and so lets more layers share.
        never_negative: Whether the data flow shows that its input is never negative, whatever was made of it.
    """

    name: str
    fixed_min: bool
    batch_norm: str | None
    shares_input_of: str
    calibrates_input: bool
    fixed_min_hidden: bool = False
    calls: int = 1
    type: str = field(default="", compare=False)
    shares_in_amct: str | None = None
    never_negative: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class RefusedLayer:
    """A layer of a supported type, or of a subclass, that cannot be quantized.

    Attributes:
        name: Dotted name of the layer in the model.
        type: Name of the supported class that it is of or derives from.
        reason: Why it stays in float.
    """

    name: str
    type: str
    reason: str


@dataclass(frozen=True)
class QuantPlan:
    """The layers to quantize in order of first execution, and the settings they follow.

    Plans are equal if they quantize a model in the same way; what they tell about other layers does not count.

    Attributes:
        config: The complete configuration, every eligible layer listed.
        layers: One plan per enabled layer.
        search_n: Whether the shifts of the int32 accumulators are searched (``shift_bit`` in the record).
        refused: The layers that could not be enabled, in module order.
        ends: Names of the first and the last layer of a supported type to run, quantized or not.
        float_parts: What else of the forward stays in float, see ``graph/float_parts.py``: kinds and how many of each.
        target: The generation of hardware that the settings were checked for, if that was asked for.
        deploy_grid: Whether the layers compute with what the device computes with.
        serving: Name of the dtype that servers have, if the layers compute with what these compute with.
    """

    config: RetrainConfig
    layers: tuple[LayerPlan, ...]
    search_n: bool = False
    refused: tuple[RefusedLayer, ...] = field(default=(), compare=False)
    ends: tuple[str, ...] = field(default=(), compare=False)
    float_parts: tuple[tuple[str, int], ...] = field(default=(), compare=False)
    target: str | None = field(default=None, compare=False)
    deploy_grid: bool = False
    serving: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain dicts, lists, strings and numbers, for a checkpoint."""
        propagating = [name for name in self.config if self._fixed_min_of(name) == "propagate"]
        data = {name: layer.retrain_data_config for name, layer in self.config.items()}
        return {
            "config": _with_data(_by_rule(self.config, propagating), lambda name, data: data.in_amct).to_dict(),
            "propagating": propagating,
            "activations": {name: given.beyond_amct for name, given in data.items() if given.beyond_amct},
            "layers": [asdict(layer) for layer in self.layers],
            "search_n": self.search_n,
            "refused": [asdict(layer) for layer in self.refused],
            "ends": list(self.ends),
            "float_parts": dict(self.float_parts),
            "target": self.target,
            "deploy_grid": self.deploy_grid,
            "serving": self.serving,
        }

    def wastes_integers(self, layer: LayerPlan) -> bool:
        """Tell whether AMCT's rule leaves a layer integers that no value of its input will use.

        Args:
            layer: The plan of one of its layers.
        """
        open_ = not (layer.fixed_min or isinstance(self._fixed_min_of(layer.name), bool))
        return layer.never_negative and open_ and self.config[layer.name].retrain_data_config.may_begin_with_zero

    def is_half_used(self, layer: LayerPlan) -> bool:
        """Tell whether a range around 0 leaves a layer integers that no value of its input will use.

        Args:
            layer: The plan of one of its layers.
        """
        return layer.never_negative and self.config[layer.name].retrain_data_config.symmetric

    def _fixed_min_of(self, name: str) -> FixedMin:
        return self.config[name].retrain_data_config.fixed_min

    def undisputed(self, config: RetrainConfig) -> RetrainConfig:
        """Return a configuration with what the plan has for ``fixed_min`` where it leaves that to a rule, or agrees.

        Rules were applied when the plan was made; what has been trained since has the range that they gave it.

        Args:
            config: A complete configuration for the model of the plan.
        """
        decided = {layer.name: layer.fixed_min for layer in self.layers}
        layers = {}
        for name, layer in config.items():
            given = layer.retrain_data_config.fixed_min
            own = self._fixed_min_of(name) if name in self.config else given
            by_rule = not isinstance(own, bool)
            agreed = by_rule and (not isinstance(given, bool) or given == decided.get(name))
            layers[name] = with_fixed_min(layer, own) if agreed else layer
        return replace(config, layers=layers)

    def sharing(self) -> dict[str, list[str]]:
        """Return the names of the layers that share each quantizer of an input, by its owner."""
        names: dict[str, list[str]] = {}
        for layer in self.layers:
            names.setdefault(layer.shares_input_of, []).append(layer.name)
        return names

    def only(self, layers: Sequence[LayerPlan]) -> QuantPlan:
        """Return the plan without the other layers, which are disabled in its configuration.

        Args:
            layers: Some of its layers.
        """
        names = {layer.name for layer in layers}
        first: dict[str, str] = {}  # a quantizer whose owner is gone belongs to the first of those that are left
        for layer in layers:
            first.setdefault(layer.shares_input_of, layer.name)
        owners = {owner: owner if owner in names else name for owner, name in first.items()}
        feeding = {layer.shares_input_of for layer in layers if layer.calibrates_input}
        kept = [
            replace(
                layer,
                shares_input_of=owners[layer.shares_input_of],
                calibrates_input=layer.calibrates_input
                or (layer.shares_input_of not in feeding and first[layer.shares_input_of] == layer.name),
            )
            for layer in layers
        ]
        gone = frozenset(layer.name for layer in self.layers) - names
        return replace(self, config=disabled(gone, self.config), layers=tuple(kept))

    def within(self, prefix: str) -> QuantPlan:
        """Return the plan for a part of the module, with names as they are in the part.

        Args:
            prefix: What the names of the part begin with, with a dot at the end; layers of other names are left out.
        """

        def inner(name: str) -> str:
            return name.removeprefix(prefix)

        layers = [layer for layer in self.layers if layer.name.startswith(prefix)]
        part = self.only(layers)
        named = tuple(
            replace(
                layer,
                name=inner(layer.name),
                batch_norm=None if layer.batch_norm is None else inner(layer.batch_norm),
                shares_input_of=inner(layer.shares_input_of),
                shares_in_amct=None if layer.shares_in_amct is None else inner(layer.shares_in_amct),
            )
            for layer in part.layers
        )
        config = {inner(name): layer for name, layer in self.config.items() if name.startswith(prefix)}
        refused = (replace(layer, name=inner(layer.name)) for layer in self.refused if layer.name.startswith(prefix))
        ends = tuple(inner(name) for name in self.ends if name.startswith(prefix))
        return replace(
            self, config=replace(self.config, layers=config), layers=named, refused=tuple(refused), ends=ends
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str = "checkpoint") -> QuantPlan:
        """Rebuild a plan from :meth:`to_dict`.

        Args:
            data: The plain form.
            source: Where it comes from, for messages.

        Raises:
            ValueError: If it is not the plain form of a plan.
        """
        try:
            config = RetrainConfig.from_dict(data["config"], source)
            beyond = data.get("activations", {})
            config = _with_data(config, lambda name, plain: replace(plain, **beyond.get(name, {})))
            plan = cls(
                replace(_by_rule(config, data.get("propagating", ()), "propagate"), amct_rules=False),
                tuple(LayerPlan(**layer) for layer in data["layers"]),
                data["search_n"],
                tuple(RefusedLayer(**layer) for layer in data.get("refused", ())),
                tuple(data.get("ends", ())),
                tuple({**data.get("float_parts", {})}.items()),
                data.get("target"),
                data.get("deploy_grid", False),
                data.get("serving"),
            )
            check_plan(plan)
        except (AttributeError, LookupError, RecursionError, TypeError) as error:
            raise ValueError(
                f"The quantization plan in {source} is damaged ({type(error).__name__}: {error}). "
                "Use another checkpoint, or convert again from the float model."
            ) from error
        return plan


def _by_rule(config: RetrainConfig, names: Collection[str], rule: FixedMin = None) -> RetrainConfig:
    """Return a configuration with a rule, by default AMCT's, for the ``fixed_min`` of some layers."""
    layers = {name: with_fixed_min(layer, rule) if name in names else layer for name, layer in config.items()}
    return replace(config, layers=layers)


def _with_data(config: RetrainConfig, change: Callable[[str, DataConfig], DataConfig]) -> RetrainConfig:
    """Return a configuration with other settings of activations."""
    layers = {
        name: replace(layer, retrain_data_config=change(name, layer.retrain_data_config))
        for name, layer in config.items()
    }
    return replace(config, layers=layers)


def disabled(names: frozenset[str], config: RetrainConfig) -> RetrainConfig:
    """Return a complete configuration in which some layers are disabled.

    Args:
        names: Their names.
        config: The configuration.
    """
    without = {name: replace(config[name], retrain_enable=False) for name in config if name in names}
    return replace(config, layers={**config.layers, **without})


def find_plan(model: nn.Module) -> tuple[nn.Module, QuantPlan] | None:
    """Return the converted module inside ``model`` (or itself) and its plan, or ``None`` if there is none.

    Layers that were reverted or replaced since are not in the plan that is returned.

    Args:
        model: A converted model, or a wrapper around one (DDP, a LightningModule, a compiled module).
    """
    found = carried_plan(model)
    if found is None:
        return None
    root, plan = found
    modules = dict(root.named_modules(remove_duplicate=False))
    left = [layer for layer in plan.layers if isinstance(modules.get(layer.name), QATLayer)]
    if len(left) == len(plan.layers):
        return found
    return (root, plan.only(left)) if left else None


def note_target(model: nn.Module, target: str) -> None:
    """Write into the plan of a converted model for which generation of hardware it was checked since.

    Args:
        model: A converted model, or a wrapper around one.
        target: The name of the generation.
    """
    found = carried_plan(model)
    if found is not None:
        root, plan = found
        setattr(root, PLAN_ATTRIBUTE, replace(plan, target=target))


def carried_plan(model: nn.Module) -> tuple[nn.Module, QuantPlan] | None:
    """Return the converted module inside ``model`` and the plan by which it was converted, whatever became of it."""
    for module in model.modules():
        plan = module.__dict__.get(PLAN_ATTRIBUTE)
        if plan is not None:
            return module, plan
    return None
