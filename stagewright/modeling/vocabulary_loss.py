"""The loss on logits that a group has split by the vocabulary: torch's `loss_parallel`, with what it sends counted.

Cross-entropy sums three numbers a token over the group: the maximum, the sum of exponentials, the logit of the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stagewright.modeling.tensor_collectives import TensorGroup

_FORWARDS = (
    torch.ops.aten._log_softmax.default,
    torch.ops.aten.nll_loss_forward.default,
    torch.ops.aten.nll_loss2d_forward.default,
)


@contextmanager
def vocabulary_loss(group: TensorGroup) -> Iterator[None]:
    """Let losses within be computed on split logits as they are, and the group count what that sends."""
    from torch.distributed.tensor import DTensor  # takes a second to import
    from torch.distributed.tensor.parallel import loss_parallel

    with loss_parallel():
        handlers = DTensor._op_dispatcher._custom_op_handlers
        for operator in _FORWARDS:
            handlers[operator] = partial(_counted, handlers[operator], group)
        yield


def _counted(handler: Callable[..., object], group: TensorGroup, *args: object) -> object:
    with _CountedReductions(group):
        return handler(*args)


class _CountedReductions(TorchDispatchMode):
    """Counts the all-reduces within, all of which go over one group."""

    def __init__(self, group: TensorGroup) -> None:
        super().__init__()
        self._group = group

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func in (torch.ops._c10d_functional.all_reduce.default, torch.ops._c10d_functional.all_reduce_.default):
            assert isinstance(args[0], Tensor)
            self._group.count_all_reduce(args[0])
        return func(*args, **(kwargs or {}))
