"""The report of a run: pictures and tables in one HTML file. Needs matplotlib, and Lightning not at all."""

from amct_lightning.run_report.write import write_picture, write_report

__all__ = ["write_picture", "write_report"]
