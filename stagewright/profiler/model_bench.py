"""One model on one device, measured microbatch by microbatch the way an interpreter runs it.

Kinds of measurement, each a short piece of a training step whose numbers are plain JSON:

- `step`: two microbatches run (the second as any but a step's first), where layers are short a third one that nobody looks
  into, which shows what looking takes; and layer by layer the optimizer steps and the gradients are set to zero where they
  lie, as a run does. Then all parameters are copied, as a run copies versions of them.
- `split`: one microbatch whose backward runs in one piece, and right after it one whose weight gradients are deferred and
  run afterwards, layer by layer: a pair that knows one speed of the machine.
- `full`, `selective`: one microbatch with every layer recomputed at that level in its backward.
- `memory`: saved tensors, allocator traces and FLOP of one microbatch, and what shards would add up; it is taken once.

On CPU each measurement says as `probe_s` how fast the processor was meanwhile (`modeling.speed_probe`).
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stagewright.modeling import Batch, LayerChain
from stagewright.modeling.recomputation import recompute_layers
from stagewright.modeling.speed_probe import SpeedProbe
from stagewright.modeling.weight_gradients import (
    Queue,
    WeightGradientSink,
    defer_weight_gradients,
    run_queue,
)
from stagewright.planner.documents import Recompute
from stagewright.profiler.backward_phases import layer_backward_phases
from stagewright.profiler.layer_hooks import LayerHooks
from stagewright.profiler.layer_timer import LayerTimer, LayerTimes, busy_share
from stagewright.profiler.memory_trace import LayerGrowths, layer_growths, layer_workspace_bytes
from stagewright.profiler.model_source import ModelSource
from stagewright.profiler.saved_bytes import layer_bytes
from stagewright.profiler.split_memory import pieces_by_layer, queue_bytes, split_workspaces
from stagewright.profiler.structure import is_expert_parameter
from stagewright.profiler.tensor_sums import TensorSum, layer_sums
from stagewright.profiler.timing import Clock, clock_of, flush_of

Kind = Literal["step", "split", "full", "selective", "memory"]
CachePolicy = Literal["hot", "flushed"]
OptimizerName = Literal["adamw", "adam", "sgd", "sgd-momentum"]
Numbers = dict[str, Any]

_PROBE_AGE_S = 0.05  # a probe speaks for what begins within so long after it
_SHORT_LAYER_S = 0.02  # above that, what the hooks of a layer take (under 0.1 ms) is nothing

_log = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Configuration:
    """What one microbatch is like: samples, sequence length, tensor degree."""

    microbatch: int
    sequence_length: int
    tensor_degree: int = 1

    @property
    def text(self) -> str:
        """Return the configuration in words."""
        text = f"microbatch {self.microbatch}, sequence {self.sequence_length}"
        return text if self.tensor_degree == 1 else f"{text}, tensor degree {self.tensor_degree}"


class ModelBench:
    """A chain on a device with its optimizers and batches; `measure` runs one piece and returns its numbers."""

    def __init__(
        self,
        source: ModelSource,
        chain: LayerChain,
        device: torch.device,
        optimizer: OptimizerName = "adamw",
        *,
        own_time: bool = False,
        cache_policy: CachePolicy = "hot",
    ) -> None:
        self.chain = chain
        self.device = device
        self._source = source
        self._clock: Clock = clock_of(device, own_time=own_time)
        self._flushes = cache_policy == "flushed"
        self._timer = LayerTimer(chain, self._clock, flush=flush_of(device) if cache_policy == "flushed" else None)
        self._batches: dict[tuple[int, int], Batch] = {}
        self._probe = SpeedProbe() if device.type == "cpu" else None
        self._probed: tuple[float, float] = (-math.inf, 0.0)  # when, and its seconds
        self._own_parameters = _own_parameters(chain)
        self._optimizer = _optimizer(self._own_parameters, optimizer)

    def batch(self, configuration: Configuration) -> Batch:
        """Return the microbatch of a configuration, the same each time."""
        key = (configuration.microbatch, configuration.sequence_length)
        if key not in self._batches:
            self._batches[key] = self._source.batch(self.chain.model, *key, self.device)
        return self._batches[key]

    def warm_up(self, configuration: Configuration) -> None:
        """Run a microbatch and an optimizer step, untimed."""
        with self._timer.hooks:
            self._timer.full(self.batch(configuration))
        self._step()

    def forget(self, configuration: Configuration) -> None:
        """Give back what a configuration that does not fit has left behind."""
        self._batches.pop((configuration.microbatch, configuration.sequence_length), None)
        self.chain.model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def measure(self, configuration: Configuration, kind: Kind) -> Numbers:
        """Return the numbers of one measurement; lists hold one number for each layer."""
        measures: dict[Kind, Callable[[Batch], Numbers]] = {
            "step": self._measure_step,
            "split": self._measure_split,
            "full": partial(self._measure_recomputation, Recompute.FULL),
            "selective": partial(self._measure_recomputation, Recompute.SELECTIVE),
            "memory": partial(self._measure_memory, is_shard=configuration.tensor_degree > 1),
        }
        before_s = self._probe_seconds()
        numbers = measures[kind](self.batch(configuration))
        after_s = self._probe_seconds()
        return numbers if before_s is None or after_s is None else {**numbers, "probe_s": (before_s + after_s) / 2}

    def _probe_seconds(self) -> float | None:
        """Return the latest probe's seconds, of a new one where that is old; None where work is only launched from here."""
        if self._probe is None:
            return None
        if time.monotonic() > self._probed[0] + _PROBE_AGE_S:
            seconds = self._probe.seconds()
            self._probed = (time.monotonic(), seconds)
        return self._probed[1]

    def _measure_step(self, batch: Batch) -> Numbers:
        self._timer.whole(batch, scale=0.5)
        with self._timer.hooks:
            later = self._timer.full(batch, scale=0.5)
        is_short = sum(later.forward_s) + sum(later.backward_s) < _SHORT_LAYER_S * self.chain.num_layers
        whole_s = self._timer.whole(batch, scale=0.5) if is_short and not self._flushes else None
        optimizer_s, empty_step_s = self._step()
        return {
            **_numbers(later),
            "whole_s": whole_s,
            "optimizer_s": optimizer_s,
            "empty_step_s": empty_step_s,
            "entrance_s": self._entrance_seconds(batch),
            "copy_s": self._copy_seconds(),
            "copied_bytes": self._parameter_bytes,
        }

    def _measure_split(self, batch: Batch) -> Numbers:
        """Deferred gradients are queued layer by layer in reverse, so each layer's are a piece of the queue.

        They run as a stage runs them, the latest first: from the first layer to the last.
        """
        count = self.chain.num_layers
        lengths: dict[int, int] = {}
        queue: Queue = []
        timer = self._timer
        with timer.hooks:
            fused = timer.full(batch)
        with _deferring(self.chain) as sink:
            with timer.hooks, sink.collect() as queue:
                times = timer.full(batch, left=lambda index: lengths.setdefault(index, len(queue)))
            weight_s, held = [0.0] * count, [0.0] * count
            pieces = pieces_by_layer(queue, lengths, count)
            wall, busy = time.perf_counter(), time.process_time()
            for index, piece in enumerate(pieces):
                held[index] = queue_bytes(piece)
                weight_s[index] = self._timed(partial(run_queue, piece))
            wall, busy = time.perf_counter() - wall, time.process_time() - busy
        return {
            "input_grad_s": list(times.backward_s),
            "weight_grad_s": weight_s,
            "fused_s": sum(fused.backward_s),
            "busy_share": min(times.busy_share, busy_share(self._clock, busy, wall)),
            "held_bytes": held,
        }

    def _measure_recomputation(self, level: Recompute, batch: Batch) -> Numbers:
        with recomputed(self.chain, level), self._timer.hooks:
            return _numbers(self._timer.full(batch))

    def _measure_memory(self, batch: Batch, *, is_shard: bool) -> Numbers:
        """Recomputation's bytes are told from none's by the allocator: what the forward leaves behind at each level."""
        chain, device = self.chain, self.device
        saved = layer_bytes(chain, batch)
        workspace = layer_workspace_bytes(chain, batch, saved.saved, device)
        phases = layer_backward_phases(chain, batch, saved.saved, device)
        with _deferring(chain) as sink:
            split = split_workspaces(chain, batch, saved.saved, sink, device)
        none = layer_growths(chain, batch, device)
        kept: dict[str, list[float]] = {}
        forward = {Recompute.NONE.value: none.workspaces(saved.saved)}
        for level in (Recompute.SELECTIVE, Recompute.FULL):
            growth = self._recomputed_growths(level, batch) or none
            rows = zip(saved.saved, growth.kept, none.kept, strict=True)
            kept[level.value] = [min(max(own + after - before, 0.0), own) for own, after, before in rows]
            forward[level.value] = growth.workspaces(kept[level.value])
        return {
            "saved_bytes": list(saved.saved),
            "output_bytes": list(saved.outputs),
            "unkept_input_bytes": list(saved.unkept_inputs),
            "workspace_bytes": list(workspace),
            "forward_workspace_bytes": forward,
            "input_grad_workspace_bytes": list(split.input_grad),
            "weight_grad_workspace_bytes": list(split.weight_grad),
            "backward_phases": [[list(phase) for phase in layer] for layer in phases],
            "selective_bytes": kept["selective"],
            "full_bytes": kept["full"],
            "forward_flops": _forward_flops(chain, batch),
            "unused_parameters": self._unused_parameters(),
            "sums": [[list(astuple(each)) for each in own] for own in self._sums(batch, is_shard=is_shard)],
        }

    def _sums(self, batch: Batch, *, is_shard: bool) -> list[list[TensorSum]]:
        return layer_sums(self.chain, batch) if is_shard else [[] for _ in self.chain.layers]

    def _recomputed_growths(self, level: Recompute, batch: Batch) -> LayerGrowths | None:
        """Return what each layer allocates in a forward at a level; None for a model that cannot run a layer twice."""
        with recomputed(self.chain, level):
            try:
                with self._timer.hooks:
                    self._timer.full(batch)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                _log.warning("%s recomputation fails and is left out: %s: %s", level, type(error).__name__, error)
                return None
            return layer_growths(self.chain, batch, self.device)

    def _unused_parameters(self) -> list[int]:
        """Return by layer how many trainable parameters have no gradient, though backwards of all layers ran.

        Routed experts are not among them: without a gradient they had no token.
        """
        experts = {
            id(value)
            for name, value in self.chain.model.named_parameters(remove_duplicate=False)
            if is_expert_parameter(name)
        }
        return [
            sum(value.numel() for value in own if value.grad is None and id(value) not in experts)
            for own in self._own_parameters
        ]

    def _step(self) -> tuple[list[float], float]:
        """Return the seconds of each layer's optimizer step and of zeroing its gradients, and those of a step of nothing.

        Each layer's step is one of its own parameters alone, less what any step takes: a run steps all at once.
        """
        optimizer = self._optimizer
        if optimizer is None:
            return [0.0] * self.chain.num_layers, 0.0
        (whole,) = optimizer.param_groups
        try:
            seconds = []
            for parameters in ([], *self._own_parameters):
                optimizer.param_groups = [{**whole, "params": parameters}]
                step = partial(_step_and_clear, optimizer, parameters)
                seconds.append(self._timed(step) if parameters or not seconds else 0.0)
        finally:
            optimizer.param_groups = [whole]
        empty_s = seconds[0]
        return [max(value - empty_s, 0.0) for value in seconds[1:]], empty_s

    @property
    def _parameter_bytes(self) -> float:
        """Bytes of the trainable parameters, layer by layer."""
        return float(sum(value.nbytes for own in self._own_parameters for value in own))

    def _copy_seconds(self) -> float:
        """Return the seconds of copying all layers' parameters; two layers' copies are there at once."""
        copies: deque[list[Tensor]] = deque(maxlen=2)

        def copy() -> None:
            for own in self._own_parameters:
                copies.append([value.detach().clone() for value in own])

        return self._timed(copy)

    def _timed(self, work: Callable[[], object]) -> float:
        self._clock.synchronize()
        first = self._clock.mark()
        work()
        last = self._clock.mark()
        self._clock.synchronize()
        return self._clock.seconds(first, last)

    def _entrance_seconds(self, batch: Batch) -> float:
        """Return the time from the call of a segment in the middle of the model to its first layer's entrance.

        0 where no stage can begin there.
        """
        middle = self.chain.num_layers // 2
        if self.chain.named_edges is not None or middle == 0:
            return 0.0
        marks: list[object] = []
        values = self.chain.segment(0, middle)(batch)
        received = {index: tuple(part.detach() for part in value) for index, value in values.items()}
        hooks = LayerHooks(self.chain, entered=lambda index, tensors: marks.append(self._clock.mark()))
        with torch.no_grad(), hooks, suppress(Exception):  # as `refused_layers` says it
            hooks.expect(middle)
            first = self._clock.mark()
            self.chain.segment(middle, middle + 1)(batch, received)
        self._clock.synchronize()
        return self._clock.seconds(first, marks[0]) if marks else 0.0


@contextmanager
def recomputed(chain: LayerChain, level: Recompute) -> Iterator[None]:
    """Recompute every layer at this level within the block."""
    before = _forwards(list(chain.model.modules()))
    recompute_layers(chain, dict.fromkeys(range(chain.num_layers), level))
    try:
        yield
    finally:
        _restore(before)


@contextmanager
def _deferring(chain: LayerChain) -> Iterator[WeightGradientSink]:
    """Defer weight gradients within the block, those of layers that are linear themselves too.

    Such a layer's forward may have been given the entrance of the chain's executor, which a run of the whole chain does
    not need; it would keep the deferral out.
    """
    before = _forwards(list(chain.model.modules()))
    for module, forward in before:
        if isinstance(forward, partial) and getattr(forward.func, "__self__", None) is chain.executor:
            module.__dict__.pop("forward")
    sink = WeightGradientSink()
    defer_weight_gradients(chain.model, sink)
    try:
        yield sink
    finally:
        _restore(before)


def _forwards(modules: list[nn.Module]) -> list[tuple[nn.Module, object]]:
    return [(module, module.__dict__.get("forward")) for module in modules]


def _restore(forwards: list[tuple[nn.Module, object]]) -> None:
    for module, forward in forwards:
        if forward is not None:
            module.__dict__["forward"] = forward
        else:
            module.__dict__.pop("forward", None)


def _numbers(times: LayerTimes) -> Numbers:
    return {
        "forward_s": list(times.forward_s),
        "backward_s": list(times.backward_s),
        "outside_s": times.outside_s,
        "busy_share": times.busy_share,
    }


def _own_parameters(chain: LayerChain) -> list[list[nn.Parameter]]:
    """Return the trainable parameters of each layer; a tied one belongs to each layer that holds it."""
    parameters = dict(chain.model.named_parameters(remove_duplicate=False))
    result = []
    for layer in chain.layers:
        distinct = {id(parameters[name]): parameters[name] for name in layer.parameters}
        result.append([value for value in distinct.values() if value.requires_grad])
    return result


def _optimizer(by_layer: list[list[nn.Parameter]], name: OptimizerName) -> torch.optim.Optimizer | None:
    """Return an optimizer of all layers that changes nothing (its rate is zero) at the full cost of a step."""
    parameters = list({id(value): value for values in by_layer for value in values}.values())
    if not parameters:
        return None
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=0.0)
    if name == "adam":
        return torch.optim.Adam(parameters, lr=0.0)
    return torch.optim.SGD(parameters, lr=0.0, momentum=0.9 if name == "sgd-momentum" else 0.0)


def _step_and_clear(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    optimizer.step()
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.zero_()


def _forward_flops(chain: LayerChain, batch: Batch) -> list[float]:
    """Return the FLOP of each layer's forward matrix products, attention counted in full."""
    totals: list[float] = []
    with FlopCounterMode(display=False, custom_mapping=_attention_flops()) as counter:
        hooks = LayerHooks(chain, entered=lambda index, tensors: totals.append(float(counter.get_total_flops())))
        with hooks, torch.no_grad():
            hooks.begin()
            chain.segment(0, chain.num_layers)(batch)
        totals.append(float(counter.get_total_flops()))
    return [after - before for before, after in itertools.pairwise(totals)]


def _attention_flops() -> Mapping[Any, Any]:
    """Return the count of the CPU's fused attention, which torch's counter lacks."""
    operator = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    return {} if operator is None else {operator: _count_attention}


def _count_attention(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: object, **kwargs: object
) -> int:
    batch, heads, length, size = query
    return int(2 * batch * heads * length * key[2] * (size + value[3]))
