"""ZeRO: optimizer states, gradients and parameters of a bucket divided over the ranks that hold it.

All parameters of the bucket lie one behind the other in one flat buffer, padded to n equal shards; rank i owns shard i,
with the only copy of its optimizer states (and of its fp32 master weights when the parameters are narrower).

    stage 1   gradients accumulate whole; one reduce-scatter each iteration; step on the shard; one all-gather
    stage 2   a reduce-scatter after each microbatch, summed into the shard's gradient; the rest as stage 1
    stage 3   as stage 2, and the flat buffer exists only between UNSHARD (an all-gather) and RESHARD

With fewer shards than ranks (HSDP, MiCS, the replicas of a bidirectional pipeline) the shards' gradients are all-reduced over the ranks that own the same one.
Elementwise optimizers step exactly as on whole parameters.

Papers: Rajbhandari et al., ZeRO, SC 2020; Zhao et al., PyTorch FSDP, VLDB 2023; Zhang et al., MiCS, VLDB 2022.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stagewright.modeling.tensor_parallel import TensorShards
from stagewright.runtime.reduction import StageKey, Traffic, local_gradient, squared_norm, sum_partial


class ShardedBucket:
    """Parameters whose states are divided over a group.

    Parameters
    ----------
    parameters : by name in the model; all of one dtype.
    group : the ranks over which the bucket is divided; None for no division (master weights only).
    across : the ranks that own the same shard in other groups; None when there are none.
    holders : (replica, stage) of this rank's stages that use the parameters.
    level : ZeRO stage.
    traffic : counts bytes sent by ring algorithms.
    shards : how tensor parallelism has split the parameters.
    purpose : `dp` or `tied`, in the names of the traffic.
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
        shards: TensorShards | None = None,
    ) -> None:
        self.holders = holders
        self._parameters = dict(parameters)
        self._trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
        self._group = group
        self._across = across
        self._level = level
        self._traffic = traffic
        self._purpose = purpose
        self._by_microbatch = level >= 2
        self._shards = shards or TensorShards()
        self._count = 1 if group is None else group.size()
        self._index = index = 0 if group is None else dist.get_group_rank(group, dist.get_rank())
        total = sum(parameter.numel() for parameter in self._trained)
        self._length = -(-total // self._count)
        self._flat = self._trained[0].data.new_zeros(self._length * self._count)
        self._bytes = self._flat.numel() * self._flat.element_size()
        self._point_into_flat()
        own = self._flat[index * self._length : (index + 1) * self._length]
        master = torch.float32 if own.element_size() < 4 else own.dtype
        self._shard = nn.Parameter(own.detach().to(master, copy=True))
        self._flight: tuple[dist.Work, Tensor, Tensor] | None = None
        self._is_whole = True
        if level >= 3:
            self.reshard()

    def before_forward(self, microbatch: int) -> None:
        """Do nothing: one version of the weights serves the whole iteration."""

    def before_step(self, microbatch: int) -> None:
        """Do nothing: the gradients are where the optimizer looks."""

    def arm(self) -> None:
        """Do nothing: `start` reduces what the microbatches left."""

    def start(self) -> None:
        """Start to reduce what is left to reduce, and sum over the groups."""
        if not self._by_microbatch:
            self._scatter()
        self._land()
        if self._across is not None:
            assert self._shard.grad is not None
            members = self._across.size()
            dist.all_reduce(self._shard.grad, group=self._across)
            self._count_traffic("all-reduce", 2 * (members - 1) / members * self._bytes / self._count)

    def finish(self) -> None:
        """Wait for the reduction under way."""
        self._land()

    def after_microbatch(self) -> None:
        """Reduce one unit's gradients, at ZeRO stages 2 and 3."""
        if self._by_microbatch:
            self._scatter()

    def unshard(self) -> None:
        """Gather the parameters, at ZeRO stage 3."""
        if self._is_whole:
            return
        self._flat.untyped_storage().resize_(self._bytes)
        self._gather()
        self._is_whole = True

    def reshard(self) -> None:
        """Free the gathered parameters, at ZeRO stage 3."""
        if self._level >= 3 and self._is_whole and self._count > 1:
            self._flat.untyped_storage().resize_(0)
            self._is_whole = False

    def optimized(self) -> list[nn.Parameter]:
        """Return the shard."""
        return [self._shard]

    def squared_norm(self) -> Tensor:
        """Return this rank's share of the squared norm: that of its shard, which equal owners share."""
        shard = torch.zeros_like(self._shard) if self._shard.grad is None else self._shard.grad
        flat = torch.zeros(self._length * self._count, dtype=shard.dtype, device=shard.device)
        flat[self._index * self._length : (self._index + 1) * self._length] = shard
        owners = 1 if self._across is None else self._across.size()
        return squared_norm(zip(self._trained, self._views(flat), strict=True), self._shards) / owners

    def after_step(self) -> None:
        """Gather the stepped shards; at ZeRO stage 3 the next UNSHARD does."""
        if self._is_whole:
            self._gather()

    def gradients(self) -> dict[str, Tensor]:
        """Return the summed gradients by name, gathered from all shards."""
        shard = torch.zeros_like(self._shard) if self._shard.grad is None else self._shard.grad
        flat = self._gathered(shard.to(self._flat.dtype))
        return self._named(flat)

    def values(self) -> dict[str, Tensor]:
        """Return copies of the trainable parameters by name, gathered from all shards."""
        return self._named(self._gathered(self._shard.detach()))

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set the trainable parameters."""
        flat = self._flat.new_zeros(self._length * self._count, dtype=self._shard.dtype)
        for (name, parameter), view in zip(self._names(), self._views(flat), strict=True):
            view.copy_(self._shards.part(values[name], parameter))
        with torch.no_grad():
            self._shard.copy_(flat[self._index * self._length : (self._index + 1) * self._length])
            if self._is_whole:
                self._flat.copy_(flat)

    def states(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
        """Return copies of the optimizer's states by key and name, gathered from all shards."""
        result: dict[str, dict[str, Tensor]] = {}
        for key, value in optimizer.state.get(self._shard, {}).items():
            if isinstance(value, Tensor) and value.dim():
                result[key] = self._named(self._gathered(value))
            elif isinstance(value, Tensor):
                result[key] = {name: value.clone() for name, _ in self._names()}
        return result

    def load_states(self, optimizer: torch.optim.Optimizer, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Set the optimizer's states."""
        state: dict[str, Tensor] = {}
        for key, found in values.items():
            one = next(found[name] for name, _ in self._names())
            state[key] = self._own_part(found) if one.dim() else one.clone()
        optimizer.state[self._shard] = state

    def _own_part(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return this rank's shard of whole values."""
        flat = torch.zeros(self._length * self._count, dtype=self._shard.dtype, device=self._shard.device)
        for (name, parameter), view in zip(self._names(), self._views(flat), strict=True):
            view.copy_(self._shards.part(values[name], parameter))
        return flat[self._index * self._length : (self._index + 1) * self._length].clone()

    def clear(self) -> None:
        """Forget the gradients."""
        self._land()
        self._shard.grad = None
        for parameter in self._trained:
            parameter.grad = None

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
        self._land()
        sum_partial(self._trained, self._shards)
        flat = torch.zeros(self._length * self._count, dtype=self._flat.dtype, device=self._flat.device)
        for parameter, view in zip(self._trained, self._views(flat), strict=True):
            if parameter.grad is not None:
                view.copy_(local_gradient(parameter))
                parameter.grad = None
        if self._group is None:
            self._add(flat)
            return
        mine = flat.new_empty(self._length)
        work = dist.reduce_scatter_tensor(mine, flat, group=self._group, async_op=True)
        assert work is not None
        self._flight = (work, mine, flat)
        self._count_traffic("reduce-scatter", (self._count - 1) / self._count * self._bytes)

    def _land(self) -> None:
        if self._flight is not None:
            work, mine, _ = self._flight
            work.wait()
            self._flight = None
            self._add(mine)

    def _add(self, value: Tensor) -> None:
        value = value.to(self._shard.dtype)
        self._shard.grad = value if self._shard.grad is None else self._shard.grad.add_(value)

    def _gather(self) -> None:
        shard = self._shard.detach().to(self._flat.dtype)
        if self._group is None:
            self._flat.copy_(shard)
            return
        dist.all_gather_into_tensor(self._flat, shard, group=self._group)
        self._count_traffic("all-gather", (self._count - 1) / self._count * self._bytes)

    def _gathered(self, shard: Tensor) -> Tensor:
        if self._group is None:
            return shard
        flat = torch.empty(self._length * self._count, dtype=shard.dtype, device=shard.device)
        dist.all_gather_into_tensor(flat, shard, group=self._group)
        return flat

    def _count_traffic(self, operation: str, sent_bytes: float) -> None:
        name = f"{operation}/{self._purpose}"
        self._traffic[name] = self._traffic.get(name, 0.0) + sent_bytes
