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

from stagewright.modeling.chain import LayerChain
from stagewright.modeling.tensor_collectives import TensorGroup, copy, gather, join, reduce, scatter, split
from stagewright.modeling.tensor_cut import (
    CutTensor,
    cut_tensors,
    divides,
    is_transposed,
    lying_parts,
    num_heads,
    num_key_value_heads,
    tell_module,
)
from stagewright.modeling.tensor_families import ModuleSplit, Role
from stagewright.modeling.tensor_plan import is_within, tensor_plan
from stagewright.modeling.weight_gradients import WeightGradientSink, linear_map
from stagewright.planner.errors import InvalidArgument


@dataclass(frozen=True)
class InnerSplit:
    """A parameter that a group splits along a dimension, each of the parts that lie along it apart.

    `parts` are their relative sizes; `copies` neighbours in the group hold the same.
    """

    dimension: int
    parts: tuple[int, ...]
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
        split = [self.pieces(piece) for piece in pieces[:: self.copies]]
        return torch.cat([row[part] for part in range(len(self.parts)) for row in split], dim=self.dimension)

    def part(self, value: Tensor) -> Tensor:
        """Return this rank's part of a whole value."""
        return torch.cat(self.views(value, self.group.index), dim=self.dimension)

    def views(self, whole: Tensor, index: int) -> list[Tensor]:
        """Return the places in a whole value that belong to a rank of the group, each of the parts'."""
        return [part.chunk(self.factor, dim=self.dimension)[index // self.copies] for part in self.pieces(whole)]

    def pieces(self, value: Tensor) -> list[Tensor]:
        """Return the parts of a value, whole or of one rank, in views of it."""
        return lying_parts(value, self.dimension, self.parts)

    def divides(self, size: int) -> bool:
        """Whether the group splits each part of so many evenly."""
        return divides(size, self.parts, self.factor)


@dataclass
class TensorShards:
    """How this rank's parameters are split over the tensor-parallel group.

    Parameters
    ----------
    group : the group; None when nothing is split.
    dimensions : split dimension of each split parameter, by its id.
    parts : relative sizes of what lies one behind the other along it, where there are several, by the parameter's id.
    groups : the group of a parameter that another group splits (experts), by its id.
    partial : ids of parameters whose gradients are sums over the group, because each rank sees a part of the sequence.
    inner : how another group splits what `dimensions` leaves of a parameter (the tensors of an expert), by its id.
    shared : neighbours in the group that hold copies of the same part and sum its gradients, by the parameter's id.
    """

    group: TensorGroup | None = None
    dimensions: dict[int, int] = field(default_factory=dict)
    parts: dict[int, tuple[int, ...]] = field(default_factory=dict)
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
        return None if id(parameter) in self.groups else self._outer(parameter)

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
        outer = self._outer(parameter)
        return value if outer is None else outer.whole(value)

    def part(self, value: Tensor, parameter: Tensor) -> Tensor:
        """Return this rank's part of a whole value."""
        outer = self._outer(parameter)
        if outer is not None:
            value = outer.part(value)
        return self.inner[id(parameter)].part(value) if id(parameter) in self.inner else value

    def _outer(self, parameter: Tensor) -> InnerSplit | None:
        """Return how `dimensions` has a group split a parameter."""
        group = self.group_of(parameter)
        if group is None or id(parameter) not in self.dimensions:
            return None
        parts = self.parts.get(id(parameter), (1,))
        return InnerSplit(self.dimensions[id(parameter)], parts, group, self.num_copies(parameter))


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
    inside = [path for layer in held for path in layer.modules]
    plan = {
        path: how
        for path, how in tensor_plan(chain.model).items()
        if is_within(path, inside) and (vocabulary_parallel or how.role != "vocabulary")
    }
    _check_heads(chain.model, group.size)
    blocks = [path for layer in held if layer.kind == "block" for path in layer.modules]
    region = tuple(blocks) if sequence_parallel else ()
    splitter = _Splitter(chain.model, group, sink, region, sharing, loss_elsewhere)
    for path, how in plan.items():
        splitter.split_module(path, how)
    splitter.hook_entrances(plan)
    if sequence_parallel:
        _hook_region(chain, set(indices), group)
        splitter.mark_partial(blocks)
    return splitter.shards


class _Splitter:
    """Splits modules one by one and keeps the record.

    `region` are the layers between whose modules the sequence is split.
    """

    def __init__(
        self,
        model: nn.Module,
        group: TensorGroup,
        sink: WeightGradientSink,
        region: tuple[str, ...],
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
        self._region = region
        self._split: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # by the old one's id: old, new

    def split_module(self, path: str, how: ModuleSplit) -> None:
        """Split one module's parameters, give it the forward of its role, and let it know what is left of its numbers."""
        for cut in cut_tensors(self._model, path, how):
            self._split_parameter(cut)
        if how.role == "heads":
            return
        module, group = self._model.get_submodule(path), self._group
        tell_module(self._model, path, how, group.size, group.index)
        if how.role == "shared":
            self.mark_partial([path])
        elif how.role == "latent" and len(how.parts) > 1 and not self._is_in_region(path):
            module.register_forward_hook(partial(_latent, int(how.parts[-1]), group))
        elif how.role in ("column", "row", "norm", "vocabulary"):
            module.forward = self._forward_of(path, module, how.role)

    def _forward_of(self, path: str, module: nn.Module, role: Role) -> Callable[[Tensor], Tensor]:
        group, own = self._group, partial(_column, module, self._sink)
        if role == "norm":
            return partial(_norm, module, group)
        if role == "row":
            leave = scatter if self._is_in_region(path) else reduce
            return partial(_row, module, group, self._sink, leave)
        if role == "column":
            return own
        if isinstance(module, nn.Embedding):
            rows = module.weight.shape[0]
            first = group.index * rows  # of the whole embedding's rows
            padding = None if module.padding_idx is None else module.padding_idx - first
            # Its row has no gradient; the others' ranks have none such.
            module.padding_idx = padding if padding is not None and 0 <= padding < rows else None
            return partial(_embed, module, module.forward, first, group)
        joined = (lambda local: local) if self._loss_elsewhere else split_logits(group, module.weight.device)
        return partial(_head, own, group, joined)

    def _is_in_region(self, path: str) -> bool:
        return is_within(path, self._region)

    def _regroup(self, path: str) -> None:
        """Let attention know how many queries share a head here."""
        assert self._sharing is not None
        owner = self._model.get_submodule(path.rpartition(".")[0])
        if id(owner) not in self._regrouped and isinstance(getattr(owner, "num_key_value_groups", None), int):
            self._regrouped.add(id(owner))
            owner.num_key_value_groups //= self._sharing.size

    def hook_entrances(self, plan: Mapping[str, ModuleSplit]) -> None:
        """Let column layers communicate at their entrance, those that share an input once.

        With sequence parallelism the whole sequence has to be there where shapes are read from it: at the entrance of
        the module that holds the column layers.
        """
        columns = [path for path, how in plan.items() if how.role == "column"]
        entrance = _Entrance(copy, self._group)
        for path in (path for path in columns if not self._is_in_region(path)):
            self._model.get_submodule(path).register_forward_pre_hook(entrance)
        for path in (path for path, how in plan.items() if how.role == "row"):
            self._model.get_submodule(path).register_forward_pre_hook(entrance.forget)
        gathered = (path for path in columns if self._is_in_region(path))
        holders = (path if plan[path].at_positions else path.rpartition(".")[0] for path in gathered)
        for path in dict.fromkeys(holders):
            if path in self._region:
                raise InvalidArgument(
                    f"sequence parallelism needs the column layers of {path!r} in a module of their own",
                    field="degrees.sp",
                    hint="put attention and feed-forward network into modules, or take sp off",
                )
            latents = [each for each in plan if each.rpartition(".")[0] == path and plan[each].role == "latent"]
            if latents:
                self._hook_latents(path, latents)
                continue
            whole = plan[path].whole_arguments if path in plan else ()
            hook = partial(_enter, gather, self._group, whole)
            self._model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)

    def _hook_latents(self, holder: str, latents: list[str]) -> None:
        """Let latents be made of this rank's part of the sequence and gathered, which are narrower than what they are made of.

        The module round them reads the length of the sequence from its input: it is given one of the whole length.
        """
        module, held = self._model.get_submodule(holder), _Held()
        module.register_forward_pre_hook(partial(held.replace, self._group), with_kwargs=True)
        module.register_forward_hook(held.forget)
        for path in latents:
            layer = self._model.get_submodule(path)
            layer.forward = partial(held.gathered, self._group, partial(_column, layer, self._sink))
        queries = getattr(module, "q_proj", None)
        if queries is not None:
            queries.forward = partial(held.of_gathered, self._group, queries.forward)

    def mark_partial(self, paths: Iterable[str]) -> None:
        """Take note of the parameters in modules whose gradients are sums: all that are not split."""
        for path in paths:
            for parameter in self._model.get_submodule(path).parameters():
                if id(parameter) not in self.shards.dimensions:
                    self.shards.partial.add(id(parameter))

    def _split_parameter(self, cut: CutTensor) -> None:
        path, name, dimension, parts = cut.path, cut.name, cut.dimension, cut.parts
        module = self._model.get_submodule(path)
        parameter = module._parameters.get(name)
        if parameter is None or parameter.is_meta:
            return
        sharing = self._sharing if cut.of_key_values else None
        if sharing is not None:
            self._regroup(path)
        if id(parameter) in self._split:  # tied
            module._parameters[name] = self._split[id(parameter)][1]
            return
        if id(parameter) in self.shards.dimensions:
            return
        size = parameter.shape[dimension]
        split = InnerSplit(dimension, parts, self._group, 1 if sharing is None else sharing.size)
        if not split.divides(size):
            lying = "" if len(parts) == 1 else f" (in parts of {':'.join(map(str, parts))})"
            raise InvalidArgument(
                f"{path}.{name} has {size}{lying} in dimension {dimension}, which {split.factor} ranks do not divide",
                field="degrees.tp",
                hint="take a degree that divides it, or pad it",
            )
        made = nn.Parameter(split.part(parameter.detach()).clone(), requires_grad=parameter.requires_grad)
        self._split[id(parameter)] = (parameter, made)
        self.shards.dimensions[id(made)] = dimension
        if len(parts) > 1:
            self.shards.parts[id(made)] = parts
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


class _Held:
    """A module's input while it runs: this rank's part of a sequence."""

    def __init__(self) -> None:
        self._hidden: Tensor | None = None

    def replace(
        self, group: TensorGroup, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """Hold the first tensor among the arguments, and put one of the whole length there that takes no memory."""
        return _enter(self._stand_in, group, (), module, args, kwargs)

    def _stand_in(self, hidden: Tensor, group: TensorGroup) -> Tensor:
        self._hidden = hidden
        batch, length, features = hidden.shape
        return hidden.detach().new_zeros(()).expand(batch, group.size * length, features)

    def gathered(self, group: TensorGroup, forward: Callable[[Tensor], Tensor], stand_in: Tensor) -> Tensor:
        """Return what a layer makes of the part, gathered."""
        assert self._hidden is not None
        return gather(forward(self._hidden), group)

    def of_gathered(self, group: TensorGroup, forward: Callable[[Tensor], Tensor], stand_in: Tensor) -> Tensor:
        """Return what a layer makes of the gathered parts."""
        assert self._hidden is not None
        return forward(gather(self._hidden, group))

    def forget(self, module: nn.Module, args: object, output: object) -> None:
        """Let go of the part."""
        self._hidden = None


def _check_heads(model: nn.Module, size: int) -> None:
    heads, pairs = num_heads(model), num_key_value_heads(model)
    if heads is not None and heads % size:
        raise InvalidArgument(
            f"the model has {heads} num_attention_heads, which tp = {size} does not divide", field="degrees.tp"
        )
    if pairs is not None and pairs % size and size % pairs:
        raise InvalidArgument(
            f"the model has {pairs} num_key_value_heads, which neither divide by tp = {size} nor divide it",
            field="degrees.tp",
        )


def _latent(num_shared: int, group: TensorGroup, module: nn.Module, args: object, output: Tensor) -> Tensor:
    """Let the key at the end of a latent, which all heads share, enter; what is before it enters at the next columns."""
    latent, key = output.split([output.shape[-1] - num_shared, num_shared], dim=-1)
    return torch.cat((latent, copy(key, group)), dim=-1)


def _norm(module: nn.Module, group: TensorGroup, inputs: Tensor) -> Tensor:
    """Return the root-mean-square norm of features that the group splits; every part is on equally many ranks."""
    wide = inputs.float()
    squares = copy(reduce(wide.pow(2).sum(-1, keepdim=True), group), group) / (inputs.shape[-1] * group.size)
    normed = wide * torch.rsqrt(squares + module.variance_epsilon)
    return (module.weight * normed).to(inputs.dtype)


def _column(module: nn.Module, sink: WeightGradientSink, inputs: Tensor) -> Tensor:
    return linear_map(inputs, module.weight, module.bias, sink, transposed=is_transposed(module))


def _row(
    module: nn.Module,
    group: TensorGroup,
    sink: WeightGradientSink,
    leave: Callable[[Tensor, TensorGroup], Tensor],
    inputs: Tensor,
) -> Tensor:
    output = leave(linear_map(inputs, module.weight, None, sink, transposed=is_transposed(module)), group)
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


def _embed(
    module: nn.Embedding, forward: Callable[[Tensor], Tensor], first: int, group: TensorGroup, tokens: Tensor
) -> Tensor:
    """Return the sum of what the ranks make of the tokens whose rows they hold, from row `first` on."""
    local = tokens - first
    absent = (local < 0) | (local >= module.weight.shape[0])
    found = forward(local.masked_fill(absent, 0))
    return reduce(found.masked_fill(absent[..., None], 0.0), group)


def _enter(
    enter: Callable[[Tensor, TensorGroup], Tensor],
    group: TensorGroup,
    whole: tuple[str, ...],
    module: nn.Module,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Change the first tensor among a module's arguments, and let those named in `whole` enter as they are."""
    kwargs = {
        name: copy(value, group) if name in whole and isinstance(value, Tensor) else value
        for name, value in kwargs.items()
    }
    if args and isinstance(args[0], Tensor):
        return (enter(args[0], group), *args[1:]), kwargs
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return args, {**kwargs, name: enter(value, group)}
    return args, kwargs


def _hook_region(chain: LayerChain, held: set[int], group: TensorGroup) -> None:
    """Split the sequence at the entrance of the first block of a row, join it at the entrance of what follows the last."""
    blocks = [layer.kind == "block" for layer in chain.layers]
    for index in range(chain.num_layers):
        before = index > 0 and blocks[index - 1]
        if blocks[index] != before and index in held and chain.layers[index].modules:
            change = split if blocks[index] else join
            module = chain.model.get_submodule(chain.layers[index].modules[0])
            module.register_forward_pre_hook(partial(_enter, change, group, ()), with_kwargs=True)
