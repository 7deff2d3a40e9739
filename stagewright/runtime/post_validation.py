"""The optimizer step that no rank waits for: taken on what is known, validated later, taken back where it was wrong.

A synchronous step needs the norm of the whole model's gradient, so every rank waits for the last one and the skew that
ZB-H2 leaves between the ranks becomes idle time. Here pipeline rank d adds its squared norm to the sum of the ranks
before it, hands it on, and steps on that partial sum: with it as it is when the rule would leave gradients as they are,
else not at all. The last rank knows the whole sum and sends it to all. Each rank validates during the next iteration,
after its warm-up forwards and before its first backward:

    legitimate   the whole sum leaves gradients as they are: go on
    amended      otherwise: parameters and optimizer states are put back, the step is taken with the whole norm (scaled,
                 or skipped), and the iteration begins again, on every rank

A partial sum never exceeds the whole, so a rank that did not step knows that the whole will be amended. The result is
bit-equal to the synchronous step. What it costs is a copy of parameters and states between step and validation, and
where the rule amends, the warm-up forwards once more.

Paper: Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stagewright.runtime.reduction import Bucket
from stagewright.runtime.step_rule import StepRule, pipeline_rank_squared_norm, scale_gradients
from stagewright.runtime.topology import Topology

Optimizer = torch.optim.Optimizer


@dataclass
class _Kept:
    """What a step changes: the parameters of one optimizer and its states, as they were."""

    optimizer: Optimizer
    buckets: Sequence[Bucket]
    values: list[Tensor] = field(default_factory=list)
    states: list[dict[str, object]] = field(default_factory=list)
    is_stepped: bool = False

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def keep(self) -> None:
        self.is_stepped = True
        self.values = [parameter.detach().clone() for parameter in self.parameters]
        self.states = [
            {key: value.clone() if isinstance(value, Tensor) else value for key, value in found.items()}
            for found in (self.optimizer.state.get(parameter, {}) for parameter in self.parameters)
        ]

    def put_back(self) -> None:
        if not self.is_stepped:
            return
        for parameter, value, state in zip(self.parameters, self.values, self.states, strict=True):
            parameter.data.copy_(value)
            self.optimizer.state.pop(parameter, None)
            if state:
                self.optimizer.state[parameter] = state


class PostValidation:
    """One rank's part: partial sums on their way down the pipeline, the whole on its way back.

    `group` joins all ranks and carries nothing else; `beside` joins the devices of this pipeline rank. `num_amended`
    counts steps that were not legitimate, `num_rollbacks` those of them that this rank had taken and took back.
    """

    def __init__(
        self,
        rule: StepRule,
        topology: Topology,
        group: dist.ProcessGroup | None,
        beside: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self.num_amended = 0
        self.num_rollbacks = 0
        self._rule = rule
        self._group = group
        self._beside = beside
        self._device = device
        place = topology.plan.mapping.pipeline_ranks[topology.pipeline_rank].index(topology.rank)
        self._peers = [ranks[place] for ranks in topology.plan.mapping.pipeline_ranks]
        self._index = topology.pipeline_rank
        self._sending: list[tuple[dist.Work, Tensor]] = []
        self._whole: tuple[dist.Work | None, Tensor] | None = None
        self._steps: list[_Kept] = []
        self._goes_on = True

    @property
    def is_pending(self) -> bool:
        """Whether a step waits for its validation."""
        return self._whole is not None

    def begin(self, own_squared_norm: float) -> None:
        """Add this rank's share to the sum on its way, hand it on, and decide on what is known."""
        own = pipeline_rank_squared_norm(own_squared_norm, self._beside, self._device)
        before = torch.zeros(1, dtype=torch.float64, device=self._device)
        if self._index:
            dist.recv(before, self._peers[self._index - 1], group=self._group)
        known = before + own
        if self._index + 1 < len(self._peers):
            self._send(known, self._peers[self._index + 1])
            whole = torch.empty_like(known)
            self._whole = (dist.irecv(whole, self._peers[-1], group=self._group), whole)
        else:
            self._whole = (None, known)
            for peer in self._peers[:-1]:
                self._send(known, peer)
        self._goes_on = self._rule.factor(float(known)) == 1.0

    def step(self, optimizer: Optimizer, buckets: Sequence[Bucket]) -> None:
        """Step if what is known allows it, keeping what is needed to take it back; gradients stay."""
        kept = _Kept(optimizer, buckets)
        self._steps.append(kept)
        if self._goes_on:
            kept.keep()
            optimizer.step()
            for bucket in buckets:
                bucket.after_step()

    def validate(self) -> bool:
        """Wait for the whole sum and amend the step where it was wrong; returns whether it was."""
        assert self._whole is not None
        work, whole = self._whole
        if work is not None:
            work.wait()
        for sent, _ in self._sending:
            sent.wait()
        self._sending.clear()
        self._whole = None
        factor = self._rule.factor(float(whole))
        for kept in self._steps:
            if factor != 1.0:
                self.num_rollbacks += kept.is_stepped
                kept.put_back()
                self._step_again(kept, factor)
            for bucket in kept.buckets:
                bucket.clear()
        self._steps.clear()
        self.num_amended += factor != 1.0
        return factor != 1.0

    def _step_again(self, kept: _Kept, factor: float | None) -> None:
        if factor is not None:
            scale_gradients(kept.parameters, factor)
            kept.optimizer.step()
        for bucket in kept.buckets:
            bucket.after_step()

    def _send(self, value: Tensor, peer: int) -> None:
        work = dist.isend(value, peer, group=self._group)
        assert work is not None
        self._sending.append((work, value))
