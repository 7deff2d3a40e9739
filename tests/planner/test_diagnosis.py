"""An infeasible question comes back with the plan that misses by least and changes that do help, each true when tried."""

from __future__ import annotations

import re
from itertools import count

import pytest

from stagewright.planner.diagnosis import LEAST_S, _evenly_cut, _improved, _promising, diagnose
from stagewright.planner.documents import Cluster, ModelProfile, TrainingJob
from stagewright.planner.documents.job import Forbid, Pins, SearchSpace
from stagewright.planner.documents.outcome import Diagnosis
from stagewright.planner.planning import make_plan
from stagewright.planner.search.brute_force import best_of_all
from stagewright.planner.search.limits import Limits, Progress
from stagewright.planner.search.problem import Partition, Problem
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory

MEMORY_BYTES = 1.9e8


def _question(memory_bytes: float = MEMORY_BYTES, **space: object) -> tuple[ModelProfile, Cluster, TrainingJob]:
    profile = profile_factory(4, parameters=4_000_000, activation_bytes=[2e7, 4e7, 4e7, 2e7], microbatches=(1, 2))
    fields = {"zero": (0,), "recompute": ("none",), "schedules": ("1f1b", "gpipe"), "max_chunks": 1, **space}
    job = TrainingJob(
        global_batch=4, sequence_length=128, precision="fp32", space=SearchSpace.model_validate(fields), gap=0.0
    )
    return profile, cluster_factory(2, 2, memory_bytes=memory_bytes), job


def _fits(profile: ModelProfile, cluster: Cluster, job: TrainingJob, devices: int | None = None) -> bool:
    problem = Problem(profile, cluster, job, devices or cluster.num_devices)
    return best_of_all(problem, problem.candidates()) is not None


def _diagnosis(profile: ModelProfile, cluster: Cluster, job: TrainingJob) -> Diagnosis:
    outcome = make_plan(profile, cluster, job)
    assert outcome.status == "infeasible" and outcome.diagnosis is not None
    return outcome.diagnosis


def test_each_loosened_constraint_helps_exactly_when_exhaustive_search_says_so() -> None:
    truths = [truth for memory_bytes in (1.9e8, 2.2e8, 2.5e8) for truth in _truths(memory_bytes)]
    assert sum(truths) >= 3 and not all(truths)


def _truths(memory_bytes: float) -> list[bool]:
    """Check every change against exhaustive search; return which of them helped."""
    pins, forbids = Pins(schedule="gpipe", microbatch=2), (Forbid(name="dp", value="1"),)
    question = _question(memory_bytes, pins=pins, forbids=forbids)
    profile, cluster, job = question
    changes = {relaxation.change for relaxation in _diagnosis(*question).relaxations}
    expected = {
        "schedule not pinned to gpipe": {"pins": pins.model_copy(update={"schedule": None})},
        "microbatch not pinned to 2": {"pins": pins.model_copy(update={"microbatch": None})},
        "dp=1 not forbidden": {"forbids": ()},
        "recompute selective and full allowed": {"recompute": ("none", "selective", "full")},
        "zero 1 allowed": {"zero": (0, 1)},
        "every schedule allowed": {"schedules": ()},
    }
    truths = []
    for change, update in expected.items():
        fields = job.space.model_dump() | update
        changed = job.model_copy(update={"space": SearchSpace.model_validate(fields)})
        truths.append(_fits(profile, cluster, changed))
        assert (change in changes) == truths[-1], (memory_bytes, change)
    return truths


def test_the_memory_named_is_enough_and_less_than_the_bound_is_not() -> None:
    profile, cluster, job = question = _question(pins=Pins(pp=2, dp=2))
    diagnosis = _diagnosis(*question)
    worst = max(item.short_bytes for item in diagnosis.shortfalls)
    for item in diagnosis.shortfalls:
        assert item.short_bytes == pytest.approx(item.needed_bytes - item.available_bytes)
        assert item.items.total == pytest.approx(item.needed_bytes)
    enough = (cluster.groups[0].device.memory_bytes * 0.95 + worst) / 0.95
    assert _fits(profile, cluster_factory(2, 2, memory_bytes=enough * (1 + 1e-9)), job)
    assert not _fits(profile, cluster_factory(2, 2, memory_bytes=enough * 0.98), job)
    text = next(item.change for item in diagnosis.relaxations if item.change.startswith("devices with"))
    assert f"devices with {enough / 2**30:.2f} GiB" in text
    bound = float(re.findall(r"less than ([0-9.]+) GiB", text)[0])
    assert bound <= enough / 2**30 <= bound * 1.02 + 0.01


def test_the_devices_named_are_enough_and_one_node_less_is_not() -> None:
    profile, _, job = _question()
    small = cluster_factory(1, 2, memory_bytes=MEMORY_BYTES)
    diagnosis = _diagnosis(profile, small, job)
    text = next(item.change for item in diagnosis.relaxations if "instead of 2" in item.change)
    count = int(text.split()[0])
    assert _fits(profile, cluster_factory(1, count, memory_bytes=MEMORY_BYTES), job)
    assert not _fits(profile, cluster_factory(1, count - 1, memory_bytes=MEMORY_BYTES), job)


def test_headroom_that_is_in_the_way_is_named() -> None:
    profile, _, job = _question()
    cluster = cluster_factory(2, 2, memory_bytes=4e8)
    wide = job.model_copy(update={"space": job.space.model_copy(update={"memory_headroom": 0.7})})
    diagnosis = _diagnosis(profile, cluster, wide)
    text = next(item.change for item in diagnosis.relaxations if item.change.startswith("memory_headroom"))
    most = float(re.findall(r"at most ([0-9.]+)", text)[0])
    changed = job.model_copy(update={"space": job.space.model_copy(update={"memory_headroom": most})})
    assert _fits(profile, cluster, changed)


@pytest.mark.parametrize(("tied", "memory_bytes"), [((0, 2), 2.2e8), ((1, 3), 2.2e8), ((0, 2), 2.8e8)])
def test_a_diagnosis_keeps_tied_layers_together_and_says_whether_untying_them_helps(
    tied: tuple[int, int], memory_bytes: float
) -> None:
    profile, cluster, job = _question(memory_bytes, pins=Pins(pp=2, dp=2, microbatch=1))
    names = tuple(profile.layer_names[layer] for layer in tied)
    bound = job.model_copy(update={"space": job.space.model_copy(update={"ties": (names,)})})
    diagnosis = _diagnosis(profile, cluster, bound)
    assert diagnosis.nearest is not None
    for stage in diagnosis.nearest.stages:
        assert len({layer in stage.layer_indices for layer in range(tied[0], tied[1] + 1)}) == 1
    untied = any("not tied" in item.change for item in diagnosis.relaxations)
    assert untied == _fits(profile, cluster, job) == (memory_bytes > 2.5e8)


def test_ties_that_leave_too_few_places_to_cut_are_counted() -> None:
    profile, cluster, job = _question(2e9, pins=Pins(pp=4))
    bound = job.model_copy(update={"space": job.space.model_copy(update={"ties": (profile.layer_names[:3],)})})
    assert "tied layers leave 2 of 4" in _diagnosis(profile, cluster, bound).message


def test_the_memory_named_is_that_of_the_nearest_plan_where_a_deadline_ended_the_search_for_less() -> None:
    profile, cluster, job = _question(zero=(0, 1, 2, 3), recompute=("none", "selective", "full"), memory_bytes=5e7)
    ticks = count(step=0.5 * LEAST_S)
    limits = Limits(deadline_s=LEAST_S, clock=lambda: next(ticks))
    found = diagnose(Problem(profile, cluster, job, cluster.num_devices), limits)
    assert found.nearest is not None
    named = re.search(
        r"devices with ([\d.]+) GiB .* less than ([\d.]+) GiB", " ".join(r.change for r in found.relaxations)
    )
    assert named is not None and float(named[2]) < 0.9 * float(named[1])
    peak_gib = max(found.nearest.prediction.peak_memory_bytes) / 2.0**30
    assert float(named[1]) == pytest.approx(peak_gib / (1.0 - job.space.memory_headroom), abs=0.006)


def _large_question() -> Problem:
    profile = profile_factory(16, parameters=4_000_000, activation_bytes=[(1 + i % 5) * 2e7 for i in range(16)])
    space = SearchSpace(zero=(0,), recompute=("none",), pins=Pins(pp=4))
    job = TrainingJob(global_batch=16, sequence_length=128, precision="fp32", gap=0.0, space=space)
    return Problem(profile, cluster_factory(2, 4, memory_bytes=5e6), job, 8)


def test_no_single_boundary_moved_brings_the_nearest_plan_nearer() -> None:
    problem = _large_question()
    even = [cut for one in _promising(problem)[:40] if (cut := _evenly_cut(problem, one)) is not None]
    better = 0
    for cut in even:
        found = _improved(problem, cut, Limits())
        better += bool(found.peaks.max() < cut.peaks.max())
        bounds = found.partition.bounds
        for end in range(1, len(bounds) - 1):
            for step in (-1, 1):
                moved = (*bounds[:end], bounds[end] + step, *bounds[end + 1 :])
                if moved[end - 1] < moved[end] < moved[end + 1]:
                    trial = Partition(moved, found.partition.levels)
                    assert problem.pipeline(found.candidate, trial).peak_bytes.max() >= found.peaks.max()
    assert better > 3


def test_a_deadline_ends_the_search_for_the_nearest_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, evaluated = _large_question(), count()
    pipeline = Problem.pipeline
    monkeypatch.setattr(Problem, "pipeline", lambda *args: (next(evaluated), pipeline(*args))[1])
    ticks = count(step=0.05 * LEAST_S)
    told: list[Progress] = []
    found = diagnose(problem, Limits(deadline_s=LEAST_S, clock=lambda: next(ticks), progress=told.append))
    assert found.nearest is not None and next(evaluated) < 60
    assert [(state.phase, state.done, state.total) for state in told] == [("why nothing fits", k, 3) for k in range(4)]
