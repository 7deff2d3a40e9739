"""Bytes that each layer keeps for its backward, by saved-tensor accounting.

Every tensor that autograd saves is looked at once, by storage: a storage that two layers save belongs to the first of
them, and parameters, buffers and the batch are kept anyway. So the layers' bytes add up to what a stage of them holds.

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
    """Bytes by layer: kept without recomputation, of the output sent on, and of its input that is not among what it keeps.

    The last are there for a stage that begins with the layer, which holds what it has received until its backward.
    """

    saved: tuple[float, ...]
    outputs: tuple[float, ...]
    unkept_inputs: tuple[float, ...]


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
    seen = set(kept_anyway)
    saved, outputs = [0.0] * chain.num_layers, [0.0] * chain.num_layers
    inputs: list[dict[int, int]] = [{} for _ in range(chain.num_layers)]  # bytes by storage, until the layer keeps it
    current = [0]

    def entered(index: int, tensors: tuple[Tensor, ...]) -> None:
        current[0] = index
        inputs[index] = {storage_key(value): storage_bytes(value) for value in tensors}

    def produced(index: int, tensors: tuple[Tensor, ...]) -> None:
        outputs[index] = float(sum(value.numel() * value.element_size() for value in tensors))

    def pack(tensor: Tensor) -> Tensor:
        key = storage_key(tensor)
        if key not in seen:
            seen.add(key)
            saved[current[0]] += storage_bytes(tensor)
            inputs[current[0]].pop(key, None)
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
    return LayerBytes(tuple(saved), tuple(outputs), tuple(float(sum(each.values())) for each in inputs))
