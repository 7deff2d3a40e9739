"""Splitting a backward pass into input gradients (I) and weight gradients (W).

A linear map y = x A^T + b has, for the gradient g of y,

    I:  dx = g A          W:  dA = g^T x,  db = sum of g

and only I is needed by the stage before. Modules whose weight gradient is worth deferring (linear, convolution, Hugging Face's Conv1D) are given a forward that, while
a `WeightGradientSink` collects, keeps x and g instead of multiplying; the sum over microbatches is then made when W runs,
straight into `.grad`. Any other parameter's gradient is computed by autograd during I: the split is exact for every module,
and complete for those above. A norm's gradient is a sum over what its input gradient reads anyway; deferred it would read
that again and hold it until then. Under autocast linear maps alone are deferred; their operands are kept as they were cast.

Exact: W performs the products that autograd would have performed. Works under checkpointing, with one recomputation, since
what is kept comes from the recomputed forward. Gradient hooks on deferred parameters do not fire. A weight that is no
leaf (a parametrization) is not deferred. Parameters are held by reference, not as saved tensors: whoever changes one
between a forward and its backward (an asynchronous pipeline) must keep the old version itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from stagewright.modeling.autocast import in_autocast_type


@dataclass
class DeferredGradient:
    """The weight gradient of one call of one module, not yet computed."""

    compute: Callable[[Tensor, Tensor], tuple[tuple[Tensor, Tensor], ...]]
    weight: Tensor
    saved: Tensor
    gradient: Tensor

    def accumulate(self) -> None:
        """Add the gradients to the parameters' `.grad`."""
        for parameter, value in self.compute(self.saved, self.gradient):
            _accumulate(parameter, value)


Queue = list[DeferredGradient]


class WeightGradientSink:
    """Where deferred weight gradients go; without a collecting queue they are computed at once."""

    def __init__(self) -> None:
        self.queue: Queue | None = None

    @contextmanager
    def collect(self) -> Iterator[Queue]:
        """Defer the weight gradients of the backward passes within; yields the queue they are put in."""
        outer, self.queue = self.queue, []
        try:
            yield self.queue
        finally:
            self.queue = outer


def run_queue(queue: Queue) -> None:
    """Compute all weight gradients of a queue and empty it, the latest first: its tensors are likeliest in the caches.

    Where a weight is used more than once the order is autograd's, since the rounding of its sum depends on it.
    """
    if len({id(item.weight) for item in queue}) < len(queue):
        queue.reverse()
    with torch.no_grad():
        while queue:
            queue.pop().accumulate()


def defer_weight_gradients(model: nn.Module, sink: WeightGradientSink) -> int:
    """Give the model's linear and convolution modules deferrable forwards; returns how many there are.

    A module that was given a forward of its own before is left as it is.
    """
    count = 0
    for module in model.modules():
        make = _FORWARDS.get(type(module)) or (_conv1d if type(module).__name__ == "Conv1D" else None)
        if make is not None and module._parameters and "forward" not in module.__dict__:
            module.forward = partial(make, module, sink)
            count += 1
    return count


def linear_map(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, sink: WeightGradientSink, *, transposed: bool = False
) -> Tensor:
    """Return x A^T + b, where `transposed` x A + b, with weight gradients that the sink may defer."""
    return _Linear.apply(in_autocast_type(inputs), weight, bias, sink, transposed)


def _linear(module: nn.Linear, sink: WeightGradientSink, input: Tensor) -> Tensor:
    return linear_map(input, module.weight, module.bias, sink)


def _conv1d(module: nn.Module, sink: WeightGradientSink, x: Tensor) -> Tensor:
    """Hugging Face's Conv1D: a linear layer with a transposed weight."""
    return linear_map(x, module.weight, module.bias, sink, transposed=True)


def _convolution(module: nn.Conv2d, sink: WeightGradientSink, input: Tensor) -> Tensor:
    if (
        module.padding_mode != "zeros"
        or isinstance(module.padding, str)
        or torch.is_autocast_enabled(input.device.type)
    ):
        return type(module).forward(module, input)
    return _Convolution.apply(
        input, module.weight, module.bias, sink, module.stride, module.padding, module.dilation, module.groups
    )


# Arguments are named as torch's and transformers' forwards name them, which callers may use.
_FORWARDS: dict[type, Callable[..., Tensor]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
}


def _keep(ctx: FunctionCtx, inputs: Tensor) -> None:
    """Keep a tensor for the backward at once, where hooks look at what is kept.

    `save_for_backward` would show it to them after the forward, but a recomputation ends with the last tensor that it is
    shown: kept first, it is spared the last product, as it is with torch's own layers.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is None:
        ctx.save_for_backward(inputs)
        ctx.packed = None
    else:
        pack, unpack = hooks
        ctx.packed = (unpack, pack(inputs))


def _kept(ctx: FunctionCtx) -> Tensor:
    """Return what `_keep` kept, and let go of it."""
    if ctx.packed is None:
        (inputs,) = ctx.saved_tensors
        return inputs
    (unpack, packed), ctx.packed = ctx.packed, None
    return unpack(packed)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sink: WeightGradientSink,
        transposed: bool,
    ) -> Tensor:
        _keep(ctx, inputs)
        ctx.weight, ctx.bias, ctx.sink, ctx.transposed = weight, bias, sink, transposed
        return _whole(functional.linear(inputs, weight.t() if transposed else weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = _kept(ctx), ctx.weight
        wants_input, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        input_gradient = None
        if wants_input:
            input_gradient = gradient.matmul((weight.t() if ctx.transposed else weight).to(gradient.dtype))
        compute = partial(
            _linear_gradients, weight if wants_weight else None, ctx.bias if wants_bias else None, ctx.transposed
        )
        deferred = _defer(ctx.sink, compute, inputs, gradient, weight, ctx.bias)
        if deferred:
            return input_gradient, None, None, None, None
        found = {id(parameter): value for parameter, value in compute(inputs, gradient)}
        return input_gradient, found.get(id(weight)), found.get(id(ctx.bias)), None, None


def _whole(output: Tensor) -> Tensor:
    """Return an output that may be changed in place, which autograd refuses for a view that such a function made."""
    return torch.ops.aten._unsafe_view.default(output._base, output.shape) if output._is_view() else output


def _linear_gradients(
    weight: Tensor | None, bias: Tensor | None, transposed: bool, inputs: Tensor, gradient: Tensor
) -> tuple[tuple[Tensor, Tensor], ...]:
    rows = gradient.reshape(-1, gradient.shape[-1])
    result = []
    if weight is not None:
        columns = inputs.reshape(-1, inputs.shape[-1])
        result.append((weight, (columns.t().mm(rows) if transposed else rows.t().mm(columns)).to(weight.dtype)))
    if bias is not None:
        result.append((bias, rows.sum(0).to(bias.dtype)))
    return tuple(result)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sink: WeightGradientSink,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
    ) -> Tensor:
        _keep(ctx, inputs)
        ctx.weight, ctx.bias, ctx.sink, ctx.geometry = weight, bias, sink, (stride, padding, dilation, groups)
        return torch.convolution(inputs, weight, bias, stride, padding, dilation, False, (0,) * len(stride), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, mask = _kept(ctx), ctx.weight, ctx.needs_input_grad[:3]
        wanted = (weight if mask[1] else None, ctx.bias if mask[2] else None)
        compute = partial(_convolution_gradients, weight, wanted, ctx.geometry)
        if _defer(ctx.sink, compute, inputs, gradient, weight, ctx.bias):
            mask = (mask[0], False, False)
        found = _convolution_backward(gradient, inputs, weight, ctx.geometry, mask) if any(mask) else (None,) * 3
        return (*found, *(None,) * 5)


Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


def _convolution_backward(
    gradient: Tensor, inputs: Tensor, weight: Tensor, geometry: Geometry, mask: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution_backward.default(
        gradient, inputs, weight, [weight.shape[0]], stride, padding, dilation, False, [0] * len(stride), groups, mask
    )


def _convolution_gradients(
    weight: Tensor, wanted: tuple[Tensor | None, Tensor | None], geometry: Geometry, inputs: Tensor, gradient: Tensor
) -> tuple[tuple[Tensor, Tensor], ...]:
    mask = (False, wanted[0] is not None, wanted[1] is not None)
    # Only its shape matters: the weight itself may be sharded away by now.
    shape_only = weight if weight.untyped_storage().nbytes() else inputs.new_empty(weight.shape)
    values = _convolution_backward(gradient, inputs, shape_only, geometry, mask)[1:]
    return tuple((parameter, value) for parameter, value in zip(wanted, values, strict=True) if parameter is not None)


def _defer(
    sink: WeightGradientSink,
    compute: Callable[[Tensor, Tensor], tuple[tuple[Tensor, Tensor], ...]],
    inputs: Tensor,
    gradient: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> bool:
    """Queue the weight gradient when the sink collects and the parameters are leaves.

    Without the inputs' graph, which would hold what the stage received until then.
    """
    if sink.queue is None or not weight.is_leaf or (bias is not None and not bias.is_leaf):
        return False
    sink.queue.append(DeferredGradient(compute, weight, inputs.detach(), gradient))
    return True


def _accumulate(parameter: Tensor, value: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = value
    else:
        parameter.grad.add_(value)
