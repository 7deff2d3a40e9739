"""What a layer holds, phase by phase, while a backward makes its gradients anew, as it does under ZeRO-2 and 3.

There a layer's gradients of one kind (routed experts', all others') leave as soon as the last of them is complete: a phase
ends, and the next one begins without them. What is computed behind the last gradients, such as the rest of a norm, is a
phase of its own. Here they are simply freed, so that later layers' gradients are gone too, as in a run.

Weights that several layers share have a buffer of their own in a run: their gradients are not told of here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stagewright.modeling import Batch, LayerChain
from stagewright.profiler.layer_hooks import LayerHooks
from stagewright.profiler.memory_trace import Span, trace_spans
from stagewright.profiler.structure import is_expert_parameter

Kind = Literal["experts", "others", "none"]


class Phase(NamedTuple):
    """Whose gradients leave at its end, and bytes beside what the layers before keep: as it begins, and at most."""

    ends_with: Kind
    begin_bytes: float
    peak_bytes: float


def layer_backward_phases(
    chain: LayerChain, batch: Batch, saved_bytes: Sequence[float], device: torch.device
) -> tuple[tuple[Phase, ...], ...]:
    """Return the phases of each layer's backward of one microbatch, given what each layer keeps; gradients stay as they are."""
    gradients = {value: value.grad for value in chain.model.parameters()}
    own = _own_parameters(chain)
    for value in (value for values in own.values() for value in values):
        value.grad = None
    try:
        marks, spans = _traced(chain, batch, own, device)
    finally:
        for value, gradient in gradients.items():
            value.grad = gradient
    shared = _shared_gradient_bytes(chain)
    found: list[list[Phase]] = [[] for _ in range(chain.num_layers)]
    for (begun, following), span in zip(pairwise(marks), spans, strict=True):
        if isinstance(begun, int):
            other = spans[0].begin_bytes + sum(saved_bytes[:begun]) + shared[begun]
            ends_with: Kind = "none" if isinstance(following, int) else following
            found[begun].append(Phase(ends_with, max(span.begin_bytes - other, 0.0), span.peak_bytes - other))
    return tuple(map(tuple, found))


def _traced(
    chain: LayerChain, batch: Batch, own: dict[tuple[int, Kind], list[nn.Parameter]], device: torch.device
) -> tuple[list[int | Kind], list[Span]]:
    """Return marks, the layer whose phase begins or what a phase ends with, and the spans between them."""
    segment = chain.segment(0, chain.num_layers)
    marks: list[int | Kind] = []

    def work(mark: Callable[[], None]) -> None:
        layer = [0]

        def note(value: int | Kind) -> None:
            marks.append(value)
            mark()

        def left(index: int) -> None:
            layer[0] = index
            note(index)

        def leave(kind: Kind, values: list[nn.Parameter]) -> None:
            note(kind)
            for value in values:
                value.grad = None
            note(layer[0])

        handles = [handle for (_, kind), values in own.items() for handle in _when_complete(values, kind, leave)]
        try:
            with LayerHooks(chain, left=left) as hooks:
                note("none")
                hooks.begin()
                (loss,) = segment(batch)[chain.num_layers - 1]
                left(chain.num_layers - 1)
                loss.backward()
                del loss
                note("none")
        finally:
            for handle in handles:
                handle.remove()

    return marks, trace_spans(work, device)


def _own_parameters(chain: LayerChain) -> dict[tuple[int, Kind], list[nn.Parameter]]:
    """Return the trained parameters by layer and kind, without those that layers share."""
    parameters = dict(chain.model.named_parameters(remove_duplicate=False))
    tied = {name for tie in chain.ties for name in tie.names}
    found: dict[tuple[int, Kind], list[nn.Parameter]] = {}
    for index, layer in enumerate(chain.layers):
        for name in dict.fromkeys(layer.parameters):
            if name not in tied and parameters[name].requires_grad:
                kind: Kind = "experts" if is_expert_parameter(name) else "others"
                found.setdefault((index, kind), []).append(parameters[name])
    return found


def _when_complete(
    values: list[nn.Parameter], kind: Kind, leave: Callable[[Kind, list[nn.Parameter]], None]
) -> list[RemovableHandle]:
    """Call `leave` when the last gradient of some parameters is complete."""
    missing = {id(value) for value in values}

    def note(value: Tensor) -> None:
        missing.discard(id(value))
        if not missing:
            leave(kind, values)

    return [value.register_post_accumulate_grad_hook(note) for value in values]


def _shared_gradient_bytes(chain: LayerChain) -> tuple[float, ...]:
    """Return what waits beside the backward of each layer, of weights that an earlier and a later layer share.

    The later layer's gradient is added to the earlier one's when that comes. Where the layers lie on several stages it does
    not wait.
    """
    position = {name: index for index, name in enumerate(chain.layer_names)}
    found = [0.0] * chain.num_layers
    parameters = dict(chain.model.named_parameters(remove_duplicate=False))
    for tie in chain.ties:
        layers = sorted(position[name] for name in tie.layers)
        if parameters[tie.parameter].requires_grad:
            for index in range(layers[0], layers[-1]):
                found[index] += float(parameters[tie.parameter].nbytes)
    return tuple(found)
