"""PipeDream-2BW: the closed form picks what exhaustive simulation of double-buffered pipelines picks."""

from __future__ import annotations

import numpy as np

from stagewright.planner.catalog import resolve_cluster, resolve_model
from stagewright.planner.documents import TrainingJob
from stagewright.planner.documents.job import SearchSpace
from stagewright.planner.planners.megatron import equal_blocks
from stagewright.planner.planners.pipedream_2bw import fits_double_buffered, period_s
from stagewright.planner.planners.reach import Reach, configurations, rule_of
from stagewright.planner.planners.stage_table import StageTable
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate
from stagewright.planner.search.problem import Candidate, Problem
from stagewright.planner.simulation.simulate import StageCosts, simulate

PERIODS = 6


def simulated_period_s(table: StageTable, bounds: tuple[int, ...], level: int) -> float:
    """Return the seconds of one period in the middle of an endless 2BW pipeline, gradients reduced beside compute."""
    pipeline = table.problem.pipeline(table.candidate, table.partition(bounds, level))
    costs = StageCosts(*pipeline.costs, *np.zeros((3, len(bounds) - 1)))
    ends = [
        simulate(
            generate("2bw", ScheduleRequest(table.num_ranks, table.num_microbatches, parameters={"updates": periods})),
            costs,
        ).makespan_s
        for periods in (PERIODS, PERIODS + 1)
    ]
    return max(ends[1] - ends[0], float(pipeline.reduction_s.max()))


def test_the_closed_form_agrees_with_simulation_on_a_transformer_in_at_least_95_percent_of_cases():
    cluster = resolve_cluster("v100-sxm-32g:8x1")
    agreed = cases = 0
    for devices in (2, 4, 8):
        for batch in (16, 24, 32, 48, 64, 96, 128):
            job = TrainingJob(
                global_batch=batch, sequence_length=512, space=SearchSpace(schedules=("1f1b",), max_microbatch=8)
            )
            problem = Problem(resolve_model("gpt2"), cluster, job, devices)
            found: list[tuple[float, float]] = []
            for configuration in configurations(problem, Reach()):
                table = StageTable(problem, Candidate(configuration, rule_of(problem, Reach()), 1))
                if table.num_microbatches < table.num_ranks or table.num_ranks == 1:
                    continue
                bounds = equal_blocks(problem, table.num_ranks)
                for level in table.levels:
                    if fits_double_buffered(table, bounds, level):
                        own = table.num_microbatches * period_s(table, bounds, level)
                        found.append((own, simulated_period_s(table, bounds, level)))
            cases += 1
            agreed += min(found)[1] <= min(step for _, step in found) * (1 + 1e-6)
    assert cases == 21
    assert agreed >= 0.95 * cases
