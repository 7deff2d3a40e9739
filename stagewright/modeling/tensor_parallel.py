"""Megatron-LM's tensor parallelism, with or without sequence parallelism, on any model with a tensor plan.

Column layers keep 1/t of their outputs, row layers 1/t of their inputs; between the two lies whatever works on heads or
hidden units one by one. For each layer pair the group communicates twice in the forward and twice in the backward: at
the entrance of the column layers (once for those that share their input) and behind the row layer. With sequence
parallelism the tensors between blocks are split along the sequence too: all-reduces become all-gathers and
reduce-scatters, and parameters used between (norms, biases of row layers) have gradients that are sums over the group.

With a split vocabulary the embedding looks up what it holds and sums; the head's logits stay split, and the loss is
computed on them as they are (torch's `loss_parallel`).

With fewer key-value heads K than ranks t (grouped queries), t / K neighbours hold a copy of one head and serve its queries
between them; the gradients of its projections are summed over them.

Papers: Shoeybi et al., Megatron-LM, 2019; Korthikanti et al., MLSys 2023.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from stagewright.modeling.chain import LayerChain
from stagewright.modeling.tensor_collectives import TensorGroup, copy, gather, join, reduce, scatter, split
from stagewright.modeling.tensor_plan import Role, tensor_plan
from stagewright.modeling.weight_gradients import WeightGradientSink, linear_map
from stagewright.planner.errors import InvalidArgument


@dataclass(frozen=True)
class InnerSplit:
    """A parameter that a group splits along a dimension, each of the `parts` that lie along it apart.

    `copies` neighbours in the group hold the same.
    """

    dimension: int
    parts: int
    group: TensorGroup
    copies: int = 1

    @property
    def factor(self) -> int:
        """How many times as much as one rank has the whole is."""
        return self.group.size // self.copies

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the whole, given that of one rank's part."""
        found = list(shape)
        found[self.dimension] *= self.factor
        return tuple(found)

    def whole(self, value: Tensor) -> Tensor:
        """Return the value whole; every rank of the group calls this."""
        pieces = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(self.group.size)]
        dist.all_gather(pieces, value.contiguous(), group=self.group.group)
        split = [piece.chunk(self.parts, dim=self.dimension) for piece in pieces[:: self.copies]]
        return torch.cat([row[part] for part in range(self.parts) for row in split], dim=self.dimension)

    def part(self, value: Tensor) -> Tensor:
        """Return this rank's part of a whole value."""
        return torch.cat(self.views(value, self.group.index), dim=self.dimension)

    def views(self, whole: Tensor, index: int) -> list[Tensor]:
        """Return the places in a whole value that belong to a rank of the group, each of the parts'."""
        parts = whole.chunk(self.parts, dim=self.dimension)
        return [part.chunk(self.factor, dim=self.dimension)[index // self.copies] for part in parts]


@dataclass
class TensorShards:
    """How this rank's parameters are split over the tensor-parallel group.

    Parameters
    ----------
    group : the group; None when nothing is split.
    dimensions : split dimension of each split parameter, by its id.
    groups : the group of a parameter that another group splits (experts), by its id.
    partial : ids of parameters whose gradients are sums over the group, because each rank sees a part of the sequence.
    inner : how another group splits what `dimensions` leaves of a parameter (the tensors of an expert), by its id.
    shared : neighbours in the group that hold copies of the same part and sum its gradients, by the parameter's id.
    """

    group: TensorGroup | None = None
    dimensions: dict[int, int] = field(default_factory=dict)
    groups: dict[int, TensorGroup] = field(default_factory=dict)
    partial: set[int] = field(default_factory=set)
    inner: dict[int, InnerSplit] = field(default_factory=dict)
    shared: dict[int, TensorGroup] = field(default_factory=dict)

    def is_split(self, parameter: Tensor) -> bool:
        """Whether this rank holds a part of the parameter."""
        return id(parameter) in self.dimensions or id(parameter) in self.inner

    def group_of(self, parameter: Tensor) -> TensorGroup | None:
        """Return the group that splits a parameter."""
        return self.groups.get(id(parameter), self.group)

    def tensor_split(self, parameter: Tensor) -> InnerSplit | None:
        """Return how a group splits the tensors in a parameter; None where each is whole, as an expert's on its rank."""
        if id(parameter) in self.inner:
            return self.inner[id(parameter)]
        if self.group is None or id(parameter) not in self.dimensions or id(parameter) in self.groups:
            return None
        return InnerSplit(self.dimensions[id(parameter)], 1, self.group, self.num_copies(parameter))

    def dividing(self, parameter: Tensor) -> list[TensorGroup]:
        """Return the groups over whose ranks the elements of a parameter are divided."""
        inner = self.inner.get(id(parameter))
        outer = self.group_of(parameter) if id(parameter) in self.dimensions else None
        return [group for group in (outer, None if inner is None else inner.group) if group is not None]

    def num_copies(self, parameter: Tensor) -> int:
        """Return how many ranks of the group that splits a parameter hold what this one holds of it."""
        group = self.shared.get(id(parameter))
        return 1 if group is None else group.size

    def whole(self, value: Tensor, parameter: Tensor) -> Tensor:
        """Return a parameter-shaped value whole; every rank of the groups calls this."""
        if id(parameter) in self.inner:
            value = self.inner[id(parameter)].whole(value)
        dimension, group = self.dimensions.get(id(parameter)), self.group_of(parameter)
        if group is None or dimension is None:
            return value
        parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(group.size)]
        dist.all_gather(parts, value.contiguous(), group=group.group)
        return torch.cat(parts[:: self.num_copies(parameter)], dim=dimension)

    def part(self, value: Tensor, parameter: Tensor) -> Tensor:
        """Return this rank's part of a whole value."""
        dimension, group = self.dimensions.get(id(parameter)), self.group_of(parameter)
        if group is not None and dimension is not None:
            copies = self.num_copies(parameter)
            value = value.chunk(group.size // copies, dim=dimension)[group.index // copies]
        return self.inner[id(parameter)].part(value) if id(parameter) in self.inner else value


def parallelize(
    chain: LayerChain,
    indices: Iterable[int],
    group: TensorGroup,
    sink: WeightGradientSink,
    *,
    sequence_parallel: bool,
    vocabulary_parallel: bool,
    sharing: TensorGroup | None = None,
    loss_elsewhere: bool = False,
) -> TensorShards:
    """Split the layers' modules over the group, in place; what the other layers hold is left alone.

    With `loss_elsewhere` a head gives its part of the logits as a plain tensor, since another stage computes the loss.
    `sharing` are the `key_value_copies` neighbours of the group that hold one key-value head, where there are several.

    Raises
    ------
    InvalidArgument : when the model has no tensor plan, or a size does not divide by the group's.
    """
    held = [chain.layers[index] for index in indices]
    inside = tuple(path for layer in held for path in layer.modules)
    plan = {
        path: role
        for path, role in tensor_plan(chain.model).items()
        if any(path == part or path.startswith(f"{part}.") for part in inside)
        and (vocabulary_parallel or role != "vocabulary")
    }
    _check_heads(chain.model, group.size)
    splitter = _Splitter(chain.model, group, sink, sequence_parallel, sharing, loss_elsewhere)
    for path, role in plan.items():
        splitter.split_module(path, role)
    splitter.hook_entrances(plan, inside)
    if sequence_parallel:
        _hook_region(chain, set(indices), group)
        splitter.mark_partial([layer.name for layer in held if layer.kind == "block"])
    return splitter.shards


class _Splitter:
    """Splits modules one by one and keeps the record."""

    def __init__(
        self,
        model: nn.Module,
        group: TensorGroup,
        sink: WeightGradientSink,
        sequence_parallel: bool,
        sharing: TensorGroup | None,
        loss_elsewhere: bool,
    ) -> None:
        self.shards = TensorShards(group)
        self._loss_elsewhere = loss_elsewhere
        self._sharing = sharing
        self._regrouped: set[int] = set()
        self._model = model
        self._group = group
        self._sink = sink
        self._sequence_parallel = sequence_parallel
        self._split: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # by the old one's id: old, new

    def split_module(self, path: str, role: Role) -> None:
        """Split one module's parameters and give it the forward of its role."""
        module = self._model.get_submodule(path)
        if role == "vocabulary" and isinstance(module, nn.Embedding):
            self._split_parameter(path, module, "weight", 0)
            module.forward = partial(_embed, module, self._group)
            return
        if not isinstance(module, nn.Linear):
            raise InvalidArgument(
                f"{path!r} is {type(module).__name__}, tensor parallelism splits nn.Linear", field="degrees.tp"
            )
        sharing = self._sharing if role == "column" and self._is_key_value(path, module) else None
        self._split_parameter(path, module, "weight", 1 if role == "row" else 0, sharing)
        if role == "row":
            leave = scatter if self._sequence_parallel else reduce
            module.forward = partial(_row, module, self._group, self._sink, leave)
            return
        self._split_parameter(path, module, "bias", 0, sharing)
        forward: Callable[[Tensor], Tensor] = partial(_column, module, self._sink)
        module.forward = forward
        if role == "vocabulary":
            joined = (lambda local: local) if self._loss_elsewhere else split_logits(self._group, module.weight.device)
            module.forward = partial(_head, forward, self._group, joined)

    def _is_key_value(self, path: str, module: nn.Linear) -> bool:
        """Whether a column layer makes keys or values; lets its attention know how many queries share a head here."""
        owner = self._model.get_submodule(path.rpartition(".")[0])
        size, count = getattr(owner, "head_dim", None), num_key_value_heads(self._model)
        if self._sharing is None or not isinstance(size, int) or module.out_features != size * (count or 0):
            return False
        if id(owner) not in self._regrouped and isinstance(getattr(owner, "num_key_value_groups", None), int):
            self._regrouped.add(id(owner))
            owner.num_key_value_groups //= self._sharing.size
        return True

    def hook_entrances(self, plan: Mapping[str, Role], layers: Iterable[str]) -> None:
        """Let column layers communicate at their entrance, those that share an input once.

        With sequence parallelism the whole sequence has to be there where shapes are read from it: at the entrance of
        the module that holds the column layers.
        """
        columns = [path for path, role in plan.items() if role == "column"]
        if not self._sequence_parallel:
            entrance = _Entrance(copy, self._group)
            for path in columns:
                self._model.get_submodule(path).register_forward_pre_hook(entrance)
            for path in (path for path, role in plan.items() if role == "row"):
                self._model.get_submodule(path).register_forward_pre_hook(entrance.forget)
            return
        holders = dict.fromkeys(column.rpartition(".")[0] for column in columns)
        for path in holders:
            if path in layers:
                raise InvalidArgument(
                    f"sequence parallelism needs the column layers of {path!r} in a module of their own",
                    field="degrees.sp",
                    hint="put attention and feed-forward network into modules, or take sp off",
                )
            module = self._model.get_submodule(path)
            module.register_forward_pre_hook(partial(_enter, gather, self._group), with_kwargs=True)

    def mark_partial(self, blocks: list[str]) -> None:
        """Take note of the parameters that are used on a part of the sequence: all in blocks that are not split."""
        for path in blocks:
            for parameter in self._model.get_submodule(path).parameters():
                if id(parameter) not in self.shards.dimensions:
                    self.shards.partial.add(id(parameter))

    def _split_parameter(
        self, path: str, module: nn.Module, name: str, dimension: int, sharing: TensorGroup | None = None
    ) -> None:
        parameter = module._parameters.get(name)
        if parameter is None or parameter.is_meta:
            return
        if id(parameter) in self._split:  # tied
            module._parameters[name] = self._split[id(parameter)][1]
            return
        if id(parameter) in self.shards.dimensions:
            return
        size, copies = parameter.shape[dimension], 1 if sharing is None else sharing.size
        parts = self._group.size // copies
        if size % parts:
            raise InvalidArgument(
                f"{path}.{name} has {size} in dimension {dimension}, which {parts} ranks do not divide",
                field="degrees.tp",
                hint="take a degree that divides it, or pad it",
            )
        own = parameter.detach().chunk(parts, dim=dimension)[self._group.index // copies].clone()
        made = nn.Parameter(own, requires_grad=parameter.requires_grad)
        self._split[id(parameter)] = (parameter, made)
        self.shards.dimensions[id(made)] = dimension
        if sharing is not None:
            self.shards.shared[id(made)] = sharing
        module._parameters[name] = made
        self._replace_in_parents(path, parameter, made)

    def _replace_in_parents(self, path: str, parameter: nn.Parameter, made: nn.Parameter) -> None:
        """Let parents that name a module's parameter too (BERT's head and its bias) hold what stands in its place."""
        while path:
            path = path.rpartition(".")[0]
            own = self._model.get_submodule(path)._parameters
            own.update({name: made for name, value in own.items() if value is parameter})


class _Entrance:
    """What happens to the input of column layers; layers that are called with one tensor in turn share the result.

    It is held until the row layer that follows: under recomputation nothing else holds it.
    """

    def __init__(self, enter: Callable[[Tensor, TensorGroup], Tensor], group: TensorGroup) -> None:
        self._enter = enter
        self._group = group
        self._last: tuple[weakref.ref[Tensor], Tensor] | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._last is None or self._last[0]() is not args[0]:
            self._last = (weakref.ref(args[0]), self._enter(args[0], self._group))
        return (self._last[1], *args[1:])

    def forget(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Let go of the last result: the split region ends."""
        self._last = None


def num_key_value_heads(model: nn.Module) -> int | None:
    """Return the key-value heads that the model's configuration tells of; None when it does not."""
    heads = getattr(getattr(model, "config", None), "num_key_value_heads", None)
    return heads if isinstance(heads, int) else None


def key_value_copies(model: nn.Module, size: int) -> int:
    """Return how many of `size` tensor-parallel ranks hold one key-value head between them; 1 when each has its own."""
    heads = num_key_value_heads(model)
    return size // heads if heads and heads < size and size % heads == 0 else 1


def _check_heads(model: nn.Module, size: int) -> None:
    heads, pairs = getattr(getattr(model, "config", None), "num_attention_heads", None), num_key_value_heads(model)
    if isinstance(heads, int) and heads % size:
        raise InvalidArgument(
            f"the model has {heads} num_attention_heads, which tp = {size} does not divide", field="degrees.tp"
        )
    if pairs is not None and pairs % size and size % pairs:
        raise InvalidArgument(
            f"the model has {pairs} num_key_value_heads, which neither divide by tp = {size} nor divide it",
            field="degrees.tp",
        )


def _column(module: nn.Linear, sink: WeightGradientSink, inputs: Tensor) -> Tensor:
    return linear_map(inputs, module.weight, module.bias, sink)


def _row(
    module: nn.Linear,
    group: TensorGroup,
    sink: WeightGradientSink,
    leave: Callable[[Tensor, TensorGroup], Tensor],
    inputs: Tensor,
) -> Tensor:
    output = leave(linear_map(inputs, module.weight, None, sink), group)
    return output if module.bias is None else output + module.bias


def _head(
    forward: Callable[[Tensor], Tensor], group: TensorGroup, joined: Callable[[Tensor], Tensor], inputs: Tensor
) -> Tensor:
    """Return logits split by the vocabulary: what `joined` makes of this rank's part."""
    return joined(forward(copy(inputs, group)))


def split_logits(group: TensorGroup, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return what makes the distributed tensor that a loss expects of this rank's part of split logits."""
    from torch.distributed.tensor import DTensor, Shard  # takes a second to import

    mesh = DeviceMesh.from_group(group.group, device.type)
    return lambda local: DTensor.from_local(local, mesh, [Shard(local.dim() - 1)], run_check=False)


def _embed(module: nn.Embedding, group: TensorGroup, tokens: Tensor) -> Tensor:
    first = group.index * module.weight.shape[0]
    local = tokens - first
    absent = (local < 0) | (local >= module.weight.shape[0])
    padding = None if module.padding_idx is None else module.padding_idx - first  # whose row has no gradient
    held = padding if padding is not None and 0 <= padding < module.weight.shape[0] else None
    found = functional.embedding(local.masked_fill(absent, 0), module.weight, held)
    return reduce(found.masked_fill(absent[..., None], 0.0), group)


def _enter(
    enter: Callable[[Tensor, TensorGroup], Tensor],
    group: TensorGroup,
    module: nn.Module,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Change the first tensor among a module's arguments."""
    if args and isinstance(args[0], Tensor):
        return (enter(args[0], group), *args[1:]), kwargs
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return args, {**kwargs, name: enter(value, group)}
    return args, kwargs


def _hook_region(chain: LayerChain, held: set[int], group: TensorGroup) -> None:
    """Split the sequence at the entrance of the first block, join it at the entrance of what follows the last."""
    blocks = [index for index, layer in enumerate(chain.layers) if layer.kind == "block"]
    first, after = blocks[0], blocks[-1] + 1
    for index, change in ((first, split), (after, join)):
        if index in held and chain.layers[index].modules:
            module = chain.model.get_submodule(chain.layers[index].modules[0])
            module.register_forward_pre_hook(partial(_enter, change, group), with_kwargs=True)
