"""ZeRO: optimizer states, gradients and parameters of a bucket divided over the ranks that hold it.

All parameters of the bucket lie one behind the other in one flat buffer, padded to n equal shards; rank i owns shard i,
with the only copy of its optimizer states (and of its fp32 master weights when the parameters are narrower). Gradients stay
in the parameters' own type, as they are summed and sent; the optimizer's step widens them.

    stage 1   gradients accumulate whole; one reduce-scatter each iteration; step on the shard; one all-gather
    stage 2   a reduce-scatter after each microbatch, summed into the shard's gradient; the rest as stage 1
    stage 3   as stage 2, and the flat buffer exists only between `start_gather` and `reshard`

Under stages 2 and 3 a bucket is one layer (FSDP's unit): its gradients are scattered as soon as a full backward has
finished them, so that whole gradients of two layers at most exist at a time; `gathering` gathers layer by layer.

Replicas may own unlike shares (Cephalo): each shard is then reduced to its owner and broadcast from it, without padding. So are
the shards of a bucket whose matrices are cut between bands of tiles only, for an optimizer that needs tiles whole (Shampoo).

With fewer shards than ranks (HSDP, MiCS, the replicas of a bidirectional pipeline) the shards' gradients are all-reduced
over the ranks that own the same one. Elementwise optimizers step exactly as on whole parameters.

Papers: Rajbhandari et al., ZeRO, SC 2020; Zhao et al., PyTorch FSDP, VLDB 2023; Zhang et al., MiCS, VLDB 2022; Guo et al.,
Cephalo, 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stagewright.modeling.tensor_parallel import TensorShards
from stagewright.planner.cost.matrix_optimizer import BLOCK
from stagewright.planner.link_bytes import UPDATE
from stagewright.planner.matrix_tiles import band_bounds
from stagewright.runtime.matrix_layout import (
    Piece,
    SplitTensor,
    TensorKinds,
    Update,
    mean_square,
    mean_square_of_rows,
    statistics_key,
)
from stagewright.runtime.offload import HostTail
from stagewright.runtime.reduction import StageKey, Traffic, all_reduce_bytes, local_gradient, squared_norm, sum_partial
from stagewright.runtime.shampoo import Shampoo
from stagewright.runtime.tile_statistics import everyones, is_statistics, own_statistics, whole_statistics
from stagewright.runtime.used_parameters import UsedParameters


class _Works:
    """Several operations under way."""

    def __init__(self, works: Iterable[dist.Work | None]) -> None:
        self._works = [work for work in works if work is not None]

    def wait(self) -> None:
        """Wait for all of them."""
        for work in self._works:
            work.wait()


class Scattering:
    """Whose gradients are on their way, of the buckets of one rank: of one bucket, beside what a backward is making."""

    def __init__(self) -> None:
        self._bucket: ShardedBucket | None = None

    def begin(self, bucket: ShardedBucket) -> None:
        """Wait for those of another bucket, so that their whole buffer is free before there is one more."""
        if self._bucket is not bucket:
            self.settle()
        self._bucket = bucket

    def settle(self) -> None:
        """Wait for those that are on their way."""
        if self._bucket is not None:
            self._bucket.land()
            self._bucket = None


class _Placed(NamedTuple):
    """A tensor of a bucket: where it begins in the flat buffer, and its elements in this rank's shard, if any lie there."""

    parameter: nn.Parameter
    offset: int
    part: slice


@dataclass(frozen=True)
class ShardLayout:
    """The tensors of one rank's shard.

    Tensors of which a group leaves a part here are gathered over it by every rank of the bucket, one after the other:
    the ranks of the group own the same elements.

    Parameters
    ----------
    placed : the tensors of the bucket.
    begin : where this shard begins in the flat buffer.
    kinds : what is needed of which tensor.
    gather : returns the flat buffer, from this rank's part of it; None where that is all of it.
    """

    placed: tuple[_Placed, ...]
    begin: int
    kinds: TensorKinds
    shards: TensorShards
    gather: Callable[[Tensor], Tensor] | None

    @cached_property
    def _own(self) -> tuple[_Placed, ...]:
        return tuple(each for each in self.placed if each.part.start < each.part.stop)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """Return the elements of each tensor that lie in the shard, by the tensor's whole shape."""
        return tuple(
            self._piece(place, *each) for place, each in enumerate(self.placed) if each.part.start < each.part.stop
        )

    def _piece(self, place: int, parameter: nn.Parameter, offset: int, part: slice) -> Piece:
        split = self._splits[id(parameter)]
        shape = tuple(parameter.shape) if split is None else split.whole_shape
        first = self.begin + part.start - offset
        return Piece(shape, id(parameter) in self.kinds.matrices, part, first, place, split)

    @cached_property
    def _splits(self) -> dict[int, SplitTensor | None]:
        """How groups split the tensors that are needed whole, by their ids."""
        return {id(each.parameter): self.kinds.split_of(each.parameter, self.shards) for each in self.placed}

    def gathered(self, update: Update) -> Iterator[tuple[int, Tensor]]:
        """Yield each piece's index and its whole tensor, flat; every rank of the bucket calls this."""
        flat = None if self.gather is None else self.gather(update.together(self.pieces))
        index = -1
        for parameter, offset, part in self.placed:
            is_own = part.start < part.stop
            index += is_own
            whole = update.make(part) if flat is None else flat[offset : offset + parameter.numel()]
            split = self._splits[id(parameter)]
            if split is not None:
                whole = split.whole(whole)
            if is_own:
                yield index, whole

    def own(self, index: int, whole: Tensor) -> Tensor:
        """Return what of a whole tensor lies in the shard, flat."""
        parameter, offset, part = self._own[index]
        split = self._splits[id(parameter)]
        if split is not None:
            whole = split.part(whole)
        moved = self.begin - offset
        return whole.reshape(-1)[part.start + moved : part.stop + moved]

    def mean_square(self, index: int, gathered: Tensor, dtype: torch.dtype) -> float:
        """Return that of a whole tensor."""
        parameter = self._own[index].parameter
        if id(parameter) in self.kinds.rows:
            return mean_square_of_rows(gathered, self.shards.dividing(parameter), dtype)
        return mean_square(gathered, dtype)


class ShardedBucket:
    """Parameters whose states are divided over a group.

    Where masters lie on the host and gathers recur, `narrow` is this rank's share of the weights themselves; else None.

    Parameters
    ----------
    parameters : by name in the model; all of one dtype.
    group : the ranks over which the bucket is divided; None for no division (master weights only).
    across : the ranks that own the same shard in other groups; None when there are none.
    everyone : all ranks that hold these parameters; None when this rank alone does.
    holders : (replica, stage) of this rank's stages that use the parameters.
    level : ZeRO stage.
    traffic : counts bytes sent by ring algorithms.
    shards : how tensor parallelism has split the parameters.
    shares : of the elements that each rank of the group owns, where they differ.
    whole_tiles : ids of the matrices that are cut between bands of tiles only, between matrices where a group splits their rows.
    purpose : `dp` or `tied`, in the names of the traffic.
    by_layer : at stage 3, UNSHARD leaves the gathering to a `gathering.GatherWindow`.
    scattering : shared by the rank's buckets.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        group: dist.ProcessGroup | None,
        across: dist.ProcessGroup | None,
        holders: frozenset[StageKey],
        level: int,
        traffic: Traffic,
        *,
        purpose: str,
        everyone: dist.ProcessGroup | None = None,
        shards: TensorShards | None = None,
        shares: Sequence[float] = (),
        whole_tiles: Collection[int] = (),
        by_layer: bool = False,
        scattering: Scattering | None = None,
    ) -> None:
        self.holders = holders
        self._scattering = scattering or Scattering()
        self._parameters = dict(parameters)
        self._trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
        self._group = group
        self._across = across
        self._level = level
        self._traffic = traffic
        self._purpose = purpose
        self._by_microbatch = level >= 2
        self._by_layer = by_layer
        self._shards = shards or TensorShards()
        self._count = 1 if group is None else group.size()
        index = 0 if group is None else dist.get_group_rank(group, dist.get_rank())
        self._is_even = not shares and not whole_tiles
        self._bounds = self._shard_bounds(shares, whole_tiles)
        self._size = self._bounds[-1]
        self._own = slice(self._bounds[index], self._bounds[index + 1])
        self._length = self._own.stop - self._own.start
        self._flat = self._trained[0].data.new_zeros(self._size)
        self._bytes = self._flat.numel() * self._flat.element_size()
        self._point_into_flat()
        own = self._flat[self._own]
        master = torch.float32 if own.element_size() < 4 else own.dtype
        vanishes = level >= 3 and self._count > 1
        self._shard = nn.Parameter(own.detach().to(master, copy=vanishes or master != own.dtype))
        self._shard.grad_dtype = self._flat.dtype
        self._gradients = torch.zeros_like(self._flat) if level <= 1 else None
        self._shard.grad = self._home_of_gradient()
        self._away: HostTail | None = None  # of the masters
        self.narrow: Tensor | None = None
        self._flight: tuple[dist.Work | _Works, Tensor, Tensor] | None = None
        self._summing: dist.Work | None = None
        self._gathering: dist.Work | _Works | None = None
        self._ready: set[int] = set()
        self._early = 0  # units whose gradients were scattered inside their backward
        self._is_whole = True
        self._used = UsedParameters(self._trained, everyone)
        self._kept: list[tuple[slice, Tensor]] = []  # of the shard, what no optimizer step may move
        if self._by_microbatch:
            for parameter in self._trained:
                parameter.register_post_accumulate_grad_hook(self._take_note)
        self._attach()
        self.reshard()

    def _shard_bounds(self, shares: Sequence[float], whole_tiles: Collection[int]) -> tuple[int, ...]:
        """Return where the shards of the flat buffer begin, and its end."""
        if self._is_even:
            total = sum(parameter.numel() for parameter in self._trained)
            return tuple(place * -(-total // self._count) for place in range(self._count + 1))
        shapes = [
            (parameter.shape, self._rows_of_band(parameter) if id(parameter) in whole_tiles else 0)
            for parameter in self._trained
        ]
        return band_bounds(shapes, shares or [1 / self._count] * self._count)

    def _rows_of_band(self, parameter: nn.Parameter) -> int:
        """Return how many rows lie together for the tiles in them: all of a matrix where a group splits its rows."""
        split = self._shards.tensor_split(parameter)
        return parameter.shape[-2] if split is not None and split.dimension == parameter.dim() - 2 else BLOCK

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters."""
        return self._trained

    @property
    def renewed(self) -> list[nn.Parameter]:
        """Nothing: parameters are changed in place."""
        return []

    @property
    def num_bytes(self) -> int:
        """Bytes of the parameters when they are whole, padding included."""
        return self._bytes

    @property
    def is_whole(self) -> bool:
        """Whether the parameters are here, or on their way."""
        return self._is_whole

    def before_forward(self, microbatch: int) -> None:
        """Let what the last backward has scattered land; one version of the weights serves the whole iteration."""
        self._scattering.settle()

    def before_backward(self, microbatch: int) -> None:
        """Let what the last backward has scattered land."""
        self._scattering.settle()

    def before_step(self, microbatch: int) -> None:
        """Bring the masters to the device; the gradients are where the optimizer looks."""
        self._fetch()

    def keep_on_host(self, num_elements: int, copied: Callable[[float], None]) -> None:
        """Let the last elements of the masters lie in host memory between steps; weights that have none are no states.

        Under ZeRO-3 a narrow copy of the shard is what gathers take.
        """
        self._fetch()
        self._away, self.narrow = None, None
        if not num_elements or self._shard.dtype == self._flat.dtype:
            return
        self._away = HostTail(self._shard.data, num_elements, copied)
        if self._level >= 3 and self._count > 1:
            self.narrow = self._shard.detach().to(self._flat.dtype)
        self._away.put_away()

    def host_bytes(self) -> float:
        """Return the bytes of masters in host memory."""
        return 0.0 if self._away is None else self._away.host_bytes

    def move_masters(self) -> list[nn.Parameter]:
        """Fetch and put away, as a step does, what lies on the host of the masters; returns these, in new memory, where any do."""
        if self._away is None:
            return []
        self._away.fetch()
        self._away.put_away()
        return [self._shard]

    def _fetch(self) -> None:
        if self._away is not None:
            self._away.fetch()

    def _put_away(self) -> None:
        """Renew the narrow copy and put the masters away, where they lie on the host."""
        if self.narrow is not None:
            self.narrow.copy_(self._shard.detach())
        if self._away is not None:
            self._away.put_away()

    def arm(self) -> None:
        """Do nothing: `start` reduces what the microbatches left."""

    def start(self) -> None:
        """Start to reduce what is left to reduce, and to sum over the owners of the same shard.

        Nothing is waited for but ranks that run this very list: those of another stage may need this rank first.
        """
        if not self._by_microbatch:
            self._scatter()
        if self._across is not None and self._level:
            self.land()
            gradient = self._shard_gradient()
            self._summing = dist.all_reduce(gradient, group=self._across, async_op=True)
            self._count_traffic("all-reduce", all_reduce_bytes(gradient, self._across))
        self._used.start()

    def finish(self) -> None:
        """Wait for the reductions under way; keep the values of what never had a gradient."""
        self.land()
        if self._summing is not None:
            self._summing.wait()
            self._summing = None
        self._used.finish()
        unused = self._unused_parts()
        if unused:
            self._fetch()
        self._kept = [(part, self._shard.detach()[part].clone()) for part in unused]

    def after_microbatch(self) -> None:
        """Reduce one unit's gradients, at ZeRO stages 2 and 3, unless its backward has done so."""
        if not self._by_microbatch:
            return
        if self._early:
            self._early -= 1
        else:
            self._scatter()
        self._ready.clear()

    def unshard(self) -> None:
        """Gather the parameters, at ZeRO stage 3; by layer, the layers do so themselves."""
        if not self._by_layer:
            self.start_gather()
            self.wait_gathered()

    def start_gather(self) -> None:
        """Start to gather the parameters, unless they are here."""
        if self._is_whole:
            return
        self._flat.untyped_storage().resize_(self._bytes)
        self._gathering = self._gather(wait=False)
        self._is_whole = True

    def wait_gathered(self) -> None:
        """Wait until the parameters are here."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    def reshard(self) -> None:
        """Free the gathered parameters, at ZeRO stage 3."""
        if self._level >= 3 and self._is_whole and self._count > 1:
            self.wait_gathered()
            self._flat.untyped_storage().resize_(0)
            self._is_whole = False

    def optimized(self) -> list[nn.Parameter]:
        """Return the shard."""
        return [self._shard]

    def squared_norm(self) -> Tensor:
        """Return this rank's share of the squared norm: that of its shard, which equal owners share."""
        shard = self._shard_gradient()
        flat = torch.zeros(self._size, dtype=shard.dtype, device=shard.device)
        flat[self._own] = shard
        owners = 1 if self._across is None else self._across.size()
        return squared_norm(zip(self._trained, self._views(flat), strict=True), self._shards) / owners

    def after_step(self) -> None:
        """Gather the stepped shards; at ZeRO stage 3 the next UNSHARD does.

        What never had a gradient is put back: its states are a part of the shard's, and weight decay would move it.
        """
        with torch.no_grad():
            for part, values in self._kept:
                self._shard[part] = values
        if self._is_whole:
            self._gather(wait=True)
        self._put_away()

    def gradients(self) -> dict[str, Tensor]:
        """Return the summed gradients by name, gathered from all shards."""
        flat = self._gathered(self._shard_gradient().to(self._flat.dtype))
        return self._named(flat)

    def values(self) -> dict[str, Tensor]:
        """Return copies of the trainable parameters by name, gathered from all shards."""
        self._fetch()
        found = self._named(self._gathered(self._shard.detach()))
        self._put_away()
        return found

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set the trainable parameters."""
        flat = self._flat.new_zeros(self._size, dtype=self._shard.dtype)
        for (name, parameter), view in zip(self._names(), self._views(flat), strict=True):
            view.copy_(self._shards.part(values[name], parameter))
        self._fetch()
        with torch.no_grad():
            self._shard.copy_(flat[self._own])
            if self._is_whole:
                self._flat.copy_(flat)
        self._put_away()

    def states(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
        """Return copies of the optimizer's states by key and name, gathered from all shards."""
        result: dict[str, dict[str, Tensor]] = {}
        for key, value in optimizer.state.get(self._shard, {}).items():
            if not isinstance(value, Tensor) or is_statistics(key):
                continue
            if value.dim():
                result[key] = self._named(self._gathered(value))
            else:
                result[key] = {name: value.clone() for name, _ in self._names()}
        for name, values in self._statistics(optimizer).items():
            for key, value in values.items():
                result.setdefault(key, {})[name] = value
        return result

    def _statistics(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
        """Return copies of the statistics of all tiles by name and key; a collective where there are any."""
        if not isinstance(optimizer, Shampoo):
            return {}
        own = {key: value for key, value in optimizer.state.get(self._shard, {}).items() if is_statistics(key)}
        device = self._shard.device
        everyone = [own] if self._group is None else everyones(own, self._group, device)
        found: dict[str, dict[str, Tensor]] = {name: {} for name, _ in self._names()}
        names = [name for name, _ in self._names()]
        for key, value in ((key, value) for each in everyone for key, value in each.items()):
            kind, _, place = key.partition("@")
            found[names[int(place.partition(".")[0])]][f"{kind}.{place.partition('.')[2]}"] = value
        return {name: whole_statistics(found[name], parameter, self._shards) for name, parameter in self._names()}

    def load_states(self, optimizer: torch.optim.Optimizer, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set the optimizer's states."""
        state = self._own_statistics(optimizer, values)
        for key, found in values.items():
            one = next((found[name] for name, _ in self._names() if name in found), None)
            if one is None or is_statistics(key):
                continue
            state[key] = self._own_part(found) if one.dim() else one.clone()
        if state:
            optimizer.state[self._shard] = state

    def _own_statistics(
        self, optimizer: torch.optim.Optimizer, values: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return, of statistics by key and name, those that this rank keeps of the tiles in its shard."""
        state: dict[str, Tensor] = {}
        names = self._names()
        for piece in optimizer.layout_of(self._shard).pieces if isinstance(optimizer, Shampoo) else ():
            if not piece.is_matrix or piece.place is None:
                continue
            name, parameter = names[piece.place]
            whole = {key: found[name] for key, found in values.items() if is_statistics(key) and name in found}
            for key, value in own_statistics(whole, parameter, self._shards, piece.kept()).items():
                kind, _, number = key.partition(".")
                state[kind + statistics_key(piece.place, int(number))] = value.clone()
        return state

    def _own_part(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return this rank's shard of whole values."""
        flat = torch.zeros(self._size, dtype=self._shard.dtype, device=self._shard.device)
        for (name, parameter), view in zip(self._names(), self._views(flat), strict=True):
            if name in values:  # what no forward uses has no states where they are not divided
                view.copy_(self._shards.part(values[name], parameter))
        return flat[self._own].clone()

    def clear(self) -> None:
        """Forget the gradients."""
        self.finish()
        self._shard.grad = self._home_of_gradient()
        for value in (self._shard.grad, self._gradients):
            if value is not None:
                value.zero_()
        for parameter in self._trained:
            parameter.grad = None
        self._attach()

    def held_gradient_bytes(self) -> float:
        """Return the bytes of gradients that stay from one microbatch to the next."""
        if self._gradients is not None:
            return float(self._gradients.untyped_storage().nbytes())
        return float(self._shard_gradient().untyped_storage().nbytes())

    def _shard_gradient(self) -> Tensor:
        if self._shard.grad is None:
            self._shard.grad = self._home_of_gradient()
        return self._shard.grad

    def _home_of_gradient(self) -> Tensor:
        """Return where the shard's gradient lies: in the whole gradients where those stay, else on its own."""
        if self._gradients is not None:
            return self._gradients[self._own]
        if self._shard.grad is not None:
            return self._shard.grad
        return torch.zeros_like(self._shard, dtype=self._flat.dtype)

    def _attach(self) -> None:
        """Let the parameters' gradients lie in the whole buffer, where there is one."""
        if self._gradients is not None:
            for parameter, view in zip(self._trained, self._views(self._gradients), strict=True):
                parameter.grad = view

    def _unused_parts(self) -> list[slice]:
        """Return the parts of the shard that belong to parameters which never had a gradient."""
        unused = {id(parameter) for parameter in self._used.unused}
        return [part for parameter, _, part in self._placed() if id(parameter) in unused and part.start < part.stop]

    def layout(self, kinds: TensorKinds) -> ShardLayout:
        """Return which tensors lie in the shard."""
        gather = None if self._group is None else self._gather_update
        return ShardLayout(self._placed(), self._own.start, kinds, self._shards, gather)

    def _placed(self) -> tuple[_Placed, ...]:
        placed, offset = [], 0
        for parameter in self._trained:
            begin = offset - self._own.start
            first = max(begin, 0)
            part = slice(first, max(min(begin + parameter.numel(), self._length), first))
            placed.append(_Placed(parameter, offset, part))
            offset += parameter.numel()
        return tuple(placed)

    def _gather_update(self, value: Tensor) -> Tensor:
        """Return the values of all shards in the flat buffer's order; a collective."""
        sent = (self._count - 1) / self._count * self._size * value.element_size()
        self._traffic[UPDATE] = self._traffic.get(UPDATE, 0.0) + sent
        return self._gathered(value)

    def _take_note(self, parameter: Tensor) -> None:
        """Scatter the gradients inside the backward, when they are complete; one that is deferred is not there yet."""
        if parameter.grad is None:
            return
        self._ready.add(id(parameter))
        if len(self._ready) == len(self._trained):
            self._scatter()
            self._early += 1
            self._ready.clear()

    def _names(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, value) for name, value in self._parameters.items() if value.requires_grad]

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the parts of a flat buffer by name, whole where tensor parallelism has split them."""
        return {
            name: self._shards.whole(view, parameter).clone()
            for (name, parameter), view in zip(self._names(), self._views(flat), strict=True)
        }

    def _point_into_flat(self) -> None:
        for parameter, view in zip(self._trained, self._views(self._flat), strict=True):
            view.copy_(parameter.data)
            parameter.data = view

    def _views(self, flat: Tensor) -> list[Tensor]:
        """Return the parts of a flat buffer in the shapes of the parameters."""
        views, offset = [], 0
        for parameter in self._trained:
            views.append(flat[offset : offset + parameter.numel()].view(parameter.shape))
            offset += parameter.numel()
        return views

    def _scatter(self) -> None:
        """Start the reduce-scatter of the gradients that the parameters hold, and take them away."""
        self.land()
        if self._by_microbatch:
            self._scattering.begin(self)
        sum_partial(self._trained, self._shards)
        flat = self._gradients
        if flat is None:
            flat = torch.zeros(self._size, dtype=self._flat.dtype, device=self._flat.device)
            for parameter, view in zip(self._trained, self._views(flat), strict=True):
                if parameter.grad is not None:
                    view.copy_(local_gradient(parameter))
                    parameter.grad = None
        if self._group is None:
            if self._level or self._across is None:
                self._add(flat)
                return
            # Masters are whole on each rank.
            self._flight = (_Works((dist.all_reduce(flat, group=self._across, async_op=True),)), flat, flat)
            self._count_traffic("all-reduce", all_reduce_bytes(flat, self._across))
            return
        if self._is_even:
            mine = flat.new_empty(self._length)
            work = dist.reduce_scatter_tensor(mine, flat, group=self._group, async_op=True)
        else:
            mine = flat[self._own]
            work = _Works(
                dist.reduce(part, owner, group=self._group, async_op=True) for part, owner in self._owned_parts(flat)
            )
        assert work is not None
        self._flight = (work, mine, flat)
        self._count_traffic("reduce-scatter", (self._count - 1) / self._count * self._bytes)

    def land(self) -> None:
        """Wait for the gradients on their way, and add them to the shard's."""
        if self._flight is not None:
            work, mine, _ = self._flight
            work.wait()
            self._flight = None
            self._add(mine)

    def _add(self, value: Tensor) -> None:
        """Add a reduced part to the shard's gradient; whole gradients that lie there give way to their sum."""
        gradient = self._shard_gradient()
        if self._gradients is not None:
            gradient.copy_(value)
        else:
            gradient.add_(value)

    def _gather(self, *, wait: bool) -> dist.Work | _Works | None:
        """Gather all shards into the flat buffer; returns what to wait for when `wait` is not."""
        recurs = self.narrow is not None and not wait
        if self._group is None:
            if self._shard.data_ptr() != self._flat.data_ptr():
                self._flat.copy_(self._shard.detach())
            return None
        shard = self.narrow if recurs else self._shard.detach().to(self._flat.dtype)
        self._count_traffic("all-gather", (self._count - 1) / self._count * self._bytes)
        is_in_place = shard.untyped_storage().data_ptr() == self._flat.untyped_storage().data_ptr()
        if not self._is_even:
            if not is_in_place:
                self._flat[self._own].copy_(shard)
            works = self._broadcast(self._flat)
            if wait:
                works.wait()
            return works
        if is_in_place:
            shard = shard.clone()
        work = dist.all_gather_into_tensor(self._flat, shard, group=self._group, async_op=not wait)
        assert wait or work is not None
        return work

    def _gathered(self, shard: Tensor) -> Tensor:
        if self._group is None:
            return shard
        flat = torch.empty(self._size, dtype=shard.dtype, device=shard.device)
        if self._is_even:
            dist.all_gather_into_tensor(flat, shard, group=self._group)
        else:
            flat[self._own] = shard
            self._broadcast(flat).wait()
        return flat

    def _broadcast(self, flat: Tensor) -> _Works:
        """Start to bring each owner's shard to all others."""
        return _Works(
            dist.broadcast(part, owner, group=self._group, async_op=True) for part, owner in self._owned_parts(flat)
        )

    def _owned_parts(self, flat: Tensor) -> list[tuple[Tensor, int]]:
        """Return the shards of a flat buffer that are not empty, each with the rank that owns it."""
        assert self._group is not None
        return [
            (flat[begin:end], dist.get_global_rank(self._group, place))
            for place, (begin, end) in enumerate(pairwise(self._bounds))
            if begin < end
        ]

    def _count_traffic(self, operation: str, sent_bytes: float) -> None:
        name = f"{operation}/{self._purpose}"
        self._traffic[name] = self._traffic.get(name, 0.0) + sent_bytes
