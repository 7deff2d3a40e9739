"""Every executor gives the answer of the search in one piece, shares what it finds, and stops when it is told."""

from __future__ import annotations

import json
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import pytest

from stagewright.cli.main import run
from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.errors import InvalidArgument
from stagewright.planner.executors.executor import executor
from stagewright.planner.executors.inline import InlineExecutor
from stagewright.planner.executors.mapped_search import solve_mapped
from stagewright.planner.executors.process import ProcessExecutor, SharedStep
from stagewright.planner.planning import make_plan
from stagewright.planner.search.exact import solve
from stagewright.planner.search.limits import LeastStep, Limits
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.verify import verify_certificate
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory

sys.path.insert(0, str(Path(__file__).parents[1] / "search"))

from random_problems import random_problem


def test_parts_one_after_the_other_prove_what_one_search_proves() -> None:
    with_plan = 0
    for seed in range(14):
        problem = random_problem(seed)
        whole, mapped = solve(problem, Limits(gap=0.0)), solve_mapped(problem, Limits(gap=0.0), InlineExecutor())
        assert mapped.status == whole.status
        if whole.plan is None:
            assert mapped.plan is None
            continue
        with_plan += 1
        assert mapped.plan is not None and mapped.plan.job == problem.job
        assert mapped.objective_s == pytest.approx(whole.objective_s, rel=1e-9)
        assert mapped.bound_s == pytest.approx(whole.bound_s, rel=1e-6)
        verify_certificate(mapped.plan, problem.profile)
    assert with_plan >= 5


def _with_plan(count: int) -> list[tuple[Problem, PlanOutcome]]:
    """Return the first problems that have a plan, each with the outcome of one search."""
    found = ((problem, solve(problem, Limits(gap=0.0))) for problem in map(random_problem, range(60)))
    return list(islice((pair for pair in found if pair[1].plan is not None), count))


def test_processes_answer_as_one_search_does() -> None:
    for problem, whole in _with_plan(2):
        mapped = solve_mapped(problem, Limits(gap=0.0), ProcessExecutor(2))
        assert mapped.status == whole.status
        assert mapped.objective_s == pytest.approx(whole.objective_s, rel=1e-9)
        assert mapped.bound_s == pytest.approx(whole.bound_s, rel=1e-6)


def test_a_part_closes_what_another_part_already_beats() -> None:
    problem, alone = _with_plan(1)[0]
    assert alone.objective_s is not None
    known = LeastStep(0.5 * alone.objective_s)
    beaten = solve(problem, Limits(gap=0.0, known=known))
    assert beaten.evaluated <= alone.evaluated
    if beaten.bound_s is not None:
        assert beaten.bound_s == pytest.approx(0.5 * alone.objective_s, rel=1e-9)
    assert known.least_s() == 0.5 * alone.objective_s


def test_a_shared_step_is_the_least_of_all_parts() -> None:
    steps: dict[int, float] = {}
    first, second = SharedStep(steps, 0), SharedStep(steps, 1)
    assert first.least_s() == float("inf")
    second.offer(2.0)
    first.offer(3.0)
    time.sleep(0.03)
    assert first.least_s() == second.least_s() == 2.0
    second.offer(5.0)
    assert steps == {0: 3.0, 1: 2.0}


def test_a_cancel_ends_every_process_with_the_best_so_far() -> None:
    problem = random_problem(9)
    stop = threading.Event()
    stop.set()
    outcome = solve_mapped(problem, Limits(gap=0.0, should_stop=stop.is_set), ProcessExecutor(2))
    assert outcome.status in ("no_solution", "feasible") and outcome.termination == "cancelled"


def test_the_command_plans_with_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile, cluster = profile_factory(4), cluster_factory(2)
    profile.save(tmp_path / "profile.json")
    cluster.save(tmp_path / "cluster.json")
    arguments = ["plan", str(tmp_path / "profile.json"), "--cluster", str(tmp_path / "cluster.json")]
    steps = []
    for name in ("inline", "process"):
        assert run([*arguments, "--global-batch", "8", "--gap", "0", "--executor", name, "--json"]) == 0
        steps.append(json.loads(capsys.readouterr().out)["objective_s"])
    assert steps[0] == pytest.approx(steps[1], rel=1e-9)


def test_an_absent_ray_says_what_to_install() -> None:
    try:
        import ray  # noqa: F401
    except ImportError:
        with pytest.raises(InvalidArgument, match="needs the package 'ray'") as error:
            executor("ray")
        assert error.value.hint is not None and "stagewright[ray]" in error.value.hint


@pytest.mark.soak
def test_ray_answers_as_one_search_does() -> None:
    pytest.importorskip("ray")
    for problem, whole in _with_plan(3):
        mapped = solve_mapped(problem, Limits(gap=0.0), executor("ray"))
        assert mapped.status == whole.status
        assert mapped.objective_s == pytest.approx(whole.objective_s, rel=1e-9)


def test_an_executor_refuses_what_it_does_not_map() -> None:
    profile, cluster = profile_factory(4), cluster_factory(2)
    problem = random_problem(1)
    job = problem.job.model_copy(update={"objective": "min-max-memory"})
    for name, asked in (("process", job), ("threads", problem.job)):
        with pytest.raises(InvalidArgument) as error:
            make_plan(profile, cluster, asked, executor=name)
        assert error.value.field == "executor"
