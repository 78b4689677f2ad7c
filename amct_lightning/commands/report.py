"""``amct-lightning report``: the pictures of a run in one HTML file."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from typing_extensions import override

from amct_lightning.commands.base import ParsedCommand, UserError
from amct_lightning.commands.output import check_output


class ReportCommand(ParsedCommand):
    """Write the report of a run."""

    name = "report"
    summary = "Show a run in pictures, as one HTML file."
    description = (
        "Write a report of a run: accuracy and loss with the phases of the training, how the factors moved, what\n"
        "quantization costs in each layer, and the conversion table. One HTML file that needs nothing else."
    )
    epilog = """\
examples:
  amct-lightning report lightning_logs/version_0 -o report.html
  amct-lightning report lightning_logs/version_0/checkpoints/last.ckpt -o report.html

Curves are drawn from what CSVLogger or TensorBoardLogger wrote, trajectories and SQNR from what the callback
QuantMonitor wrote, as with
  amct-lightning fit --config run.yaml --trainer.logger CSVLogger --trainer.logger.save_dir logs \\
      --trainer.callbacks QuantMonitor
The report needs matplotlib and jinja2: pip install 'amct-lightning[report]'
"""

    @override
    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the arguments to the parser of the command."""
        parser.add_argument("source", metavar="RUN_DIR|CKPT", help="The log folder of a run, or a checkpoint.")
        parser.add_argument("-o", "--output", metavar="FILE", default="report.html", help="The HTML file to write.")
        parser.add_argument("--force", action="store_true", help="Replace the file if it exists.")

    @override
    def run(self, options: Namespace) -> int:
        """Write the report."""
        source = Path(options.source).expanduser()
        if not source.exists():
            raise UserError(f"there is no folder or checkpoint '{source}'. Give the log_dir of a run or a .ckpt file.")
        check_output(options.output, options.force, "report")
        from amct_lightning.run_report import write_report  # noqa: PLC0415  (torch; not for help and errors)

        try:
            written = write_report(source, options.output)
        except ImportError as error:
            raise UserError(str(error)) from error
        sys.stdout.write(f"Wrote the report to '{written}'.\n")
        return 0
