"""One network, trained in all ways, a step of each in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from amct_lightning import prepare_qat, quantized_layers
from tests.benchmarks.bench.facts import facts
from tests.benchmarks.bench.results import Clocks, Measured, NetworkResults, Timing
from tests.benchmarks.bench.training import Stages, Training
from tests.benchmarks.bench.variants import COMPILED, FP32, LOOP, Variant
from tests.benchmarks.bench.workloads import Workload
from tests.benchmarks.timing import Seconds, in_turns

MOST_PREPARATIONS = 3


def measure(
    name: str, workload: Workload, ways: Mapping[str, Variant], rounds: int, threads: Sequence[int]
) -> NetworkResults:
    """Train a network in all ways, a step of each in turn.

    Args:
        name: The name of the network.
        workload: The network.
        ways: How it is trained, the float way among them.
        rounds: How many steps of each are timed, for each number of threads.
        threads: The numbers of threads.

    Returns:
        What was measured. A way that fails is in it with the reason; the float one must not fail.
    """
    torch._dynamo.reset()  # what was compiled for another network counts against the limits of this one
    torch.manual_seed(0)
    model, x = workload.model(), workload.batch()
    results = NetworkResults(name, workload.title, len(quantized_layers(prepare_qat(model, None, x))))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads[0])
        trainings = _prepare_all(results, _with_loop(ways, workload), model, x, rounds)
        for count in threads:
            torch.set_num_threads(count)
            _time(results.measured, trainings, rounds, count)
    finally:
        torch.set_num_threads(before)
    return results


def reason(error: Exception) -> str:
    """Return the first line of an error, and not too much of it."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def _with_loop(ways: Mapping[str, Variant], workload: Workload) -> dict[str, Variant]:
    """Put the float loop over a recurrent cell after the float network."""
    if workload.loop is None:
        return {FP32: ways[FP32], **ways}
    make = workload.loop
    return {FP32: ways[FP32], LOOP: Variant("FP32, loop over a cell", lambda model, x: make()), **ways}


def _prepare_all(
    results: NetworkResults, ways: Mapping[str, Variant], model: nn.Module, x: Tensor, rounds: int
) -> dict[str, Training]:
    trainings: dict[str, Training] = {}
    for variant, way in ways.items():
        measured = Measured(variant, way.title)
        results.measured.append(measured)
        try:
            stages, times = Stages(), 1 if way.compiled else min(MOST_PREPARATIONS, rounds)
            for _ in range(times):
                training = stages.prepare(way, model, x)
            measured.facts = facts(training)
        except Exception as error:
            if variant == FP32:
                raise
            measured.failed = reason(error)
        else:
            measured.stages = {name: Clocks.of(seconds) for name, seconds in stages.seconds.items()}
            trainings[variant] = training
    return trainings


def _time(found: Sequence[Measured], trainings: Mapping[str, Training], rounds: int, threads: int) -> None:
    seconds = in_turns({variant: training.step for variant, training in trainings.items()}, rounds)
    for measured in found:
        if measured.variant in seconds:
            ratios = _ratios(measured.variant, seconds)
            measured.timings.append(Timing(threads, Clocks.of(seconds[measured.variant]), ratios))


def _ratios(variant: str, seconds: Mapping[str, Sequence[Seconds]]) -> dict[str, Clocks]:
    """Compare a variant with the float ones: a compiled network with the compiled one as well."""
    bases = [FP32, LOOP, *([FP32 + COMPILED] if variant.endswith(COMPILED) else [])]
    return {
        base: Clocks.ratio(seconds[variant], seconds[base]) for base in bases if base in seconds and base != variant
    }
