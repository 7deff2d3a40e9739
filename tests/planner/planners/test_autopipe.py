"""AutoPipe: moving layers off the master stage only ever helps, and helps where the balance is wrong."""

from __future__ import annotations

from stagewright.planner.documents import TrainingJob
from stagewright.planner.documents.job import Pins, SearchSpace
from stagewright.planner.planners.autopipe import master_stage, shifted
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.search.problem import Problem
from stagewright.testing.mocked_cluster import cluster_factory
from stagewright.testing.mocked_profile import profile_factory


def table(forward_s: list[float], ranks: int, batch: int) -> StageTable:
    space = SearchSpace(schedules=("1f1b",), pins=Pins(pp=ranks, microbatch=1))
    job = TrainingJob(global_batch=batch, sequence_length=128, precision="fp32", space=space)
    problem = Problem(profile_factory(forward_s=forward_s), cluster_factory(ranks, 1), job, ranks)
    return StageTable(problem, problem.candidates()[0])


def test_the_master_stage_is_the_slow_one():
    question = table([1e-3] * 8, 4, 16)
    assert master_stage(question, question.partition((0, 1, 5, 6, 8))) == 1


def test_moves_lower_the_simulated_step_and_never_raise_it():
    question = table([1e-3, 3e-3, 1e-3, 2e-3, 1e-3, 1e-3, 2e-3, 1e-3], 4, 16)
    start = question.partition((0, 4, 5, 6, 8))
    before = question.problem.step_s(question.candidate, start)
    after, partition = shifted(question, start)
    assert after == question.problem.step_s(question.candidate, partition) < before
    assert shifted(question, partition) == (after, partition)
