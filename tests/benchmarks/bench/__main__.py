"""The price of a quantized training step: this package beside float training and other packages, in one process.

    python -m tests.benchmarks.bench --networks vit mlp --variants amct_lightning torch.ao --rounds 15 --threads 1 2

It prints tables, and writes them as ``bench.md`` with ``bench.json`` and ``bench.png`` into the folder ``--out``.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from amct_lightning.files import write_text
from tests.benchmarks.bench.chart import draw
from tests.benchmarks.bench.machine import Machine, cores
from tests.benchmarks.bench.measuring import measure
from tests.benchmarks.bench.reports import as_markdown, as_terminal, notes, tables
from tests.benchmarks.bench.results import Results, load, save
from tests.benchmarks.bench.variants import COMPILED, FP32, Variant, usual, variants, whole
from tests.benchmarks.bench.workloads import TINY, WORKLOADS, Workload


def select(names: Sequence[str], compiled: bool) -> tuple[dict[str, Variant], dict[str, str]]:
    """Return the variants to measure, the float one first, and why others are left out.

    Args:
        names: Those that were asked for; none is the usual ones.
        compiled: Whether those of this package and the float one come once more with the whole network compiled.
    """
    known = variants()
    asked = list(dict.fromkeys([FP32, *(names or usual(list(known)))]))
    left_out = {name: known[name].missing for name in asked if known[name].missing}
    ways = {name: known[name] for name in asked if name not in left_out}
    if compiled:
        ways |= {name + COMPILED: whole(way) for name, way in ways.items() if way.is_own or name == FP32}
    return ways, left_out


def run(
    workloads: Mapping[str, Workload],
    variant_names: Sequence[str],
    rounds: int,
    threads: Sequence[int],
    compiled: bool,
    file: Path,
) -> Results:
    """Measure all variants on all networks; what is done is printed and in the file when the next network begins."""
    ways, left_out = select(variant_names, compiled)
    for name, missing in left_out.items():
        print(f"{name} is left out: {missing}.", flush=True)
    results = Results(Machine.this(), rounds, left_out)
    for name, workload in workloads.items():
        print(f"\nMeasuring {name}: {', '.join(ways)} ...", flush=True)
        network = measure(name, workload, ways, rounds, threads)
        results.networks.append(network)
        save(results, file)
        for table in tables(network):
            print(as_terminal(*table), flush=True)
    results.machine.load.append(round(os.getloadavg()[0], 1))
    save(results, file)
    return results


def write(results: Results, folder: Path) -> None:
    """Write tables and chart."""
    parts = [as_markdown(*table) for network in results.networks for table in tables(network)]
    write_text(folder / "bench.md", "\n\n".join([*parts, *notes(results)]) + "\n")
    draw(results, folder / "bench.png")


def quiet() -> None:
    """Keep what libraries warn of from the tables."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "amct_lightning", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch._dynamo.config.allow_rnn = True  # PyTorch refuses to compile recurrent layers otherwise


def add_settings(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add the options that the comparison of commits has as well."""
    parser.add_argument("--networks", nargs="+", default=list(WORKLOADS), choices=[*WORKLOADS, *TINY], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=rounds, help="timed turns of each variant")
    parser.add_argument("--threads", type=int, nargs="+", default=[n for n in (1, 2) if n <= cores()], metavar="N")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or show what was measured before."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench", description=__doc__.splitlines()[0])
    add_settings(parser, rounds=15)
    parser.add_argument("--variants", nargs="+", default=[], choices=list(variants()), metavar="NAME")
    parser.add_argument(
        "--compile", action="store_true", help="whole networks through torch.compile too; takes minutes"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for tables, JSON and chart")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing, show the results in a bench.json")
    args = parser.parse_args(arguments)
    if args.show is not None:
        results = load(Results, args.show)
        for network in results.networks:
            for table in tables(network):
                print(as_terminal(*table))
    else:
        known, file = WORKLOADS | TINY, args.out / "bench.json"
        workloads = {name: known[name] for name in args.networks}
        results = run(workloads, args.variants, args.rounds, args.threads, args.compile, file)
    write(results, args.out)
    print("\n" + "\n".join(notes(results)) + f"\nIn {args.out}: bench.md, bench.json, bench.png")


if __name__ == "__main__":
    quiet()  # here, as it is for all of the process
    sys.exit(main())
