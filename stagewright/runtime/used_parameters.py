"""Which parameters of a bucket have ever had a gradient, on any of the ranks that hold them.

torch's optimizers pass over a parameter whose `.grad` is None, so what no forward uses keeps its value whatever the weight
decay. Buffers of gradients are zero there instead of absent; a bucket asks here which of its zeros are no gradients.

A hook at each parameter's accumulation tells: autograd calls it for every parameter that a backward reaches, also where
its gradient is deferred and not there yet. Until all have been seen, the ranks of the group compare what they know once an
iteration, with one byte a parameter; afterwards nothing is asked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class UsedParameters:
    """Takes note of which parameters have had a gradient.

    Parameters
    ----------
    parameters : in the same order on all ranks of `group`.
    group : the ranks that hold the same parameters; None when this rank alone does.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None) -> None:
        self._parameters = tuple(parameters)
        self._group = group
        self._seen: set[int] = set()
        self._unused: tuple[nn.Parameter, ...] = ()
        self._asked: tuple[dist.Work, Tensor] | None = None
        self._hooks: dict[int, RemovableHandle] = {
            id(parameter): parameter.register_post_accumulate_grad_hook(self._take_note)
            for parameter in self._parameters
        }

    @property
    def unused(self) -> tuple[nn.Parameter, ...]:
        """The parameters that had had no gradient on any rank when the ranks compared last; before that, none."""
        return self._unused

    def start(self) -> None:
        """Start to compare, once an iteration; the ranks of the group call it in one order with their reductions."""
        if not self._hooks or self._group is None:
            return
        seen = [id(parameter) in self._seen for parameter in self._parameters]
        told = torch.tensor(seen, dtype=torch.uint8, device=self._parameters[0].device)
        work = dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._asked = (work, told)

    def finish(self) -> None:
        """Wait for what the others know."""
        if self._group is None:
            used = set(self._seen)
        elif self._asked is not None:
            work, told = self._asked
            work.wait()
            self._asked = None
            pairs = zip(self._parameters, told.tolist(), strict=True)
            used = {id(parameter) for parameter, is_used in pairs if is_used}
        else:
            return
        if used:
            self._seen |= used
            self._unused = tuple(parameter for parameter in self._parameters if id(parameter) not in used)
            for key in self._hooks.keys() & used:
                self._hooks.pop(key).remove()

    def _take_note(self, parameter: Tensor) -> None:
        self._seen.add(id(parameter))
