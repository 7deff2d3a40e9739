"""A plan as a series of rewritings of a module, each verified against the module as it was: Slapo's schedule language.

    ["blocks.0.attention.inputs"].shard(["weight", "bias"], axis=0)      a column layer: split by its outputs
    ["blocks.0.attention.inputs"].sync("backward", "all-reduce")         its input's gradients are summed
    ["blocks.0.attention.output"].shard("weight", axis=1)                a row layer: split by its inputs
    ["blocks.0.attention.output"].sync("forward", "all-reduce")          its outputs are summed
    ["blocks.0"].checkpoint("full")                                      recomputed in the backward
    ["blocks.2"].pipeline_split()                                        a stage begins here

A shard without its sync computes something else, so the primitives of one layer (of layers with a shared weight; of all
blocks under sequence parallelism, which lays out what flows between them) make one step. After each step loss and every
gradient, gathered whole, must equal those of the untouched module. Slapo's `.fuse` and `.replace` change kernels, of
which a plan says nothing; `.shard` and `.sync` are done by `modeling.tensor_parallel`, `.checkpoint` by
`modeling.recomputation`.

Paper: Chen et al., Slapo: A Schedule Language for Progressive Optimization of Large Deep Learning Model Training,
ASPLOS 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from stagewright.modeling.batch import Batch
from stagewright.modeling.chain import LayerChain
from stagewright.modeling.recomputation import recompute_layers
from stagewright.modeling.tensor_collectives import TensorGroup
from stagewright.modeling.tensor_cut import key_value_copies
from stagewright.modeling.tensor_families import Role
from stagewright.modeling.tensor_parallel import TensorShards, parallelize
from stagewright.modeling.tensor_plan import is_within, tensor_plan
from stagewright.modeling.vocabulary_loss import vocabulary_loss
from stagewright.modeling.weight_gradients import WeightGradientSink
from stagewright.planner.documents.plan import Degrees, Plan
from stagewright.planner.documents.profile import Recompute
from stagewright.planner.errors import InvalidArgument, RunFailed
from stagewright.runtime.gradient_check import FLOOR
from stagewright.runtime.stage import Stage, Values


@dataclass(frozen=True)
class Step:
    """Primitives that belong together: the layers they change, and their text."""

    kind: Literal["shard", "checkpoint", "pipeline_split"]
    layers: tuple[int, ...]
    primitives: tuple[str, ...]
    level: Recompute = Recompute.NONE


@dataclass(frozen=True)
class Verified:
    """A step that was applied, and the largest relative error that it left in loss and gradients."""

    step: Step
    max_relative_error: float


def steps_of(plan: Plan, chain: LayerChain) -> tuple[Step, ...]:
    """Return the steps that turn the model into what the plan runs, but for data parallelism, which changes no module.

    Raises InvalidArgument for stages of different degrees, and for context or expert parallelism, which primitives of
    modules do not express.
    """
    degrees = _degrees(plan)
    levels = {
        layer: level
        for stage in plan.stages
        for layer, level in zip(stage.layer_indices, stage.recompute_levels(), strict=True)
        if level is not Recompute.NONE and chain.layers[layer].modules
    }
    shards = [] if degrees.tp == 1 else list(_shard_steps(chain, degrees))
    checkpoints = [
        Step("checkpoint", (layer,), (f'["{chain.layers[layer].name}"].checkpoint("{level.value}")',), level)
        for layer, level in sorted(levels.items())
    ]
    starts = sorted(min(stage.layer_indices) for stage in plan.stages if stage.num_layers)[1:]
    splits = [
        Step("pipeline_split", (layer,), (f'["{chain.layers[layer].name}"].pipeline_split()',)) for layer in starts
    ]
    return (*shards, *checkpoints, *splits)


def verify_steps(
    plan: Plan,
    chain: LayerChain,
    batch: Batch,
    *,
    group: TensorGroup | None = None,
    seed: int = 0,
    tolerance: float = 1e-5,
) -> tuple[Verified, ...]:
    """Apply the plan's steps to the model, in place, one after the other; return what each of them left as error.

    Every rank of `group`, whose size is the plan's tensor degree, calls this with the same model and batch.

    Raises
    ------
    InvalidArgument : as `steps_of`, and for a group of another size.
    RunFailed : when a step changes loss or gradients beyond the tolerance; it names the step's primitives.
    """
    degrees, size = _degrees(plan), 1 if group is None else group.size
    if size != degrees.tp:
        raise InvalidArgument(f"the plan has tp = {degrees.tp}, the group {size} ranks", field="degrees.tp")
    model = _Rewritten(chain, degrees, group)
    reference = model.results(batch, seed)
    found = []
    for step in steps_of(plan, chain):
        model.apply(step)
        error, where = _largest_error(model.results(batch, seed), reference)
        if not error <= tolerance:
            raise RunFailed(
                f"after {'; '.join(step.primitives)} {where} differs by {error:.2e}, {tolerance:.0e} is allowed",
                field="primitives",
                hint="look at how these modules read their weights: heads of a fused projection must lie together",
            )
        found.append(Verified(step, error))
    return tuple(found)


class _Rewritten:
    """A model under rewriting: its shards, where it is cut, and its loss and gradients as it is now."""

    def __init__(self, chain: LayerChain, degrees: Degrees, group: TensorGroup | None) -> None:
        self._chain = chain
        self._degrees = degrees
        self._group = group
        self._sink = WeightGradientSink()
        self._shards: list[TensorShards] = []
        self._starts: list[int] = [0]
        self._splits_vocabulary = False

    def apply(self, step: Step) -> None:
        """Rewrite the model by one step."""
        if step.kind == "pipeline_split":
            self._starts = sorted({*self._starts, *step.layers})
            return
        if step.kind == "checkpoint":
            recompute_layers(self._chain, dict.fromkeys(step.layers, step.level))
            return
        assert self._group is not None, "the group's size is the tensor degree"
        self._shards.append(
            parallelize(
                self._chain,
                step.layers,
                self._group,
                self._sink,
                sequence_parallel=self._degrees.sp,
                vocabulary_parallel=self._degrees.vocab_parallel,
            )
        )
        last = self._chain.num_layers - 1
        self._splits_vocabulary |= self._degrees.vocab_parallel and bool({last, last - 1} & set(step.layers))

    def results(self, batch: Batch, seed: int) -> dict[str, Tensor]:
        """Return the loss and all gradients by parameter name, whole."""
        parameters = dict(self._chain.model.named_parameters())
        for parameter in parameters.values():
            parameter.grad = None
        bounds = pairwise([*self._starts, self._chain.num_layers])
        stages = [
            Stage(self._chain.segment(first, end), index, 0, self._sink, loss_context=self._loss_context())
            for index, (first, end) in enumerate(bounds)
        ]
        known: Values = {}
        for stage in stages:
            sources = {layer: known[layer] for layer in stage.segment.sources}
            known.update(stage.forward(_UNIT, batch, sources, seed))
        loss = stages[-1].losses[_UNIT]
        gradients: Values = {}
        for stage in reversed(stages):
            wanted = {layer: gradients[layer] for layer in stage.segment.results if layer in gradients}
            for layer, values in stage.backward(_UNIT, wanted, loss_weight=1.0, split=False).items():
                gradients[layer] = _added(gradients.get(layer), values)
        return {"the loss": loss.clone(), **{name: self._whole(value) for name, value in parameters.items()}}

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        value = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for shards in self._shards:
            if id(parameter) in shards.partial and shards.group is not None:
                value = shards.group.all_reduce(value)
            if shards.is_split(parameter):
                return shards.whole(value, parameter).clone()
        return value.clone()

    def _loss_context(self) -> Callable[[], AbstractContextManager[object]]:
        if not self._splits_vocabulary or self._group is None:
            return nullcontext
        return partial(vocabulary_loss, self._group)


_UNIT = (0, -1)


def _added(first: tuple[Tensor, ...] | None, second: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return second if first is None else tuple(a + b for a, b in zip(first, second, strict=True))


def _largest_error(values: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest relative error in the 2-norm and what has it; a floor stands in for what is zero in theory."""
    scale = sum(float(value.double().norm()) ** 2 for value in reference.values()) ** 0.5
    worst = (0.0, "")
    for name, wanted in reference.items():
        norm = max(float(wanted.double().norm()), FLOOR * scale, 1e-300)
        error = float((values[name].double() - wanted.double()).norm()) / norm
        worst = max(worst, (error if error == error else float("inf"), name))
    return worst


def _degrees(plan: Plan) -> Degrees:
    degrees = plan.stages[0].degrees
    if any(stage.degrees != degrees for stage in plan.stages):
        raise InvalidArgument("stages have different degrees", field="stages", hint="verify a plan of equal degrees")
    if degrees.cp * degrees.expert_split > 1:
        raise InvalidArgument(
            f"cp * ep * etp = {degrees.cp} * {degrees.ep} * {degrees.etp}, primitives of modules know tp alone",
            field="stages",
            hint="check this plan with `stagewright run --check gradients`",
        )
    return degrees


def _shard_steps(chain: LayerChain, degrees: Degrees) -> Iterator[Step]:
    """Yield the shards and syncs of the layers that a tensor plan splits, those that belong together in one step."""
    if key_value_copies(chain.model, degrees.tp) > 1:
        raise InvalidArgument(
            f"{degrees.tp} ranks share key-value heads, which primitives of modules do not express", field="degrees.tp"
        )
    roles = {
        path: split.role
        for path, split in tensor_plan(chain.model).items()
        if split.role is not None and (split.role != "vocabulary" or degrees.vocab_parallel)
    }
    for layers in _together(chain, roles, degrees):
        texts = [
            text for layer in layers for path in _inside(chain, layer, roles) for text in _texts(path, roles[path])
        ]
        if degrees.sp:
            texts.append(f'["{chain.layers[layers[0]].name}"].sync("sequence", "split")')
        if texts:
            yield Step("shard", layers, tuple(texts))


def _texts(path: str, role: Role) -> tuple[str, ...]:
    if role == "row":
        return f'["{path}"].shard("weight", axis=1)', f'["{path}"].sync("forward", "all-reduce")'
    if role in ("shared", "latent"):
        return (f'["{path}"].sync("backward", "all-reduce")',)
    if role == "heads":
        return (f'["{path}"].shard("heads", axis=0)',)
    names = '["weight", "bias"]' if role == "column" else '"weight"'
    when = "backward" if role == "column" else "forward"
    return f'["{path}"].shard({names}, axis=0)', f'["{path}"].sync("{when}", "all-reduce")'


def _inside(chain: LayerChain, layer: int, roles: dict[str, Role]) -> list[str]:
    parts = chain.layers[layer].modules
    return [path for path in roles if is_within(path, parts)]


def _together(chain: LayerChain, roles: dict[str, Role], degrees: Degrees) -> list[tuple[int, ...]]:
    """Return groups of layers that are split in one step: all under sequence parallelism, else those that share weights.

    A vocabulary that is split leaves the logits split, so head and loss go with it.
    """
    if degrees.sp:
        return [tuple(range(chain.num_layers))]
    group_of = list(range(chain.num_layers))
    position = {name: index for index, name in enumerate(chain.layer_names)}
    pairs = [sorted(position[name] for name in tie.layers) for tie in chain.ties] if degrees.vocab_parallel else []
    for pair in pairs:
        for layer in pair:
            group_of[layer] = pair[0]
    split = [layer for layer in range(chain.num_layers) if _inside(chain, layer, roles)]
    return [
        tuple(layer for layer in split if group_of[layer] == first)
        for first in sorted({group_of[layer] for layer in split})
    ]


def texts_of(steps: Sequence[Step]) -> list[str]:
    """Return the primitives of all steps, one a line of a script."""
    return [text for step in steps for text in step.primitives]
