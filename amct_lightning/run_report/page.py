"""The page: header, sections, and what was read."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import PackageNotFoundError, version

from amct_lightning.run_report.curves import OWN, PHASES
from amct_lightning.run_report.sections import Section, all_sections
from amct_lightning.run_report.sources import Run
from amct_lightning.run_report.stylesheet import stylesheet
from amct_lightning.run_report.tables import number, text

_MOST_METRICS = 8
# Nothing is loaded and nothing is run, whatever a name in a log file contains.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(run: Run) -> str:
    """Return the report as one HTML page; call it with the settings of ``style.drawing``.

    Args:
        run: What was found of a run.
    """
    sections = all_sections(run)
    title = text(f"Quantization report: {run.name}")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>",
            f"<style>{stylesheet()}</style></head>",
            f"<body><main>{_header(run, sections)}",
            *(section.html() for section in sections),
            _footer(run),
            "</main></body></html>\n",
        ]
    )


def _header(run: Run, sections: list[Section]) -> str:
    links = "".join(f'<li><a href="#{s.key}">{text(s.title)}</a></li>' for s in sections if s.body)
    facts = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}{f'<small>{text(more)}</small>' if more else ''}</dd></div>"
        for name, value, more in (*_facts(run), *_last_metrics(run))
    )
    notes = "".join(f'<p class="note">{text(note)}</p>' for note in run.notes)
    return (
        f"<header><h1>Quantization report</h1><p><code>{text(run.source)}</code></p>\n{notes}\n<dl>{facts}</dl>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>'
    )


def _facts(run: Run) -> list[tuple[str, str, str]]:
    facts = []
    if run.changed:
        facts.append(("last change", f"{run.changed:%Y-%m-%d %H:%M}", "UTC, of the newest file"))
    if run.rows:
        bits = Counter(row.bits for row in run.rows if row.quantized)
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(bits.items()))
        facts.append(("quantized layers", f"{bits.total()} of {len(run.rows)}", kinds))
    elif run.monitor or run.record:
        facts.append(("quantized layers", str(len(run.record or run.monitor)), ""))
    if run.metrics.steps:
        epochs = f"{run.metrics.epochs} epoch{'s' * (run.metrics.epochs != 1)}" if run.metrics.epochs else ""
        facts.append(("training steps", str(run.steps), epochs))
    if len(run.phases):
        facts.append(("phase at the end", PHASES.get(int(run.phases.values[-1]), ("unknown",))[0], ""))
    if run.checkpoint:
        known = (("epoch", run.checkpoint.epoch), ("step", run.checkpoint.step))
        where = ", ".join(f"{word} {value}" for word, value in known if value is not None)
        facts.append(("checkpoint", run.checkpoint.path.name, where))
    return facts


def _last_metrics(run: Run) -> list[tuple[str, str, str]]:
    """Return the last values of the metrics, those of validation and test first."""
    named = [(name, s) for name, s in run.metrics.series.items() if len(s) and not name.startswith((*OWN, "lr"))]
    named.sort(key=lambda item: not item[0].lower().startswith(("val", "test")))
    return [(name, number(s.values[-1]), f"at step {s.steps[-1]}") for name, s in named[:_MOST_METRICS]]


def _footer(run: Run) -> str:
    try:
        program = f"amct-lightning {version('amct-lightning')}"
    except PackageNotFoundError:  # used from a source tree that is not installed
        program = "amct-lightning"
    files = "".join(f"<li>{text(run.relative(path))}</li>" for path in run.files)
    return f'<section id="files"><h2>Files</h2><p>Read by {text(program)}:</p><ul class="files">{files}</ul></section>'
