"""The configuration of a whole model: an ordered mapping from layer names to their settings."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from amct_lightning.config.checks import check_run, found, found_in
from amct_lightning.config.fit import SimpleFile, config_source, fit_to_model, load_config, resolve_layers
from amct_lightning.config.json_format import RUN_KEYS, dump_text, layers_to_dict, parse_layers, read_json
from amct_lightning.config.layer import LayerConfig
from amct_lightning.files import write_text
from amct_lightning.graph.forward import InputData
from amct_lightning.wording import closest

_logger = logging.getLogger(__name__)


@dataclass
class RetrainConfig(MutableMapping[str, LayerConfig]):
    """What is quantized in a model and how, with dict-like access to the layers by name.

    Args:
        version: The version of the file format, always 1.
        batch_num: The number of training batches that calibrate the clip values, at least 1.
        fakequant_precision_mode: ``"DEFAULT"`` or ``"FORCE_FP16_QUANT"``.
        layers: The settings of each layer by its name in ``model.named_modules()``.
        amct_rules: Whether it comes from one of AMCT's files, in which no Linear can be ``channel_wise``.

    Raises:
        TypeError: If a value has the wrong type, also when it is assigned later.
        ValueError: If a value is not allowed, also when it is assigned later.

    Example:
        >>> config = RetrainConfig(batch_num=2, layers={"conv1": LayerConfig(), "fc": LayerConfig()})
        >>> config["fc"] = LayerConfig(retrain_enable=False)
        >>> [name for name, layer in config.items() if layer.retrain_enable]
        ['conv1']
    """

    version: int = 1
    batch_num: int = 1
    fakequant_precision_mode: str = "DEFAULT"
    layers: dict[str, LayerConfig] = field(default_factory=dict)
    amct_rules: bool = field(default=False, compare=False, repr=False)

    @classmethod
    def from_json(cls, path: str | Path) -> RetrainConfig:
        """Read a configuration file.

        Args:
            path: The JSON file.

        Returns:
            The configuration; ``resolve`` fits it to a model.

        Raises:
            OSError: If the file is missing (``FileNotFoundError``) or cannot be read.
            TypeError: If a value in the file has the wrong type.
            ValueError: If the file is not valid JSON or breaks a rule; the message names file, layer and key.

        Example:
            >>> import pathlib, tempfile
            >>> file = pathlib.Path(tempfile.mkdtemp()) / "config.json"
            >>> RetrainConfig(layers={"fc": LayerConfig()}).to_json(file)
            >>> list(RetrainConfig.from_json(file))
            ['fc']
        """
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, raw: object, source: str = "config") -> RetrainConfig:
        """Make a configuration from the plain content of a JSON file.

        Args:
            raw: A mapping with the keys of the JSON file.
            source: What the content is called in messages, for example the file name.

        Returns:
            The configuration.

        Raises:
            TypeError: If a value has the wrong type.
            ValueError: If a key is missing, unknown or has a forbidden value, or no layer is enabled.

        Example:
            >>> raw = {"version": 1, "batch_num": 1, "fc": {"retrain_enable": True}}
            >>> RetrainConfig.from_dict(raw)["fc"].retrain_data_config.dst_type
            'INT8'
        """
        if not isinstance(raw, Mapping):
            raise TypeError(f"{source}: the content must be an object {{...}}, found {found(raw)}.")
        for key in ("version", "batch_num"):
            if key not in raw:
                raise ValueError(f"{source}: must have the key '{key}'; add e.g. \"{key}\":1.")
        with found_in(f"{source}: key '"):
            config = cls(**{key: raw[key] for key in RUN_KEYS if key in raw}, amct_rules=True)
        config.layers = parse_layers(raw, source)
        return config

    @classmethod
    def from_simple_config(cls, path: str | Path, model: nn.Module, input_data: InputData) -> RetrainConfig:
        """Work out what a ``.cfg`` file, AMCT's simple configuration, means for a model.

        Args:
            path: The file.
            model: The float model.
            input_data: Input for which the model works: a tensor, a tuple of positional arguments or a mapping of
                keyword arguments.

        Returns:
            The configuration, its layers in the order of ``model.named_modules()``.

        Raises:
            OSError: If the file is missing (``FileNotFoundError``) or cannot be read.
            ValueError: If the file is not valid or does not fit the model, or nothing is left to be quantized.
            RuntimeError: If the model is quantized already or fails on the input.

        Example:
            >>> import pathlib, tempfile, torch
            >>> file = pathlib.Path(tempfile.mkdtemp()) / "simple.cfg"
            >>> _ = file.write_text('batch_num: 2  skip_layers: "1"')
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
            >>> config = RetrainConfig.from_simple_config(file, model, torch.ones(1, 4))
            >>> [(name, layer.retrain_enable) for name, layer in config.items()]
            [('0', True), ('1', False)]
        """
        return cls.from_choices(SimpleFile(path), model, input_data)

    @classmethod
    def from_choices(cls, choices: object, model: nn.Module, input_data: InputData) -> RetrainConfig:
        """Work out what a few choices mean for a model.

        Args:
            choices: A mapping or the path of a YAML file as shown in ``amct_lightning.config.friendly``, a preset, or
                any other form of a configuration, see ``load_config``.
            model: The float model.
            input_data: Input for which the model works, see :meth:`from_simple_config`.

        Returns:
            The configuration, its layers in the order of ``model.named_modules()``.

        Raises:
            OSError: If a file is missing (``FileNotFoundError``) or cannot be read.
            TypeError: If a value has the wrong type.
            ValueError: If the choices are not valid or do not fit the model, or nothing is left to be quantized.
            RuntimeError: If the model is quantized already or fails on the input.

        Example:
            >>> import torch
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
            >>> choices = {"weights": {"dst_type": "INT4"}, "skip_layers": ["1"]}
            >>> RetrainConfig.from_choices(choices, model, torch.ones(1, 4))["0"].retrain_weight_config.dst_type
            'INT4'
        """
        config: RetrainConfig = fit_to_model(load_config(choices), model, input_data, config_source(choices))
        return config

    @classmethod
    def default(cls, model: nn.Module, input_data: InputData) -> RetrainConfig:
        """Make a configuration that quantizes every layer that can be quantized, with AMCT's defaults.

        Args:
            model: The float model.
            input_data: Input for which the model works, see :meth:`from_simple_config`.

        Returns:
            The configuration, its layers in the order of ``model.named_modules()``.

        Raises:
            ValueError: If no layer of the model can be quantized.
            RuntimeError: If the model is quantized already or fails on the input.

        Example:
            >>> import torch
            >>> RetrainConfig.default(torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.ones(1, 4)).batch_num
            1
        """
        return cls.from_choices(None, model, input_data)

    def to_dict(self) -> dict[str, object]:
        """Give the plain content of the JSON file, in its key order.

        Raises:
            ValueError: If a layer has ``fixed_min="propagate"``, for which AMCT's format has no word.

        Example:
            >>> RetrainConfig(fakequant_precision_mode="FORCE_FP16_QUANT").to_dict()
            {'version': 1, 'fakequant_precision_mode': 'FORCE_FP16_QUANT', 'batch_num': 1}
        """
        mode = self.fakequant_precision_mode
        return {
            "version": self.version,
            **({} if mode == "DEFAULT" else {"fakequant_precision_mode": mode}),
            "batch_num": self.batch_num,
            **layers_to_dict(self.layers),
        }

    def to_text(self) -> str:
        """Give the text of the JSON file, equal to AMCT's to the byte.

        Example:
            >>> RetrainConfig().to_text().splitlines()[1]
            '    "version":1,'
        """
        return dump_text(self.to_dict())

    def to_json(self, path: str | Path) -> None:
        """Write the JSON file atomically; replacing an existing file is logged as a warning.

        Args:
            path: The file to create or replace. Missing folders are created.

        Raises:
            OSError: If the file cannot be written; an existing file is then unchanged.

        Example:
            >>> import pathlib, tempfile
            >>> file = pathlib.Path(tempfile.mkdtemp()) / "config.json"
            >>> RetrainConfig(layers={"fc": LayerConfig()}).to_json(file)
        """
        if Path(path).is_file():
            _logger.warning("Overwriting the existing quantization config '%s'.", path)
        write_text(path, self.to_text())

    def resolve(
        self, eligible: Mapping[str, nn.Module], source: str = "config", linear_by_channel: bool = False
    ) -> RetrainConfig:
        """Fit the configuration to a model: fill in the defaults of its layer types, check what they allow.

        Layers that are not mentioned are disabled. INT4 weights that cannot be packed in pairs become INT8,
        with a warning that names the layers; INT4 activations of such a layer become INT8, too.

        Args:
            eligible: The layers of the model that can be quantized, by name.
            source: What this configuration is called in messages, for example the file name.
            linear_by_channel: Whether a Linear may have a scale per channel in AMCT's files, and has one in others.

        Returns:
            A new configuration that lists exactly the eligible layers, in their order.

        Raises:
            ValueError: If a layer is unknown, AMCT's rules forbid it to be ``channel_wise``, or no layer is enabled.

        Example:
            >>> from torch import nn
            >>> layers = {"0": nn.Conv2d(3, 8, 3), "3": nn.Linear(8, 2)}
            >>> resolved = RetrainConfig(layers={"3": LayerConfig()}).resolve(layers)
            >>> [(name, layer.retrain_enable) for name, layer in resolved.items()]
            [('0', False), ('3', True)]
        """
        return replace(self, layers=resolve_layers(self, eligible, source, self.amct_rules, linear_by_channel))

    def __getitem__(self, name: str) -> LayerConfig:
        return self.layers[name]

    def __setitem__(self, name: str, layer: LayerConfig) -> None:
        _check_layer(name, layer)
        self.layers[name] = layer

    def __delitem__(self, name: str) -> None:
        del self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __setattr__(self, name: str, value: object) -> None:
        if name not in self.__dataclass_fields__:
            known = list(self.__dataclass_fields__)
            raise AttributeError(f"RetrainConfig has no setting '{name}'.{closest(name, known)}")
        if name == "layers":
            value = _checked_layers(value)
        with found_in("RetrainConfig.", ""):
            check_run(name, value)
        is_number = name in RUN_KEYS and isinstance(value, bool)
        object.__setattr__(self, name, int(value) if is_number else value)  # type: ignore[call-overload]


def _checked_layers(layers: object) -> dict[str, LayerConfig]:
    if not isinstance(layers, Mapping):
        raise TypeError(f"RetrainConfig.layers must map layer names to LayerConfig, found {found(layers)}.")
    for name, layer in layers.items():
        _check_layer(name, layer)
    return dict(layers)


def _check_layer(name: object, layer: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"A layer name must be a string, found {found(name)}.")
    if name in RUN_KEYS:
        raise ValueError(f"A layer cannot be called '{name}': the config file uses that key; rename the module.")
    if not isinstance(layer, LayerConfig):
        raise TypeError(f"The settings of layer '{name}' must be a LayerConfig, found {found(layer)}.")
