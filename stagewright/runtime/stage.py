"""One virtual stage on one rank: its forwards, backwards and weight gradients, and what lives between them.

State is keyed by unit, (microbatch, slice). A forward keeps the leaves it made of what it received and the roots of its
graph (gradient edges, not the outputs themselves, so that a sent output's memory is free as soon as nobody needs it). A
backward consumes both. An input gradient leaves the weight gradients in a queue, which W empties.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import GradientEdge, get_gradient_edge

from stagewright.modeling.attention_mode import AttentionMode
from stagewright.modeling.batch import Batch, batch_tensors
from stagewright.modeling.chain import Segment
from stagewright.modeling.sliced_attention import KeyValueCache, SlicedAttention
from stagewright.modeling.weight_gradients import Queue, WeightGradientSink, run_queue
from stagewright.planner.errors import InvalidArgument

Unit = tuple[int, int]
Values = dict[int, tuple[Tensor, ...]]


@dataclass
class _Live:
    """What one unit keeps between its forward and its backward."""

    leaves: Values
    cache: KeyValueCache | None = None
    roots: dict[int, tuple[GradientEdge | None, ...]] = field(default_factory=dict)
    storages: dict[int, UntypedStorage] = field(default_factory=dict)  # by address when saved, where they are kept


class Stage:
    """A segment of the model with the units that are under way.

    Parameters
    ----------
    segment : the layers and how they run.
    index, replica : which virtual stage this is, and of which model replica.
    sink : where deferred weight gradients go.
    loss_context : surrounds the forward and the backward of the loss.
    context : makes the attention over a sequence that is divided over ranks; None when it is not.
    keeps_storages : note what each forward saves, for `activations`.
    entrance : what is done with each received value before the segment sees it.
    """

    def __init__(
        self,
        segment: Segment,
        index: int,
        replica: int,
        sink: WeightGradientSink,
        *,
        loss_context: Callable[[], AbstractContextManager[object]] = nullcontext,
        context: Callable[[], AttentionMode] | None = None,
        keeps_storages: bool = False,
        entrance: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.segment = segment
        self.index = index
        self.replica = replica
        self.losses: dict[Unit, Tensor] = {}
        self._sink = sink
        self._context = context
        self._keeps_storages = keeps_storages
        self._entrance = entrance
        self._loss_context = loss_context if segment.is_last else nullcontext
        self._live: dict[Unit, _Live] = {}
        self._queues: dict[Unit, Queue] = {}
        self._caches: dict[int, KeyValueCache] = {}

    @property
    def num_live(self) -> int:
        """Units between their forward and the end of their backward."""
        return len(set(self._live) | set(self._queues))

    def forward(self, unit: Unit, batch: Batch, received: Mapping[int, tuple[Tensor, ...]], seed: int | None) -> Values:
        """Return the values that other stages need, without graph; keeps what the backward will want."""
        leaves = {layer: tuple(_leaf(value) for value in values) for layer, values in received.items()}
        live = _Live(leaves)
        with self._loss_context(), self._noted(live) if self._keeps_storages else nullcontext():
            produced = self._run(unit, batch, live, seed)
        for layer, values in produced.items():
            live.roots[layer] = tuple(get_gradient_edge(value) if value.requires_grad else None for value in values)
        self._live[unit] = live
        if self._keeps_storages:
            for value in (*batch_tensors(batch), *(value for values in produced.values() for value in values)):
                live.storages.pop(_address(value), None)  # outputs may be on their way
        if self.segment.is_last:
            (loss,) = produced.pop(self.segment.chain.num_layers - 1)
            self.losses[unit] = loss.detach()
        return {layer: tuple(value.detach() for value in values) for layer, values in produced.items()}

    def backward(
        self, unit: Unit, gradients: Mapping[int, tuple[Tensor, ...]], *, loss_weight: float, split: bool
    ) -> Values:
        """Return the gradients of what the stage received; with `split`, weight gradients wait for `weight_gradients`."""
        live = self._live.pop(unit)
        roots, seeds = self._roots(live, unit, gradients, loss_weight)
        with self._loss_context(), self._sink.collect() if split else nullcontext([]) as queue:
            if roots:
                torch.autograd.backward(roots, seeds)
        if split:
            self._queues[unit] = queue
        return {layer: tuple(_gradient(leaf) for leaf in leaves) for layer, leaves in live.leaves.items()}

    def activations(self, unit: Unit) -> list[UntypedStorage]:
        """Return the storages that only this unit's backward will read: no parameters, buffers, inputs of the batch, outputs."""
        model = self.segment.chain.model
        others = {_address(value) for value in (*model.parameters(), *model.buffers())}
        for other, live in self._live.items():
            if other != unit:  # what it has lent lies elsewhere now, and its old addresses are others' again
                others.update(storage.data_ptr() for storage in live.storages.values() if storage.nbytes())
        found = self._live[unit].storages.values()
        return [storage for storage in found if storage.nbytes() and storage.data_ptr() not in others]

    def _noted(self, live: _Live) -> AbstractContextManager[object]:
        """Note the storage of every tensor that is saved for the backward within."""

        def pack(value: Tensor) -> Tensor:
            live.storages.setdefault(_address(value), value.untyped_storage())
            return value.detach()

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value)

    def weight_gradients(self, unit: Unit) -> None:
        """Add the weight gradients that the unit's input gradient left."""
        run_queue(self._queues.pop(unit))

    def _entered(self, live: _Live) -> Values:
        enter = self._entrance
        if enter is None:
            return live.leaves
        return {layer: tuple(enter(value) for value in values) for layer, values in live.leaves.items()}

    def _run(self, unit: Unit, batch: Batch, live: _Live, seed: int | None) -> Values:
        received = self._entered(live)
        if self._context is not None:
            with self._context() as attention:
                produced = self.segment(batch, received, seed=seed)
            self._check_calls(attention.num_calls)
            return produced
        if unit[1] < 0:
            return self.segment(batch, received, seed=seed)
        live.cache = self._caches.setdefault(unit[0], KeyValueCache())
        with SlicedAttention(live.cache, unit[1], keep=True) as attention:
            produced = self.segment(batch, received, seed=seed)
        self._check_calls(attention.num_calls)
        return produced

    def _check_calls(self, num_calls: int) -> None:
        blocks = [layer.name for layer in self.segment.layers if layer.kind == "block"]
        if blocks and not num_calls:
            raise InvalidArgument(
                f"layer {blocks[0]!r} calls no scaled_dot_product_attention, which a divided sequence needs",
                hint="take a plan without sequence slices and context parallelism for this model",
            )

    def _roots(
        self, live: _Live, unit: Unit, gradients: Mapping[int, tuple[Tensor, ...]], loss_weight: float
    ) -> tuple[list[GradientEdge], list[Tensor]]:
        roots: list[GradientEdge] = []
        seeds: list[Tensor] = []
        loss_layer = self.segment.chain.num_layers - 1 if self.segment.is_last else -1
        for layer, edges in live.roots.items():
            given = (torch.full_like(self.losses[unit], loss_weight),) if layer == loss_layer else gradients[layer]
            for edge, seed in zip(edges, given, strict=True):
                if edge is not None:
                    roots.append(edge)
                    seeds.append(seed)
        if live.cache is not None:
            further, their_seeds = live.cache.roots(unit[1])
            roots += further
            seeds += their_seeds
            if not live.cache.calls:
                self._caches.pop(unit[0], None)
        return roots, seeds


def _address(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_(value.is_floating_point())


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
