"""``amct-lightning fit``, ``validate``, ``test`` and ``predict``: runs of a Trainer, configured by YAML and options."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from amct_lightning.commands.base import PROGRAM, Command, HelpFormatter, skip

_FIT = """\
examples:
  amct-lightning fit --model my_module.Classifier --data my_module.Digits --trainer.max_epochs 5
  amct-lightning fit --config run.yaml
  amct-lightning fit --config run.yaml --quant.config A4W4
  amct-lightning fit --config run.yaml --quant.config choices.yaml --quant.record_file out/record.txt
  amct-lightning fit --config run.yaml --quant.schedule.start=1 --quant.schedule.freeze_bn=0.5
  amct-lightning fit --config run.yaml --ckpt_path lightning_logs/version_0/checkpoints/last.ckpt
  amct-lightning fit --config run.yaml --quant.enabled=false       # in float, to compare
  amct-lightning fit --config run.yaml --print_config > full.yaml  # all settings; full.yaml is the same run

run.yaml, with the choices inline:
  model: my_module.Classifier     # a class in my_module.py in the current folder
  data: my_module.Digits
  trainer: {max_epochs: 5}
  quant:                          # the arguments of QuantRetrainCallback
    record_file: record.txt
    config: {weights: {dst_type: INT4}, skip_layers: [head]}
    schedule: {start: 1, freeze_bn: 0.5}

Without any option of quant, every layer that can be is quantized with INT8. The settings of a run are kept as
config.yaml in its log folder. A QuantRetrainCallback in trainer.callbacks takes the place of quant; giving both is
an error. With --debug an error comes with its traceback.
"""
_OTHERS = """\
examples:
  amct-lightning {name} --config run.yaml --ckpt_path lightning_logs/version_0/checkpoints/last.ckpt
  amct-lightning {name} --config lightning_logs/version_0/config.yaml --ckpt_path last.ckpt

The checkpoint tells how the model was quantized, so quant.config may be left out, but must not contradict it. With
--quant.enabled=false the checkpoint of a float model is evaluated. 'amct-lightning fit --help' shows a run.yaml.
"""


class RunCommand(Command):
    """One method of the Trainer.

    Args:
        name: The method.
        summary: One line for the list of commands.
    """

    def __init__(self, name: str, summary: str) -> None:
        self.name = name
        self.summary = summary

    @override
    def execute(self, arguments: Sequence[str], commands: Sequence[Command]) -> int:
        """Hand the arguments to the LightningCLI."""
        from amct_lightning.commands.quant_cli import QuantCLI  # noqa: PLC0415  (Lightning, for these commands only)

        names = [command.name for command in commands if isinstance(command, RunCommand)]
        QuantCLI(
            args=list(arguments),
            parser_kwargs={
                "prog": PROGRAM,
                "exit_on_error": False,
                "formatter_class": HelpFormatter,
                **{name: {"epilog": _FIT if name == "fit" else _OTHERS.format(name=name)} for name in names},
            },
        )
        return 0

    @override
    def complete(self, words: list[str]) -> None:
        """Answer a shell that asks for completions."""
        from amct_lightning.commands.quant_cli import QuantCLI  # noqa: PLC0415  (as above)

        skip(1)
        QuantCLI(args=[], run=False)  # without subcommands: see offer(); parsing answers and ends the process
