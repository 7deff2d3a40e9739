"""One tensor-parallel shard of a model: its modules cut to the shapes that one rank holds, and what it would exchange.

What is cut is what a run splits, by the model's tensor plan (`modeling.tensor_plan`). The vocabulary is cut too, rounded up
where it does not divide, of models whose configuration tells of it, since batches are made for it. Values mean nothing in a shard alone; shapes and times are real.

The head's outputs stay split, and the loss reduces over the vocabulary three numbers a token (maximum, sum of exponentials,
logit of the target). In the backward, each all-reduce of the forward has one of the same size before the column-split
layers (Shoeybi et al., Megatron-LM, 2019), or several that are smaller where columns start from latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from stagewright.modeling import Layer, LayerChain
from stagewright.modeling.tensor_cut import (
    CutTensor,
    cut_tensors,
    divides,
    is_transposed,
    key_value_copies,
    lying_parts,
    tell_module,
)
from stagewright.modeling.tensor_families import ModuleSplit, Role
from stagewright.modeling.tensor_plan import is_within, tensor_plan
from stagewright.planner.documents import Collective
from stagewright.planner.errors import InvalidArgument
from stagewright.profiler.tensor_sums import TensorSum

_REDUCTION_BYTES_PER_TOKEN = 4


def shard_model(model: nn.Module, degree: int) -> None:
    """Cut the model to one shard of `degree`, in place.

    Raises
    ------
    InvalidArgument : when the model has no tensor-parallel plan, or a size does not divide.
    """
    if degree == 1:
        return
    copies, done = key_value_copies(model, degree), dict[int, nn.Parameter]()
    cuts_vocabulary = _vocabulary_size(model) is not None
    for path, how in _plan(model).items():
        if how.role == "vocabulary" and not cuts_vocabulary:
            continue
        for cut in list(cut_tensors(model, path, how)):
            parts = degree // copies if cut.of_key_values else degree
            _cut(model, cut, parts, done, rounds_up=how.role == "vocabulary")
        if how.role == "heads":
            continue
        tell_module(model, path, how, degree, 0)
        _tell_sizes(model.get_submodule(path))
    for module in model.modules():
        _match_groups(module)
    _shrink_vocabulary(model, degree)


def summed_parameters(chain: LayerChain, layer: Layer) -> int:
    """Return how many of a layer's parameters are whole on each shard and work on its own heads; 0 without a plan."""
    return _parameters_of(chain, layer, "shared")


def vocabulary_parameters(chain: LayerChain, layer: Layer) -> int:
    """Return how many parameters of a layer that is neither embedding nor head shards cut with the vocabulary."""
    if layer.kind in ("embedding", "head", "loss") or _vocabulary_size(chain.model) is None:
        return 0
    return _parameters_of(chain, layer, "vocabulary")


def _parameters_of(chain: LayerChain, layer: Layer, role: Role) -> int:
    """Return how many parameters the modules of a role have in a layer; 0 without a plan."""
    try:
        plan = tensor_plan(chain.model)
    except InvalidArgument:
        return 0
    paths = [path for path, how in plan.items() if how.role == role and is_within(path, layer.modules)]
    found = {id(value): value for path in paths for value in chain.model.get_submodule(path).parameters()}
    return sum(value.numel() for value in found.values())


def layer_collectives(
    chain: LayerChain, layer: Layer, sums: Sequence[TensorSum], *, num_tokens: int
) -> tuple[Collective, ...]:
    """Return what the shards of one layer exchange for one microbatch, given the sums that were seen in its forward."""
    whole = _plan(chain.model)
    plan = {path: how for path, how in whole.items() if is_within(path, layer.modules)}
    per_token = float(num_tokens * _REDUCTION_BYTES_PER_TOKEN)
    if layer.kind == "loss":
        split = any(how.role == "vocabulary" for how in whole.values())
        return (_all_reduce("forward", per_token, 3, of_vocabulary=True),) if split else ()
    rows = [each for each in sums if plan[each.path].role == "row"]
    found = _forward_sums(rows)
    going_back = [row for row in rows if row.has_backward]
    entering = [share * row.num_bytes for row in going_back for share in _entering(chain.model, plan, row.path)]
    found += [_all_reduce("backward", size, entering.count(size)) for size in sorted(set(entering), reverse=True)]
    norms = sum(how.role == "norm" for how in plan.values())
    if norms:
        found += [_all_reduce(phase, per_token, norms, of_statistics=True) for phase in ("forward", "backward")]
    vocabulary = [each for each in sums if plan[each.path].role == "vocabulary"]
    found += _forward_sums([each for each in vocabulary if _is_embedding(chain, each)], of_vocabulary=True)
    entering = [each.num_bytes for each in vocabulary if not _is_embedding(chain, each)]
    found += [
        _all_reduce("backward", size, entering.count(size), of_vocabulary=True) for size in dict.fromkeys(entering)
    ]
    return tuple(found)


def _forward_sums(sums: Sequence[TensorSum], *, of_vocabulary: bool = False) -> list[Collective]:
    """Return sums as collectives, the largest first."""
    found = []
    for size in sorted({each.num_bytes for each in sums}, reverse=True):
        again = [each.again for each in sums if each.num_bytes == size]
        found.append(_all_reduce("forward", size, len(again), of_vocabulary=of_vocabulary, count_again=sum(again)))
    return found


def _is_embedding(chain: LayerChain, each: TensorSum) -> bool:
    return isinstance(chain.model.get_submodule(each.path), nn.Embedding)


def _plan(model: nn.Module) -> Mapping[str, ModuleSplit]:
    try:
        return tensor_plan(model)
    except InvalidArgument as error:
        raise InvalidArgument(
            error.message,
            field="tensor_degrees",
            hint="measure tensor degree 1 only, let the factory take tensor_degree, or give the model "
            "stagewright_tensor_plan()",
        ) from error


def _entering(model: nn.Module, plan: Mapping[str, ModuleSplit], row: str) -> Iterator[float]:
    """Yield the sizes, in hidden states, of what enters the columns before a row layer."""
    owner = row.rpartition(".")[0]
    inside = {path: how for path, how in plan.items() if path.rpartition(".")[0] == owner}
    latents = [how for how in inside.values() if how.role == "latent"]
    hidden = model.get_submodule(row).weight.shape[int(is_transposed(model.get_submodule(row)))]
    if latents:
        yield from (
            model.get_submodule(path).weight.shape[1] / hidden for path, how in inside.items() if how.role == "column"
        )
        yield from (int(how.parts[-1]) / hidden for how in latents if len(how.parts) > 1)
        return
    yield 1.0
    yield from (1.0 for _ in (plan[owner].whole_arguments if owner in plan else ()))


def _all_reduce(
    phase: Literal["forward", "backward"],
    payload_bytes: float,
    count: int,
    *,
    of_statistics: bool = False,
    of_vocabulary: bool = False,
    count_again: int | None = None,
) -> Collective:
    return Collective(
        phase=phase,
        operation="all-reduce",
        group="tp",
        payload_bytes=payload_bytes,
        count=count,
        of_statistics=of_statistics,
        of_vocabulary=of_vocabulary,
        count_again=count_again,
    )


def _cut(model: nn.Module, cut: CutTensor, count: int, done: dict[int, nn.Parameter], *, rounds_up: bool) -> None:
    """Replace a parameter by one of `count` shards of it, a tied one by the same shard."""
    module = model.get_submodule(cut.path)
    parameter = module._parameters[cut.name]
    assert parameter is not None
    if id(parameter) not in done:
        size = parameter.shape[cut.dimension]
        if not rounds_up and not divides(size, cut.parts, count):
            raise InvalidArgument(
                f"{cut.path} has {size} features, which tensor degree {count} does not divide", field="tensor_degrees"
            )
        pieces = lying_parts(parameter.detach(), cut.dimension, cut.parts)
        own = [each.narrow(cut.dimension, 0, math.ceil(each.shape[cut.dimension] / count)) for each in pieces]
        done[id(parameter)] = nn.Parameter(torch.cat(own, cut.dimension), requires_grad=parameter.requires_grad)
    module._parameters[cut.name] = done[id(parameter)]


def _tell_sizes(module: nn.Module) -> None:
    """Let a module's own numbers be those of its weight."""
    if isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif is_transposed(module):
        module.nx, module.nf = module.weight.shape


def _shrink_vocabulary(model: nn.Module, degree: int) -> None:
    """Let the loss and the batches know of the shard's part of the vocabulary."""
    size = _vocabulary_size(model)
    for holder in () if size is None else (model.config, *model.modules()):
        if getattr(holder, "vocab_size", None) == size:
            setattr(holder, "vocab_size", math.ceil(size / degree))  # noqa: B010


def _vocabulary_size(model: nn.Module) -> int | None:
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return size if isinstance(size, int) else None


def _match_groups(module: nn.Module) -> None:
    """Let an attention module know how many query heads share a key/value head now."""
    if hasattr(module, "num_key_value_groups") and hasattr(module, "q_proj") and hasattr(module, "k_proj"):
        module.num_key_value_groups = module.q_proj.out_features // module.k_proj.out_features
