"""The chains a profile is measured on: the whole model for its structure, a shortened one where it does not fit, shards.

The structure is read on the meta device where the model can be built there, without memory. A model that does not fit
the device with gradients and optimizer states is shortened to the fewest layers that hold every layer class; classes
are told by their structure, not their position.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from stagewright.modeling import Layer, LayerChain
from stagewright.modeling.block_matrices import block_matrices
from stagewright.modeling.hugging_face import is_huggingface
from stagewright.planner.documents import Collective, WeightTensor
from stagewright.planner.errors import InvalidArgument
from stagewright.profiler.discover import available_memory_bytes
from stagewright.profiler.measured_layers import LayerNumbers
from stagewright.profiler.model_bench import Configuration
from stagewright.profiler.model_source import ModelSource
from stagewright.profiler.settings import ProfileSettings
from stagewright.profiler.structure import is_expert_parameter, layer_structures
from stagewright.profiler.tensor_shard import layer_collectives

_MEMORY_SHARE = 0.5
_COPIES = 4  # parameters, gradients and two states of the optimizer
_MOST_LAYERS_TRIED = 16


@dataclass(frozen=True)
class MeasuredChain:
    """A chain on the device with the class name of each of its layers in the whole model."""

    chain: LayerChain
    class_names: tuple[str, ...]

    def collectives(
        self, configuration: Configuration, layers: Sequence[LayerNumbers]
    ) -> dict[str, tuple[Collective, ...]]:
        """Return what the shards of each class exchange for one microbatch, in the mean over its layers."""
        tokens = configuration.microbatch * configuration.sequence_length
        members: dict[str, list[tuple[Collective, ...]]] = {}
        for name, layer, numbers in zip(self.class_names, self.chain.layers, layers, strict=True):
            own = layer_collectives(self.chain, layer, numbers.sums, num_tokens=tokens)
            members.setdefault(name, []).append(own)
        return {name: _mean_collectives(each) for name, each in members.items()}


class ModelShapes:
    """Builds a model's chains at the settings' dtype and device.

    `whole` is the full model's chain, for its structure only; `num_layers` is what it is shortened to for measuring,
    None when it is not.
    """

    def __init__(self, source: ModelSource, settings: ProfileSettings) -> None:
        self._source = source
        self._settings = settings
        self._held: LayerChain | None = None
        self.num_layers: int | None = None
        self.whole = self._whole()
        self.structures = layer_structures(self.whole)
        if self._held is None and not self._fits(self.whole):
            self.num_layers = self._shortest()

    def measured(self, tensor_degree: int) -> MeasuredChain:
        """Return the chain to measure at a tensor degree, built anew except for the whole model at degree 1."""
        names = self._class_names()
        if tensor_degree == 1 and self._held is not None:
            return MeasuredChain(self._held, names)
        chain = self._build(self._settings.torch_device, tensor_degree=tensor_degree, num_layers=self.num_layers)
        if chain.num_layers != len(names):
            raise InvalidArgument(
                f"a shard of tensor degree {tensor_degree} has {chain.num_layers} layers, the whole model {len(names)}",
                field="tensor_degrees",
            )
        return MeasuredChain(chain, names)

    def _whole(self) -> LayerChain:
        """Build on meta what can be built there cheaply; other models are built for real and kept."""
        reference = self._source.reference
        if reference is not None and is_huggingface(reference):
            return self._build(torch.device("meta"))
        self._held = self._build(self._settings.torch_device)
        return self._held

    def _build(self, device: torch.device, *, tensor_degree: int = 1, num_layers: int | None = None) -> LayerChain:
        dtype = self._settings.torch_dtype
        source = self._source
        return source.split(
            source.build(device=device, dtype=dtype, num_layers=num_layers, tensor_degree=tensor_degree)
        )

    def _fits(self, chain: LayerChain) -> bool:
        size = sum(value.numel() * value.element_size() for value in chain.model.parameters())
        device = self._settings.torch_device
        if device.type == "cuda":
            available = float(torch.cuda.get_device_properties(device).total_memory)
        else:
            available = available_memory_bytes() / self._settings.num_busy_ranks
        return bool(_COPIES * size <= _MEMORY_SHARE * available)

    def _shortest(self) -> int:
        wanted = set(self.structures.values())
        for count in range(1, _MOST_LAYERS_TRIED + 1):
            chain = self._build(torch.device("meta"), num_layers=count)
            if wanted <= set(layer_structures(chain).values()):
                return count
        raise InvalidArgument(
            f"the model does not fit the device, and its first {_MOST_LAYERS_TRIED} layers do not hold every kind of layer",
            field="model",
            hint="measure on a device with more memory",
        )

    def _class_names(self) -> tuple[str, ...]:
        """Return the whole model's class name of each layer that is measured."""
        if self.num_layers is None:
            return tuple(layer.layer_class for layer in self.whole.layers)
        by_structure = {structure: name for name, structure in self.structures.items()}
        short = self._build(torch.device("meta"), num_layers=self.num_layers)
        structures = layer_structures(short)
        return tuple(by_structure[structures[layer.layer_class]] for layer in short.layers)


def _mean_collectives(layers: Sequence[tuple[Collective, ...]]) -> tuple[Collective, ...]:
    """Return a class's collectives; one that only some layers have is there with their share of its bytes."""
    counts = Counter(item for own in layers for item in own)
    return tuple(
        item.model_copy(update={"payload_bytes": item.payload_bytes * count / len(layers)})
        for item, count in counts.items()
    )


def replicated_parameters(whole: int, shard: int, tensor_degree: int) -> int:
    """Return how many of `whole` parameters a shard of this degree still holds in full."""
    return min(max(round((tensor_degree * shard - whole) / (tensor_degree - 1)), 0), whole)


def expert_parameters(chain: LayerChain, layer: Layer) -> int:
    """Return how many of a layer's parameters belong to routed experts, by name."""
    parameters = dict(chain.model.named_parameters(remove_duplicate=False))
    return sum(parameters[name].numel() for name in layer.parameters if is_expert_parameter(name))


def weight_tensors(chain: LayerChain) -> dict[str, tuple[WeightTensor, ...]]:
    """Return runs of each layer's trainable tensors, in the order in which a run lays them, each once, by the layer's name."""
    parameters, matrices = dict(chain.model.named_parameters(remove_duplicate=False)), block_matrices(chain)
    return {layer.name: _tensors(layer, parameters, matrices) for layer in chain.layers}


def _tensors(
    layer: Layer, parameters: Mapping[str, torch.Tensor], matrices: Collection[int]
) -> tuple[WeightTensor, ...]:
    found = {id(parameters[name]): (name, parameters[name]) for name in layer.parameters}
    each = (
        (tuple(value.shape), id(value) in matrices, is_expert_parameter(name))
        for name, value in found.values()
        if value.requires_grad and value.numel()
    )
    return tuple(
        WeightTensor(shape=shape, count=len(list(run)), is_matrix=is_matrix, of_experts=of_experts)
        for (shape, is_matrix, of_experts), run in groupby(each)
    )
