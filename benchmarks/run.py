"""One workload: check every provider, measure its memory, then time all of them and the floor in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import floor, gpu, measure, truth
from benchmarks.measure import Meter, Pass, Subject, Times
from benchmarks.providers import PROVIDERS, Builder, LossOfInput
from benchmarks.results import FLOOR, Row
from benchmarks.workloads import Case, Workload, make_case, short_name

Providers = Mapping[str, Mapping[str, Builder]]  # builders by provider and loss


def in_region(loss: LossOfInput, workload: Workload, device: str) -> LossOfInput:
    if not workload.autocast:
        return loss

    def under_autocast(input: Tensor) -> Tensor:
        with torch.autocast(device, workload.dtype):
            return loss(input)

    return under_autocast


def own_logits(case: Case) -> Case:
    return replace(case, input=case.input.detach().clone().requires_grad_())


def meter_of(case: Case) -> Meter:
    if case.input.device.type == "cpu":
        return measure.CPU
    return gpu.HOST if case.input.nbytes < floor.SMALLEST_BYTES else gpu.EVENTS


def run(
    workload: Workload,
    providers: Providers,
    passes: Sequence[Pass],
    rounds: int,
    device: str,
    advance: Callable[[], object],
) -> list[Row]:
    """`advance` is called once when everything is ready to be timed, and after every round."""
    case = make_case(workload, device)
    meter = meter_of(case)
    built = {name: builders[workload.loss](case) for name, builders in providers.items() if workload.loss in builders}
    losses = {name: in_region(loss, workload, device) for name, loss in built.items() if loss is not None}
    wanted = truth.find_truth(case)
    # What a provider leaves of logits that it overwrites is checked no more, but costs the same time as logits.
    cases = {name: own_logits(case) if PROVIDERS[name].overwrites_input else case for name in losses}
    errors = {}
    for name, loss in losses.items():
        tolerance = truth.SAME_LOSS if PROVIDERS[name].is_peer else truth.TOLERANCE
        errors[name] = truth.check(loss, cases[name], wanted, tolerance[case.input.dtype])
    del wanted  # of the input's size, in float64

    subjects: dict[tuple[str, str], Subject] = {}
    peaks: dict[tuple[str, str], tuple[int, int | None]] = {}
    for name, loss in losses.items():
        if not errors[name].right:  # how fast a wrong answer comes is of no interest
            continue
        for one in passes:
            prepare = partial(one.prepare, loss, cases[name].input)
            subjects[name, one.name] = measure.warm_up(prepare, meter)
            with measure.memory_from_torch():
                peaks[name, one.name] = meter.peak_allocated_bytes(prepare), meter.peak_resident_bytes(prepare)
    # Made after the peaks were measured, and only now: the fewer pages the system holds, the less it does in between.
    yardstick = floor.Floor(case.input.nbytes, device) if case.input.nbytes >= floor.SMALLEST_BYTES else None
    if yardstick is not None:
        for name, function in yardstick.functions().items():
            subjects[FLOOR, name] = measure.warm_up(partial(measure.repeated, function), meter)
    advance()
    times = measure.time_in_turn(subjects, rounds, advance, meter)
    # Otherwise the compiler takes the next workload for one more variant of this one, and gives up after some.
    torch.compiler.reset()

    rows = []
    for name in losses:
        for one in passes:
            allocated, resident = peaks.get((name, one.name), (None, None))
            rows.append(
                make_row(
                    case,
                    name,
                    one.name,
                    times.get((name, one.name)),
                    right=errors[name].right,
                    value_error=errors[name].value,
                    gradient_error=errors[name].gradient,
                    floor_us=floor_us(case, one, times) if yardstick is not None else None,
                    counted_bytes=floor.counted_bytes(case, one),
                    peak_allocated_bytes=allocated,
                    peak_resident_bytes=resident,
                )
            )
    if yardstick is not None:
        for name in yardstick.functions():
            moved = yardstick.bytes_moved(name)
            rows.append(make_row(case, FLOOR, name, times[FLOOR, name], right=True, counted_bytes=moved))
    return rows


def floor_us(case: Case, one: Pass, times: Mapping[tuple[str, str], Times]) -> float:
    counts = floor.least_passes(case, one)
    return 1e6 * sum(count * times[FLOOR, name].median_s for name, count in counts.items())


def make_row(case: Case, provider: str, pass_name: str, timing: Times | None, *, right: bool, **more: Any) -> Row:
    workload = case.workload
    timed: dict[str, Any] = {}
    if timing is not None:
        timed = {
            "median_us": 1e6 * timing.median_s,
            "first_quartile_us": 1e6 * timing.first_quartile_s,
            "third_quartile_us": 1e6 * timing.third_quartile_s,
            "fastest_us": 1e6 * timing.fastest_s,
            "rounds": timing.rounds,
            "calls_per_sample": timing.calls,
        }
    return Row(
        workload=workload.name,
        shape="x".join(map(str, workload.data.shape)),
        dtype=short_name(workload.dtype),
        memory_format=short_name(workload.memory_format),
        target_dtype=short_name(case.target.dtype),
        device=case.input.device.type,
        provider=provider,
        pass_name=pass_name,
        right=right,
        **timed,
        **more,
    )
