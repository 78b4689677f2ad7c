"""The LightningCLI that knows the callback, for the command and for scripts of your own."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import Any, get_args

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from typing_extensions import override

# The first import of anything of the package runs its __init__.py, which makes its accelerators and strategies known to
# the Trainer by name, so that `--trainer.accelerator` and `--trainer.strategy` take them.
from amct_lightning.callbacks import QuantRetrainCallback
from amct_lightning.commands.base import UserError
from amct_lightning.files import Location, beside, numbered, read_bytes, write_text

_OFF = ("false", "null", "none", "off")


class KeepConfigCallback(SaveConfigCallback):
    """Saves the configuration of a run in its log folder, and never over that of another one.

    ``config.yaml`` is that of the first run in the folder; a different one becomes ``config-1.yaml`` and so on. So a
    second run in the same folder (without a logger, or with a fixed version) neither stops nor loses anything. The
    file is written atomically.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp(), "config.yaml")
        >>> for text in ("a: 1", "a: 2", "a: 1"):
        ...     KeepConfigCallback.write(path, text)
        >>> sorted(file.name for file in path.parent.iterdir())
        ['config-1.yaml', 'config.yaml']
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # save_config() does the writing; Lightning's own would refuse, or write, before it is asked.
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})
        self._folder: str | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ask for the folder, on all ranks: that is a broadcast."""
        self._folder = trainer.log_dir or trainer.default_root_dir
        super().setup(trainer, pl_module, stage)

    @override
    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the file; Lightning calls this on rank zero."""
        if self._folder is None:
            return
        path = beside(self._folder, self.config_filename)
        if self.multifile or self.overwrite:
            self.parser.save(
                self.config, str(path), skip_none=False, overwrite=self.overwrite, multifile=self.multifile
            )
            return
        self.write(path, self.parser.dump(self.config, skip_none=False))

    @staticmethod
    def write(path: Location, text: str) -> None:
        """Write a configuration, under another name if there is a different one.

        Args:
            path: Where it belongs.
            text: The configuration.
        """
        for target in numbered(path):
            there = read_bytes(target)
            if there is None:
                write_text(target, text)
            if there in (None, text.encode()):
                return


class QuantCLI(LightningCLI):
    """A LightningCLI with :class:`QuantRetrainCallback` built in; its arguments are those of ``quant``.

    ``--quant.config choices.yaml`` or the same inline in YAML, ``--quant.schedule.start=1`` and so on give the
    arguments of the callback, and ``--quant.enabled=false`` (in YAML also ``quant: null``) trains in float. The
    callback comes first among the callbacks, before those that average weights. A run whose ``trainer.callbacks``
    list a QuantRetrainCallback uses that one; to give ``quant`` as well is an error.

    Everything else is as in LightningCLI, except that the seed is 0 unless another is given, so that a run can be
    repeated from its configuration, and that the configuration is saved by :class:`KeepConfigCallback`.

    Args:
        args: Positional arguments of LightningCLI: the LightningModule class and the LightningDataModule class.
            Without them, model and data are given by class path.
        kwargs: Its keyword arguments.

    Raises:
        UserError: If ``quant`` contradicts ``trainer.callbacks``.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> cli = QuantCLI(BoringModel, run=False, args={"quant": {"quant_lr_scale": 0.1}})
        >>> cli.trainer.callbacks[0].quant_lr_scale
        0.1
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(LightningCLI).bind_partial(*args, **kwargs).arguments
        defaults: dict[str, Any] = {"save_config_callback": KeepConfigCallback, "seed_everything_default": 0}
        super().__init__(**{**defaults, **given})

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``quant``, then Trainer, model and data."""
        parser.add_class_arguments(
            QuantRetrainCallback,
            "quant",
            instantiate=False,
            sub_configs=True,
            fail_untyped=False,
        )
        group = (parser.groups or {}).get("quant", parser)
        group.add_argument(
            "--quant.enabled", type=bool, default=True, help="Whether to quantize; false trains in float."
        )
        _ask_for_whole_numbers_first()
        super().add_core_arguments_to_parser(parser)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; ``--quant=false`` and ``--quant null`` are short for ``--quant.enabled=false``."""
        if args is None or isinstance(args, list):
            self.config = parser.parse_args(_spelled_out(sys.argv[1:] if args is None else args))
        else:
            super().parse_arguments(parser, args)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the Trainer, the callback for quantization first among its callbacks."""
        config = self.config_init if self.subcommand is None else self.config_init[self.subcommand]
        given = kwargs.pop("callbacks", config.trainer.callbacks) or []
        callbacks = list(given) if isinstance(given, (list, tuple)) else [given]
        return super().instantiate_trainer(
            callbacks=[*_own_callback(config.get("quant"), callbacks), *callbacks], **kwargs
        )


def _ask_for_whole_numbers_first() -> None:
    """Give the arguments of the Trainer their types anew: int before float.

    Lightning (seen in 2.6) writes Optional[Union[float, int]] elsewhere, and Python may return that object for
    Optional[Union[int, float]], depending on what else was imported. jsonargparse tries the types in their order, and
    reads ``limit_train_batches=1`` as 1.0 then, which is all batches.
    """
    annotations = pl.Trainer.__init__.__annotations__
    for name, annotation in annotations.items():
        kinds = get_args(annotation)
        if int in kinds and float in kinds:
            annotations[name] = reduce(or_, sorted(kinds, key=lambda kind: kind is not int))


def _spelled_out(arguments: list[str]) -> list[str]:
    result: list[str] = []
    for argument in arguments:
        if argument.lower() in [f"--quant={off}" for off in _OFF]:
            result.append("--quant.enabled=false")
        elif result and result[-1] == "--quant" and argument.lower() in _OFF:
            result[-1] = "--quant.enabled=false"
        else:
            result.append(argument)
    return result


def _own_callback(quant: Namespace | bool | None, callbacks: list[pl.Callback]) -> list[QuantRetrainCallback]:
    """Return the callback that ``quant`` describes, none if it is switched off or the user lists one."""
    options: Mapping[str, Any] = {"enabled": bool(quant)} if not isinstance(quant, Namespace) else vars(quant)
    listed = any(isinstance(callback, QuantRetrainCallback) for callback in callbacks)
    arguments = {name: value for name, value in options.items() if name != "enabled"}
    if not listed:
        return [QuantRetrainCallback(**arguments)] if options["enabled"] else []
    if not options["enabled"]:
        raise UserError(
            "quant is switched off (quant.enabled=false), but trainer.callbacks lists a QuantRetrainCallback. Remove "
            "that one to train in float, or leave quant.enabled out."
        )
    parameters = inspect.signature(QuantRetrainCallback).parameters
    twice = [name for name, value in arguments.items() if value != parameters[name].default]
    if twice:
        raise UserError(
            f"the quantization is configured twice: quant gives {', '.join(twice)}, and trainer.callbacks lists a "
            "QuantRetrainCallback. Move everything to one of them; a run has one such callback."
        )
    return []
