"""Results as tables, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.table import Table

from amct_lightning.wording import TEXT_BOX, as_text
from tests.benchmarks.bench.results import Clocks, Measured, NetworkResults, Results
from tests.benchmarks.bench.variants import COMPILED, FP32, LOOP

REFERENCES = {FP32: "FP32", LOOP: "the float loop", FP32 + COMPILED: "compiled FP32"}
COSTS = (
    *("variant", "ops", "extra", "syncs", "kept", "+model", "alive", "peak"),
    *("conversion", "calibration", "record"),
)
LEGEND = (
    "Step: forward, backward and optimizer; ratios are medians over the rounds, with quartiles; CPU is the processor's "
    "time in all threads of the process. Ops: operators of forward and backward. Extra: how many more than FP32's, "
    "per layer that this package quantizes. Syncs: operators that make the host wait for a device. Bytes, in parts of "
    "FP32's: what autograd keeps for backward, parameters and buffers left out (kept) or counted as well (+model); "
    "what the allocator has handed out by the end of the forward (alive), and at most during a step (peak)."
)


def duration(seconds: float) -> str:
    """Write seconds for people."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def times(network: NetworkResults) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows of the table of times."""
    timings = [timing for each in network.measured for timing in each.timings]
    bases = [base for base in REFERENCES if any(base in timing.ratios for timing in timings)]
    titles = [f"{clock} / {REFERENCES[base]}" for base in bases for clock in ("wall", "CPU")]
    rows = []
    for each in network.measured:
        for timing in each.timings:
            clocks = [timing.ratios.get(base) for base in bases]
            ratios = (str(spread) for clock in clocks for spread in ((clock.wall, clock.cpu) if clock else ("-", "-")))
            rows.append([each.title, str(timing.threads), duration(timing.seconds.wall.median), *ratios])
    return ["variant", "threads", "step", *titles], rows


def costs(network: NetworkResults) -> Iterator[list[str]]:
    """Yield the rows of a network in the table of what can be counted, and of what comes before and after training."""
    base = network.float_facts
    for each in network.measured:
        facts = each.facts
        if facts is None:
            continue
        extra = (facts.operators - base.operators) / network.quantized_layers
        ratios = (
            getattr(facts, name) / getattr(base, name)
            for name in ("kept_bytes", "kept_bytes_with_model", "alive_bytes", "peak_bytes")
        )
        numbers = [str(facts.operators), f"{extra:.1f}", str(facts.host_syncs), *(f"{ratio:.2f}" for ratio in ratios)]
        yield [each.title, *numbers, *(_stage(each, name) for name in ("conversion", "calibration", "record"))]


def _stage(measured: Measured, name: str) -> str:
    clocks: Clocks | None = measured.stages.get(name)
    if clocks is None:
        return "-"
    text = duration(clocks.wall.median)
    if name == "conversion" and "compilation" in measured.stages:
        return f"{text} + {duration(measured.stages['compilation'].wall.median)}"
    if name != "calibration" or not measured.timings:
        return text
    return f"{text}, {clocks.wall.median / measured.timings[0].seconds.wall.median:.1f} steps"


def tables(network: NetworkResults) -> Iterator[tuple[str, Sequence[str], list[list[str]]]]:
    """Yield headline, titles and rows of the tables of a network."""
    head = f"{network.network}: {network.title}, {network.quantized_layers} quantized layers"
    yield f"{head}: time of a step", *times(network)
    yield f"{head}: costs", COSTS, list(costs(network))
    failed = [[each.title, each.failed] for each in network.measured if each.failed]
    if failed:
        yield f"{head}: not measured", ("variant", "reason"), failed


def notes(results: Results) -> list[str]:
    """Return what stands below the tables."""
    out = [f"{name} is left out: {reason}." for name, reason in results.left_out.items()]
    return [LEGEND, *out, f"{results.rounds} rounds; {results.machine}."]


def as_terminal(head: str, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table for the terminal."""
    table = Table(title=head, title_justify="left", box=TEXT_BOX, pad_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold", no_wrap=title in ("variant", "calibration"))
    for row in rows:
        table.add_row(*row)
    return as_text(table)


def as_markdown(head: str, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return f"### {head}\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
