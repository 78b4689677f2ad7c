"""Training steps of two commits, in two processes that take turns.

    python -m tests.benchmarks.bench.compare main HEAD --networks vit --rounds 15

``.`` is the working tree as it is. Both commits run under the benchmark of this one; FP32 is the same for both, so its
ratio tells what the noise is. It prints a table, and writes ``compare.md`` and ``compare.json`` into ``--out``.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amct_lightning.files import write_text
from tests.benchmarks.bench.__main__ import add_settings
from tests.benchmarks.bench.machine import ROOT, Machine
from tests.benchmarks.bench.reports import as_markdown, as_terminal, duration
from tests.benchmarks.bench.results import Clocks, Facts, Spread, save
from tests.benchmarks.bench.variants import EXECUTORS, FP32, OWN
from tests.benchmarks.timing import Seconds

PACKAGE, BENCHMARK = "amct_lightning", ("tests/__init__.py", "tests/operators.py", "tests/benchmarks")
STEPS = 3
TITLES = ("network", "variant", "threads", "base", "head", "wall, head / base", "CPU, head / base", "verdict", "counts")


@dataclass(frozen=True)
class PairTiming:
    """The seconds of a step at both commits, and the ratio."""

    threads: int
    base: Clocks
    head: Clocks
    ratio: Clocks
    verdict: str


@dataclass
class Pair:
    """A variant on a network at both commits; if it failed at one of them, only why."""

    network: str
    variant: str
    failed: str = ""
    base: Facts | None = None
    head: Facts | None = None
    timings: list[PairTiming] = field(default_factory=list)


@dataclass
class Comparison:
    """Two commits side by side."""

    base: str
    head: str
    machine: Machine
    rounds: int
    pairs: list[Pair] = field(default_factory=list)


class Worker(AbstractContextManager["Worker"]):
    """A process with one of the commits.

    Args:
        name: What it is called in messages.
        commit: A commit, or ``.`` for the working tree.
        root: The repository.
    """

    def __init__(self, name: str, commit: str, root: Path = ROOT) -> None:
        self.name, self.commit = name, resolve(commit, root)
        self._folder = tempfile.TemporaryDirectory(prefix=f"bench-{name}-")
        folder = Path(self._folder.name)
        check_out(commit, folder, root)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.bench.worker"],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait(self) -> None:
        """Wait until the process has imported the package.

        Raises:
            RuntimeError: If it cannot, or has found another one.
        """
        package = Path(self._read()).resolve()
        if Path(self._folder.name).resolve() not in package.parents:
            raise RuntimeError(f"The process of {self.name} has imported {package} instead of the commit's package.")

    def ask(self, network: str, variant: str, threads: int, steps: int = 0) -> Any:
        """Return what the process answers.

        Raises:
            ValueError: If the variant cannot be trained there.
        """
        assert self._process.stdin is not None
        question = {"network": network, "variant": variant, "threads": threads, "steps": steps}
        print(json.dumps(question), file=self._process.stdin, flush=True)
        answer = self._read()
        if "failed" in answer:
            raise ValueError(f"{self.name}: {answer['failed']}")
        return answer["ok"]

    def seconds(self, network: str, variant: str, threads: int) -> Seconds:
        """Return the median seconds of a few steps in a row."""
        steps = self.ask(network, variant, threads, STEPS)
        return Seconds(*(statistics.median(clock) for clock in zip(*steps, strict=True)))

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"The process of {self.name} ({self.commit}) has ended; what it wrote is above.")
        return json.loads(line)


def resolve(commit: str, root: Path = ROOT) -> str:
    """Return the name of a commit as people write it, with the beginning of its hash."""
    if commit == ".":
        return "the working tree"
    found = subprocess.run(
        ["git", "rev-parse", "--short=10", "--verify", f"{commit}^{{commit}}"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        raise SystemExit(f"'{commit}' is no commit of {root}; give a branch, tag or hash, or '.' for the working tree.")
    short = found.stdout.strip()
    return short if short.startswith(commit) else f"{commit} ({short})"


def check_out(commit: str, folder: Path, root: Path = ROOT) -> None:
    """Put the package of a commit and the benchmark of the working tree into a folder; nothing in git changes."""
    if commit == ".":
        shutil.copytree(root / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        archive = subprocess.run(["git", "archive", commit, PACKAGE], cwd=root, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
    for name in BENCHMARK:
        source, target = root / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy: Any = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, target)


def verdict(ratio: Spread, control: Spread) -> str:
    """Tell whether a ratio of times is more than noise: its quartiles and those of the control do not overlap."""
    if ratio.low > control.high:
        return "slower"
    return "faster" if ratio.high < control.low else "as fast"


def compare(
    base: Worker, head: Worker, networks: Sequence[str], variants: Sequence[str], rounds: int, threads: Sequence[int]
) -> Iterator[Pair]:
    """Let two commits take turns, and yield each variant of a network when that is done."""
    for network in networks:
        pairs = [_counted(base, head, network, variant, threads[0]) for variant in dict.fromkeys((FP32, *variants))]
        running = [pair.variant for pair in pairs if not pair.failed]
        for count in threads:
            times = _timed(base, head, network, running, rounds, count)
            ratios = {variant: Clocks.ratio(*times[variant][::-1]) for variant in running}
            for pair in pairs:
                if not pair.failed:
                    ratio, clocks = ratios[pair.variant], (Clocks.of(side) for side in times[pair.variant])
                    judged = "control" if pair.variant == FP32 else verdict(ratio.wall, ratios[FP32].wall)
                    pair.timings.append(PairTiming(count, *clocks, ratio, judged))
        yield from pairs


def _counted(base: Worker, head: Worker, network: str, variant: str, threads: int) -> Pair:
    try:
        facts = [Facts(**side.ask(network, variant, threads)) for side in (base, head)]
    except ValueError as error:
        if variant == FP32:
            raise
        return Pair(network, variant, str(error))
    return Pair(network, variant, "", *facts)


def _timed(
    base: Worker, head: Worker, network: str, variants: Sequence[str], rounds: int, threads: int
) -> dict[str, tuple[list[Seconds], list[Seconds]]]:
    """Time all variants at both commits, which of the two comes first alternating."""
    times: defaultdict[str, tuple[list[Seconds], list[Seconds]]] = defaultdict(lambda: ([], []))
    for number in range(rounds):
        for variant in variants:
            for side in (0, 1) if number % 2 else (1, 0):
                times[variant][side].append((base, head)[side].seconds(network, variant, threads))
    return times


def rows(pair: Pair) -> Iterator[list[str]]:
    """Yield the rows of the table for a variant of a network."""
    if pair.failed:
        yield [pair.network, pair.variant, *["-"] * 5, "failed", pair.failed]
    for timing in pair.timings:
        seconds = (duration(clocks.wall.median) for clocks in (timing.base, timing.head))
        ratios = (str(timing.ratio.wall), str(timing.ratio.cpu))
        yield [pair.network, pair.variant, str(timing.threads), *seconds, *ratios, timing.verdict, counts(pair)]


def counts(pair: Pair) -> str:
    """Say which of the numbers that do not depend on time have changed."""
    assert pair.base is not None
    assert pair.head is not None
    changed = [
        f"{name.replace('_', ' ')} {before} to {after}"
        for name, before in vars(pair.base).items()
        if before != (after := getattr(pair.head, name))
    ]
    return ", ".join(changed) or "the same"


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> None:
    """Compare two commits."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench.compare", description=__doc__.splitlines()[0]
    )
    parser.add_argument("base", help="a branch, tag or hash, or '.' for the working tree")
    parser.add_argument("head", help="the same")
    add_settings(parser, rounds=15)
    parser.add_argument("--variants", nargs="+", default=[OWN], choices=[OWN, *EXECUTORS], metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for the table and JSON")
    args = parser.parse_args(arguments)
    with ExitStack() as stack:
        commits = {"base": args.base, "head": args.head}
        base, head = (stack.enter_context(Worker(name, commit, root)) for name, commit in commits.items())
        for worker in (base, head):  # both start meanwhile
            worker.wait()
        result = Comparison(base.commit, head.commit, Machine.this(), args.rounds)
        for pair in compare(base, head, args.networks, args.variants, args.rounds, args.threads):
            print(f"{pair.network}, {pair.variant}: done", flush=True)
            result.pairs.append(pair)
    result.machine.load.append(round(os.getloadavg()[0], 1))
    table = (f"{result.base} and {result.head}", TITLES, [row for pair in result.pairs for row in rows(pair)])
    note = f"Medians and quartiles of {args.rounds} turns of {STEPS} steps. {result.machine}."
    save(result, args.out / "compare.json")
    write_text(args.out / "compare.md", f"{as_markdown(*table)}\n\n{note}\n")
    print(f"\n{as_terminal(*table)}\n{note}\nIn {args.out}: compare.md, compare.json")


if __name__ == "__main__":
    sys.exit(main())
