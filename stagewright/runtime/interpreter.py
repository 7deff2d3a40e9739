"""Interpreting a lowered schedule on one rank: a handler for each kind of action, state keyed by unit.

The interpreter knows no schedule. It walks the rank's list of actions; each handler takes what the action needs from the
mailbox or from the stage, runs it, and hands on what it made. Receives are posted when the list reaches them, and those
that stand between the coming compute action and the next one are posted before it, so that messages travel meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, UntypedStorage

from stagewright.modeling.batch import Batch
from stagewright.planner.errors import InvalidSchedule
from stagewright.planner.schedules.action import COMPUTE_KINDS, RECV_KINDS, Action, Kind
from stagewright.planner.simulation.timeline import COLLECTIVE_LANE, COMPUTE_LANE
from stagewright.runtime.communication import Message
from stagewright.runtime.mailbox import Mailbox
from stagewright.runtime.peer_swap import PeerSwap
from stagewright.runtime.recorder import Recorder
from stagewright.runtime.reduction import BucketSet
from stagewright.runtime.stage import Unit, Values

StageKey = tuple[int, int]  # (replica, stage)


@dataclass(frozen=True)
class UnitInput:
    """What one unit, (microbatch, slice), of a stage runs on.

    Parameters
    ----------
    batch : its part of the batch.
    loss_weight : what its loss counts in the loss of the step.
    seed : of its random numbers; None leaves the generators alone.
    """

    batch: Batch
    loss_weight: float
    seed: int | None = None


Iteration = Mapping[tuple[int, Unit], UnitInput]  # by stage and unit


@dataclass(frozen=True)
class WarmUp:
    """How an iteration begins while the last optimizer step is not validated.

    Parameters
    ----------
    validate : called after the warm-up forwards; returns whether the step was amended, and they have to run again.
    messages : what other ranks send to this one before they validate.
    """

    validate: Callable[[], bool]
    messages: frozenset[Message]


def warm_up_length(steps: Sequence[tuple[Action, ...]]) -> int:
    """Return how many steps stand before validation: up to the last forward before the first other compute, with its sends."""
    first = next(
        (i for i, step in enumerate(steps) if step[0].kind in COMPUTE_KINDS and step[0].kind is not Kind.F), len(steps)
    )
    last = max((i for i in range(first) if steps[i][0].kind is Kind.F), default=-1)
    end = last + 1
    while end < first and steps[end][0].kind is Kind.SEND_F:
        end += 1
    return end


class RunnableStage(Protocol):
    """What the interpreter asks of a stage; `stage.Stage` computes, `emulation.EmulatedStage` waits."""

    def forward(self, unit: Unit, batch: Batch, received: Mapping[int, tuple[Tensor, ...]], seed: int | None) -> Values:
        """Return the values that other stages need."""
        ...

    def backward(
        self, unit: Unit, gradients: Mapping[int, tuple[Tensor, ...]], *, loss_weight: float, split: bool
    ) -> Values:
        """Return the gradients of what the stage received."""
        ...

    def weight_gradients(self, unit: Unit) -> None:
        """Add the weight gradients of a unit."""
        ...

    def activations(self, unit: Unit) -> list[UntypedStorage]:
        """Return the storages that only a unit's backward will read."""
        ...


class Interpreter:
    """Runs one rank's actions.

    Parameters
    ----------
    stages : the rank's stages.
    mailbox : where values and gradients come from and go to.
    buckets : sums of gradients over replicas, gathers of parameters.
    optimize : optimizer step of one stage, after its gradients are reduced; None leaves the gradients in place.
    recorder : keeps the spans; at_action : told each action before it runs.
    warm_up : how the iteration begins; None when nothing waits for validation.
    swap : lends activations to the peer rank; None where the schedule does not.
    """

    def __init__(
        self,
        stages: Mapping[StageKey, RunnableStage],
        mailbox: Mailbox,
        buckets: BucketSet,
        *,
        optimize: Callable[[StageKey, int], None] | None,
        recorder: Recorder,
        at_action: Callable[[int], None],
        warm_up: WarmUp | None = None,
        swap: PeerSwap | None = None,
    ) -> None:
        self._swap = swap
        self._warm_up = warm_up
        self._stages = stages
        self._mailbox = mailbox
        self._buckets = buckets
        self._optimize = optimize
        self._recorder = recorder
        self._at_action = at_action
        self._iteration: Iteration = {}
        self._last_backwards: frozenset[Action] = frozenset()
        self._handlers: dict[Kind, Callable[[Action], None]] = {
            Kind.F: self._forward,
            Kind.B: self._backward,
            Kind.I: self._backward,
            Kind.W: self._weight_gradients,
            Kind.SEND_F: self._mailbox.send_values,
            Kind.SEND_B: self._mailbox.send_gradients,
            Kind.RECV_F: self._receive,
            Kind.RECV_B: self._receive,
            Kind.REDUCE_GRAD: self._reduce,
            Kind.OPT: self._step,
            Kind.UNSHARD: self._unshard,
            Kind.RESHARD: self._reshard,
            **({Kind.EVICT: self._evict, Kind.LOAD: self._load} if swap is not None else {}),
        }

    def run(self, steps: Sequence[tuple[Action, ...]], iteration: Iteration) -> None:
        """Run one iteration: every action of `steps`, then wait for what is still on its way."""
        self._iteration = iteration
        self._last_backwards = _last_full_backwards(steps)
        self._mailbox.begin({unit: given.batch for (_, unit), given in iteration.items()})
        begin = 0
        if self._swap is not None:
            self._swap.begin()
        if self._warm_up is not None:
            begin = warm_up_length(steps)
            self._run(steps, 0, begin)
            if self._warm_up.validate():
                self._mailbox.discard(self._warm_up.messages)
                begin = 0
        self._run(steps, begin, len(steps))
        if self._swap is not None:
            self._swap.finish()
        self._mailbox.finish()
        self._buckets.finish()

    def _run(self, steps: Sequence[tuple[Action, ...]], begin: int, end: int) -> None:
        """Run the steps from `begin` to `end` - 1, posting no receive behind them."""
        posted = begin
        for position in range(begin, end):
            step = steps[position]
            self._at_action(position)
            if step[0].kind in COMPUTE_KINDS:
                posted = self._post_ahead(steps, max(posted, position + 1), end)
            for action in step:
                handler = self._handlers.get(action.kind)
                if handler is None:
                    raise InvalidSchedule(f"the runtime has no handler for {action}")
                handler(action)

    def _post_ahead(self, steps: Sequence[tuple[Action, ...]], start: int, end: int) -> int:
        """Post the receives that precede the next compute action; returns how far the list was seen."""
        position = start
        while position < end and steps[position][0].kind not in COMPUTE_KINDS:
            if steps[position][0].kind in RECV_KINDS and not self._mailbox.post(steps[position][0], wait=False):
                return position
            position += 1
        return position

    def _receive(self, action: Action) -> None:
        self._mailbox.post(action, wait=True)

    def _forward(self, action: Action) -> None:
        stage = self._stages[action.replica, action.stage]
        received = self._mailbox.take_values(action)
        self._buckets.before_forward((action.replica, action.stage), action.microbatch)
        given = self._iteration[action.stage, _unit(action)]
        start = self._recorder.clock()
        values = stage.forward(_unit(action), given.batch, received, given.seed)
        self._buckets.after_pass((action.replica, action.stage))
        self._recorder.add(COMPUTE_LANE, action, start, self._recorder.clock())
        self._mailbox.put_values(action, values)

    def _backward(self, action: Action) -> None:
        stage = self._stages[action.replica, action.stage]
        gradients = self._mailbox.take_gradients(action)
        is_last = action in self._last_backwards
        self._buckets.before_backward((action.replica, action.stage), action.microbatch, is_last=is_last)
        start = self._recorder.clock()
        result = stage.backward(
            _unit(action),
            gradients,
            loss_weight=self._iteration[action.stage, _unit(action)].loss_weight,
            split=action.kind is Kind.I,
        )
        self._buckets.after_pass((action.replica, action.stage))
        if action.kind is Kind.B:
            self._buckets.after_microbatch((action.replica, action.stage))
        self._recorder.add(COMPUTE_LANE, action, start, self._recorder.clock())
        self._mailbox.put_gradients(action, result)

    def _weight_gradients(self, action: Action) -> None:
        start = self._recorder.clock()
        self._stages[action.replica, action.stage].weight_gradients(_unit(action))
        self._buckets.after_microbatch((action.replica, action.stage))
        self._recorder.add(COMPUTE_LANE, action, start, self._recorder.clock())

    def _reduce(self, action: Action) -> None:
        start = self._recorder.clock()
        self._buckets.report((action.replica, action.stage))
        self._recorder.add(COLLECTIVE_LANE, action, start, self._recorder.clock())

    def _unshard(self, action: Action) -> None:
        start = self._recorder.clock()
        self._buckets.unshard((action.replica, action.stage))
        self._recorder.add(COLLECTIVE_LANE, action, start, self._recorder.clock())

    def _reshard(self, action: Action) -> None:
        self._buckets.reshard((action.replica, action.stage))

    def _evict(self, action: Action) -> None:
        assert self._swap is not None
        start = self._recorder.clock()
        self._swap.evict(action, self._stages[action.replica, action.stage].activations(_unit(action)))
        self._recorder.add(COLLECTIVE_LANE, action, start, self._recorder.clock())

    def _load(self, action: Action) -> None:
        assert self._swap is not None
        start = self._recorder.clock()
        self._swap.load(action)
        self._recorder.add(COLLECTIVE_LANE, action, start, self._recorder.clock())

    def _step(self, action: Action) -> None:
        key = (action.replica, action.stage)
        start = self._recorder.clock()
        self._buckets.wait(key)
        if self._optimize is not None:
            self._optimize(key, action.microbatch)
        self._recorder.add(COMPUTE_LANE, action, start, self._recorder.clock())


def _last_full_backwards(steps: Sequence[tuple[Action, ...]]) -> frozenset[Action]:
    """Return the last gradient action of each stage, where it is a full backward."""
    final = (Kind.B, Kind.W)
    last = {(action.replica, action.stage): action for step in steps for action in step if action.kind in final}
    return frozenset(action for action in last.values() if action.kind is Kind.B)


def _unit(action: Action) -> Unit:
    return (action.microbatch, action.slice)
