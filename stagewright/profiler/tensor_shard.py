"""One tensor-parallel shard of a model: its modules cut to the shapes that one rank holds, and what it would exchange.

The plan is the model's own `tp_plan` (Hugging Face models have one; any module may), from patterns of module or
parameter names to a style:

- `colwise`: a linear layer gives t-th of its outputs. With fewer key/value heads than ranks, heads are replicated.
- `rowwise`: it takes a t-th of its inputs; its outputs are partial sums, which an all-reduce adds up.
- `embedding_rowwise`: a t-th of the vocabulary; the result is reduced.

Routed experts stay whole, whatever the plan says: a run divides them over its expert degrees (ep, etp), not over tp.

The head's outputs stay split, and the loss reduces over the vocabulary three numbers a token (maximum, sum of exponentials,
logit of the target). In the backward, each all-reduce of the forward has one of the same size before the column-split
layers (Shoeybi et al., Megatron-LM, 2019).

Values mean nothing in a shard alone; shapes and times are real.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from stagewright.modeling import Layer, LayerChain
from stagewright.planner.documents import Collective
from stagewright.planner.errors import InvalidArgument
from stagewright.profiler.structure import is_expert_parameter

Style = Literal["colwise", "rowwise", "embedding_rowwise"]

_STYLES: Mapping[str, Style] = {
    "colwise": "colwise",
    "colwise_rep": "colwise",
    "colwise_gather_output": "colwise",
    "rowwise": "rowwise",
    "embedding_rowwise": "embedding_rowwise",
}
_REDUCTION_BYTES_PER_TOKEN = 4


def shard_model(model: nn.Module, degree: int) -> None:
    """Cut the model to one shard of `degree`, in place.

    Raises
    ------
    InvalidArgument : when the model has no tensor-parallel plan, or a size does not divide.
    """
    if degree == 1:
        return
    plan = tensor_plan(model)
    done: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        style = style_of(plan, name)
        if style is None:
            continue
        if isinstance(module, nn.Embedding):
            module.num_embeddings = _cut_parameter(module, "weight", 0, degree, name, done, rounds_up=True)
        elif isinstance(module, nn.Linear):
            _cut_linear(model, module, name, style, degree, done)
    for module in model.modules():
        _match_groups(module)
    _shrink_vocabulary(model, degree)


def tensor_plan(model: nn.Module) -> Mapping[str, str]:
    """Return the model's tensor-parallel plan; raises InvalidArgument when it has none."""
    plan = getattr(model, "tp_plan", None)
    if not plan:
        raise InvalidArgument(
            f"{type(model).__name__} has no tensor-parallel plan (tp_plan)",
            field="tensor_degrees",
            hint="measure tensor degree 1 only, let the factory take tensor_degree, or give the model a tp_plan",
        )
    return dict(plan)


def style_of(plan: Mapping[str, str], name: str) -> Style | None:
    """Return the style of a module, None when it is replicated, as routed experts are."""
    if is_expert_parameter(name):
        return None
    for pattern, style in plan.items():
        if fnmatchcase(name, pattern):
            return _STYLES.get(style)
    return None


def layer_collectives(
    chain: LayerChain, layer: Layer, *, num_tokens: int, boundary_bytes: float
) -> tuple[Collective, ...]:
    """Return what the shards of one layer exchange for one microbatch; `boundary_bytes` is the hidden state's size."""
    if layer.kind == "loss":
        payload = float(num_tokens * _REDUCTION_BYTES_PER_TOKEN)
        return (_all_reduce("forward", payload, 3),)
    if layer.kind == "head":
        return (_all_reduce("backward", boundary_bytes, 1),)
    if layer.kind == "embedding":
        return (_all_reduce("forward", boundary_bytes, 1),)
    plan = tensor_plan(chain.model)
    names = [
        f"{path}.{name}"
        for path in layer.modules
        for name, _ in chain.model.get_submodule(path).named_modules()
        if name
    ]
    count = sum(style_of(plan, name) == "rowwise" for name in names)
    if not count:
        return ()
    return (_all_reduce("forward", boundary_bytes, count), _all_reduce("backward", boundary_bytes, count))


def _all_reduce(phase: Literal["forward", "backward"], payload_bytes: float, count: int) -> Collective:
    return Collective(phase=phase, operation="all-reduce", group="tp", payload_bytes=payload_bytes, count=count)


def _cut_linear(
    model: nn.Module, module: nn.Linear, name: str, style: Style, degree: int, done: dict[int, nn.Parameter]
) -> None:
    if style == "rowwise":
        module.in_features = _cut_parameter(module, "weight", 1, degree, name, done)
        return
    owner = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
    head_size = getattr(owner, "head_dim", None)
    is_projection = isinstance(head_size, int) and module.out_features % head_size == 0
    heads = module.out_features // head_size if is_projection and head_size else 0
    if heads and heads < degree and degree % heads == 0:
        degree = heads
    is_head = "." not in name
    module.out_features = _cut_parameter(module, "weight", 0, degree, name, done, rounds_up=is_head)
    if module.bias is not None:
        _cut_parameter(module, "bias", 0, degree, name, done, rounds_up=is_head)


def _cut_parameter(
    module: nn.Module,
    attribute: str,
    dimension: int,
    degree: int,
    name: str,
    done: dict[int, nn.Parameter],
    *,
    rounds_up: bool = False,
) -> int:
    """Replace a parameter by one shard of it, a tied one by the same shard; returns the new size."""
    parameter = getattr(module, attribute)
    if id(parameter) not in done:
        size = parameter.shape[dimension]
        if size % degree and not rounds_up:
            raise InvalidArgument(
                f"{name} has {size} features, which tensor degree {degree} does not divide", field="tensor_degrees"
            )
        part = parameter.detach().narrow(dimension, 0, math.ceil(size / degree)).clone()
        done[id(parameter)] = nn.Parameter(part, requires_grad=parameter.requires_grad)
    cut = done[id(parameter)]
    setattr(module, attribute, cut)
    return int(cut.shape[dimension])


def _shrink_vocabulary(model: nn.Module, degree: int) -> None:
    """Let the loss and the batches know of the shard's part of the vocabulary."""
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int):
        return
    for holder in (config, *model.modules()):
        if getattr(holder, "vocab_size", None) == size:
            setattr(holder, "vocab_size", math.ceil(size / degree))  # noqa: B010


def _match_groups(module: nn.Module) -> None:
    """Let an attention module know how many query heads share a key/value head now."""
    if hasattr(module, "num_key_value_groups") and hasattr(module, "q_proj") and hasattr(module, "k_proj"):
        module.num_key_value_groups = module.q_proj.out_features // module.k_proj.out_features
