"""What each stage may choose on the devices of a pool: degrees and ZeRO stage, priced by class of layers.

A microbatch of M samples flows through all stages; a stage of dp replicas gives each M / dp of them. For every number of
devices that a rank of the pool can have, the rows are those of the common space (`space.shapes`) without a pipeline,
priced by the common price list on the pool's node group. A choice that is no better than another one in any cost or
memory term, for the same devices and M, is dropped: the step and every peak are monotone in all of them.

Some choices a run takes only where all pools have made them alike: how a weight is split that stages share, and how
sequences and tensors are on graphs of stages. One that differs in these is no other's better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from stagewright.planner.documents.cluster import Cluster
from stagewright.planner.documents.job import TrainingJob
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.search.layer_costs import Configuration, LayerCosts
from stagewright.planner.search.pricing import AXES, CP, DP, MICROBATCH, PP, SP, TP, VOCAB, Priced, configuration_of
from stagewright.planner.search.problem import Problem
from stagewright.planner.search.space import shapes

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]

SHARED = (TP, VOCAB)
BRANCHING = (TP, CP, SP)


@dataclass(eq=False)
class GroupChoices:
    """The choices on one node group, by devices of a rank.

    Parameters
    ----------
    problem : the question with this group first, which the price list and the capacity speak of.
    """

    problem: Problem
    group: str
    _priced: dict[int, tuple[Priced, Longs]] = field(default_factory=dict)
    _costs: dict[Configuration, LayerCosts] = field(default_factory=dict)

    @classmethod
    def of(cls, profile: ModelProfile, cluster: Cluster, job: TrainingJob, group: str) -> GroupChoices:
        """Return the empty list for a node group."""
        order = sorted(cluster.groups, key=lambda other: other.name != group)
        pins = job.space.pins.model_copy(update={"pp": None})
        space = job.space.model_copy(update={"pins": pins})
        return cls(
            Problem(
                profile,
                cluster.model_copy(update={"groups": tuple(order)}),
                job.model_copy(update={"space": space}),
                cluster.num_devices,
            ),
            group,
        )

    @cached_property
    def room_bytes(self) -> float:
        """Bytes of a device for what depends on the plan."""
        return self.problem.capacity_bytes - self.problem.base_bytes

    @cached_property
    def apart(self) -> tuple[int, ...]:
        """Return the columns in which pools may have to be alike."""
        profile = self.problem.profile
        shared = SHARED if shares_weights(profile, self.problem.job) else ()
        return tuple(sorted({*shared, *(() if profile.is_chain else BRANCHING)}))

    @property
    def per_node(self) -> int:
        return self.problem.cluster.groups[0].devices_per_node

    def priced(self, num_devices: int) -> tuple[Priced, Longs]:
        """Return the undominated choices of ranks of `num_devices`, and the samples M of a microbatch of each."""
        if num_devices not in self._priced:
            rows = shapes(self.problem.profile, self.problem.job, num_devices, self.per_node)
            rows = rows[(rows[:, PP] == 1) & (rows[:, AXES] == 0)]
            priced = self.problem.price_list.price(rows)
            samples = priced.shape[:, DP].astype(np.int64) * priced.shape[:, MICROBATCH]
            keep = undominated_of_each(priced, samples, self.apart)
            self._priced[num_devices] = (priced.take(keep), samples[keep])
        return self._priced[num_devices]

    def costs(self, shape: Ints) -> LayerCosts:
        """Return the layer costs of a row, as the scorer computes them."""
        configuration = replace(configuration_of(shape), num_ranks=1, num_microbatches=1, group=self.group)
        if configuration not in self._costs:
            self._costs[configuration] = self.problem.costs(configuration)
        return self._costs[configuration]


def shares_weights(profile: ModelProfile, job: TrainingJob) -> bool:
    """Return whether stages may share a weight that is trained: layers that have one need not lie in one stage."""
    together = [set(names) for names in job.space.ties]
    return any(not any(names.issuperset(tie.layers) for names in together) for tie in profile.trained_ties)


def undominated_of_each(priced: Priced, samples: Longs, apart: Sequence[int]) -> Longs:
    """Return the rows that no other of as many samples, equal in the columns `apart`, equals or beats everywhere."""
    kinds = np.column_stack((samples, priced.shape[:, list(apart)]))
    found = [undominated(priced, np.flatnonzero((kinds == kind).all(axis=1))) for kind in np.unique(kinds, axis=0)]
    return np.concatenate([np.zeros(0, np.int64), *found])


def undominated(priced: Priced, rows: Longs) -> Longs:
    """Return the rows that no other of them equals or beats in every term; of equal rows the first stays."""
    if len(rows) < 2:
        return rows
    names = ("forward_s", "input_grad_s", "weight_grad_s", "split_excess_s", "state_bytes", "step_s")
    parts = [getattr(priced, name)[rows] for name in names]
    parts += [priced.recompute_s[rows], priced.kept_bytes[rows], priced.late_bytes[rows]]
    parts += [priced.workspace_bytes[rows], priced.split_workspace_bytes[rows]]
    parts += [priced.latency_s[rows][:, None]]
    values = np.concatenate([part.reshape(len(rows), -1) for part in parts], axis=1)
    # A tensor that tensor parallelism replicates may cross in tp parts, so its choice counts with one part of it.
    parts_of = np.where(priced.shape[rows, SP] == 1, 1, priced.shape[rows, TP])[:, None]
    sent = priced.cut_bytes[rows]
    order = np.argsort(values.sum(axis=1), kind="stable")
    kept: list[int] = []
    for index in order.tolist():
        better = (values[kept] <= values[index]).all(axis=1) & (sent[kept] <= sent[index] / parts_of[index]).all(axis=1)
        if not better.any():
            kept.append(index)
    return np.sort(rows[kept])
