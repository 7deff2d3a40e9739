"""HyPar (Song et al., HPCA 2019) on the common problem: data or model parallelism at each halving, by communication alone.

`sharding.hypar` chooses between the two for each layer at each of log2 N levels. Here all layers of a plan take the same
degrees, so a level is data parallel for all of them (gradients summed) or model parallel for all (outputs summed):

    sent = sum over levels of  sum_l 2 (1/2) |W_l|   or   sum_l (2 (1/2) |O_l| + |E_l| / 2)

with weights W halved by each model-parallel level before it and outputs O by each data-parallel one; the levels of model
parallelism lie inside, where links are fast. Every product dp tp = N is compared, so the answer is the least of its
objective; compute time, memory and microbatches are not in it, and there is no pipeline. Of equal answers the one with
fewest microbatches stands first, since HyPar has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from stagewright.planner.documents.outcome import PlanOutcome
from stagewright.planner.planners.reach import Reach, configurations, rule_of
from stagewright.planner.planners.registry import NamedPlanner
from stagewright.planner.planners.scoring import Choice, choices_outcome
from stagewright.planner.search.limits import Limits
from stagewright.planner.search.problem import Candidate, Partition, Problem
from stagewright.planner.sharding.hypar import ChainLayer, Parallelism, halved, inter_elements, intra_elements


def solve(problem: Problem, limits: Limits) -> PlanOutcome:
    """Return the product of data and model parallelism that sends least and fits."""
    choices = []
    rule = rule_of(problem, _REACH)
    for configuration in configurations(problem, _REACH):
        dp, tp = configuration.degrees.dp, configuration.degrees.tp
        if dp & (dp - 1) or tp & (tp - 1):
            continue
        levels = (dp.bit_length() - 1) * _DATA + (tp.bit_length() - 1) * _MODEL
        candidate = Candidate(configuration, rule, 1)
        partition = Partition((0, problem.profile.num_layers), (problem.levels[0],) * problem.profile.num_layers)
        choices.append(Choice(sent_elements(chain_of(problem, candidate), levels), candidate, partition))
    choices.sort(key=lambda choice: (choice.value, choice.candidate.configuration.num_microbatches))
    sized = [choice._replace(value=choice.value * _element_bytes(problem)) for choice in choices]
    return choices_outcome(problem, limits, sized, PLANNER.name, in_order=True)


def chain_of(problem: Problem, candidate: Candidate) -> list[ChainLayer]:
    """Return the layers by their elements: weights, input and output of the global batch on one device."""
    configuration = candidate.configuration
    samples = problem.job.global_batch / (configuration.microbatch * _element_bytes(problem))
    outputs = (problem.costs(configuration).table.output_bytes * samples).tolist()
    weights = [layer.parameters for layer in (problem.profile.classes[name] for name in problem.profile.layer_classes)]
    names = problem.profile.layer_names
    inputs = [0.0, *outputs[:-1]]
    return [ChainLayer(*row) for row in zip(names, weights, inputs, outputs, strict=True)]


def sent_elements(layers: Sequence[ChainLayer], levels: Sequence[Parallelism]) -> float:
    """Return the elements a device sends in a step when all layers take the same choice at each level."""
    total, held = 0.0, list(layers)
    for choice in levels:
        total += sum(intra_elements(layer, choice) for layer in held)
        total += sum(inter_elements(before, choice, choice) for before, _ in pairwise(held))
        held = [halved(layer, choice) for layer in held]
    return total


def _element_bytes(problem: Problem) -> float:
    return problem.job.optimizer.gradient_bytes


_DATA: tuple[Parallelism, ...] = ("dp",)
_MODEL: tuple[Parallelism, ...] = ("mp",)
_REACH = Reach(pipeline=False, tensor=True)

PLANNER = NamedPlanner(
    "hypar",
    "Song et al., HyPar: Towards Hybrid Parallelism for Deep Learning Accelerator Array, HPCA 2019",
    solve,
    objective="bytes a device sends a step",
)
