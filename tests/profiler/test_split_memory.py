"""What layers hold while input and weight gradients run apart, against the allocator's own peak."""

from __future__ import annotations

import torch

from stagewright.modeling import load_object, split
from stagewright.modeling.weight_gradients import WeightGradientSink, defer_weight_gradients, run_queue
from stagewright.profiler.memory_trace import layer_growths, layer_workspace_bytes, trace_spans
from stagewright.profiler.saved_bytes import layer_bytes
from stagewright.profiler.split_memory import queue_bytes, split_workspaces

CPU = torch.device("cpu")


def tiny(file):
    """Return a chain whose gradients are there, a batch, what each layer keeps, and where gradients wait."""
    model, tokens = load_object(f"{file}:Tiny")(num_blocks=3), torch.randint(32, (4, 16))
    model(tokens, tokens).backward()
    chain, sink = split(model), WeightGradientSink()
    defer_weight_gradients(model, sink)
    return chain, (tokens, tokens), layer_bytes(chain, (tokens, tokens)).saved, sink


def test_the_highest_of_forward_input_and_weight_gradients_are_the_peaks_of_a_microbatch(tiny_model_file):
    chain, batch, kept, sink = tiny(tiny_model_file)
    late = []

    def work(mark):
        mark()
        loss = chain.model(*batch)
        mark()
        with sink.collect() as queue:
            loss.backward()
        del loss
        mark()
        pieces = list(queue)
        for layer in reversed(chain.layers):
            count = {"block": 2, "head": 1}.get(layer.kind, 0)
            late.insert(0, queue_bytes(pieces[:count]))
            del pieces[:count]
        assert not pieces
        run_queue(queue)
        mark()

    forward, inputs, weights = trace_spans(work, CPU)
    begin, layers = forward.begin_bytes, range(len(kept))
    growths = layer_growths(chain, batch, CPU)
    assert max(growths.peaks) == forward.peak_bytes - begin
    found = split_workspaces(chain, batch, kept, sink, CPU)
    held = [sum(kept[:at]) + max(kept[at], late[at]) + sum(late[at + 1 :]) for at in layers]
    assert max(map(sum, zip(held, found.input_grad, strict=True))) == inputs.peak_bytes - begin
    assert max(sum(late[at:]) + found.weight_grad[at] for at in layers) == weights.peak_bytes - begin
    fused = layer_workspace_bytes(chain, batch, kept, CPU)
    blocks = [at for at, layer in enumerate(chain.layers) if layer.kind == "block"]
    assert all(0 < found.input_grad[at] < fused[at] for at in blocks)  # without the products of the weight gradients
