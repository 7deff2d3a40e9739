"""Bytes that each layer keeps for its backward, by saved-tensor accounting.

Every tensor that autograd saves is looked at once, by storage: a storage that two layers save belongs to the first of
them, and parameters, buffers and the batch are kept anyway. So the layers' bytes add up to what a stage of them holds.

Under full recomputation a layer keeps its differentiable inputs, by the same rule.

Not seen: tensors that a custom autograd function hides in its context, and what an operator keeps outside of tensors.
The difference method (`memory_trace`) would show both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stagewright.modeling import Batch, LayerChain
from stagewright.modeling.batch import batch_tensors
from stagewright.profiler.layer_hooks import LayerHooks


@dataclass(frozen=True)
class LayerBytes:
    """Bytes by layer: kept without recomputation, of the differentiable inputs, and of the output sent on."""

    saved: tuple[float, ...]
    inputs: tuple[float, ...]
    outputs: tuple[float, ...]


def storage_key(tensor: Tensor) -> int:
    """Return the identity of a tensor's storage, as long as it lives."""
    return int(tensor.untyped_storage()._cdata)


def storage_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's whole storage."""
    return int(tensor.untyped_storage().nbytes())


def layer_bytes(chain: LayerChain, batch: Batch) -> LayerBytes:
    """Return what each layer keeps and sends for one microbatch, after one forward and one backward of it."""
    kept_anyway = {storage_key(value) for value in (*chain.model.parameters(), *chain.model.buffers())}
    kept_anyway |= {storage_key(value) for value in batch_tensors(batch)}
    seen, seen_inputs = set(kept_anyway), set(kept_anyway)
    saved, inputs, outputs = ([0.0] * chain.num_layers for _ in range(3))
    current = [0]

    def entered(index: int, tensors: tuple[Tensor, ...]) -> None:
        current[0] = index
        for tensor in tensors:
            if storage_key(tensor) not in seen_inputs:
                seen_inputs.add(storage_key(tensor))
                inputs[index] += storage_bytes(tensor)

    def produced(index: int, tensors: tuple[Tensor, ...]) -> None:
        outputs[index] = float(sum(value.numel() * value.element_size() for value in tensors))

    def pack(tensor: Tensor) -> Tensor:
        key = storage_key(tensor)
        if key not in seen:
            seen.add(key)
            saved[current[0]] += storage_bytes(tensor)
        return tensor.detach()

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    segment = chain.segment(0, chain.num_layers)
    hooks = LayerHooks(chain, entered=entered, produced=produced)
    with hooks, torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        hooks.begin()
        (loss,) = segment(batch)[chain.num_layers - 1]
        outputs[-1] = float(loss.element_size())
        loss.backward()
    return LayerBytes(tuple(saved), tuple(inputs), tuple(outputs))
