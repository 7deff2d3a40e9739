"""Seconds, bytes and traffic of one operator on one device under degrees, from the operator's description.

Tokens of a device are microbatch * sequence / cp. An axis in `split` divides the operator's features (tp, etp, kv, vocab)
or its tokens (sp). Routed experts get k tokens for each token of the layer, spread over all devices of the pipeline
rank whatever ep and etp are, times the imbalance of the busiest device. Tensor parallelism is Megatron's: where a
split region begins (`enters`) and ends (`exits`) there is an all-reduce, or with sequence parallelism an all-gather
and a reduce-scatter of the same bytes (Korthikanti et al. 2022). Gathering a split input once more for the weight
gradient is hidden under the input gradient there, and is neither timed nor counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from stagewright.planner.cost.number import Floats, Number
from stagewright.planner.cost.roofline import Engine, Roofline
from stagewright.planner.documents.operator import Architecture, Axis, Operator
from stagewright.planner.documents.plan import Degrees

WEIGHTED_KINDS = ("matmul", "convolution", "router")
LOGIT_BYTES = 4.0

_INPUT_GRAD_FACTOR: Mapping[str, float] = {"attention": 2.0, "elementwise": 1.5, "norm": 1.5}
_ENGINES: Mapping[str, Engine] = {
    "matmul": "matmul",
    "convolution": "matmul",
    "router": "matmul",
}


@dataclass(frozen=True)
class Setting:
    """One configuration of one device: everything but the operator.

    Parameters
    ----------
    microbatch : samples, or several sizes at once; all that grows with it is then an array.
    sequence_length : of the job; an operator with its own `tokens_per_sample` ignores it.
    element_bytes : bytes of an activation.
    profile_element_bytes : bytes of an activation in the operators' own byte counts.
    operand_bytes : bytes of an operand of a matrix product, where they are narrower (FP8); `element_bytes` when None.
    expert_imbalance : work of the busiest expert device over the mean.
    """

    degrees: Degrees
    microbatch: int | Floats
    sequence_length: int
    element_bytes: float
    architecture: Architecture
    expert_imbalance: float = 1.0
    profile_element_bytes: float = 2.0
    operand_bytes: float | None = None

    @cached_property
    def size_key(self) -> int | tuple[float, ...]:
        """The microbatch, or its sizes, as a key."""
        return self.microbatch if isinstance(self.microbatch, int) else tuple(self.microbatch.tolist())

    @property
    def product_bytes(self) -> float:
        """Bytes of one operand of a matrix product."""
        return self.element_bytes if self.operand_bytes is None else self.operand_bytes

    def divisor(self, axes: Sequence[Axis]) -> float:
        """Return the product of the degrees that `axes` name."""
        if "ep" in axes:
            return self.routed_divisor
        product = 1.0
        for axis in axes:
            product *= self._degree(axis)
        return product

    @property
    def routed_divisor(self) -> float:
        """What divides the tokens of routed experts: tp, whatever their shape; nothing where each device runs whole ones on all."""
        degrees = self.degrees
        return float(degrees.tp if degrees.sp or degrees.expert_split > 1 else 1)

    def _degree(self, axis: Axis) -> int:
        degrees = self.degrees
        match axis:
            case "tp":
                return degrees.tp
            case "sp":
                return degrees.tp if degrees.sp else 1
            case "vocab":
                return degrees.tp if degrees.vocab_parallel else 1
            case "kv":
                return min(degrees.tp, self.architecture.num_kv_heads or degrees.tp)
            case "etp":
                return degrees.etp
            case _:
                return 1

    def length(self, operator: Operator) -> int:
        """Return the tokens of one sample at this operator."""
        return operator.tokens_per_sample or self.sequence_length

    def tokens(self, operator: Operator) -> Number:
        """Return the tokens of one microbatch on one device before any axis but cp divides them."""
        return self.microbatch * self.length(operator) / self.degrees.cp


class Work(NamedTuple):
    """One operator on one device: the size of its forward, what it keeps and writes."""

    flops: Number
    moved_bytes: Number
    kept_bytes: Number
    output_bytes: Number
    num_groups: int


class PhaseSeconds(NamedTuple):
    """Seconds of the forward, the input gradient and the weight gradient."""

    forward: Number
    input_grad: Number
    weight_grad: Number


def positions(operator: Operator, length: float) -> float:
    """Return how many positions a token attends to in the mean: n, (n+1)/2 when causal, fewer in a window."""
    window = operator.window
    if operator.positions == "all":
        return min(length, window) if window else length
    if window is None or window >= length:
        return (length + 1) / 2
    return window - window * (window - 1) / (2 * length)


def work(operator: Operator, setting: Setting) -> Work:
    """Return the size of `operator` on one device."""
    tokens = setting.tokens(operator)
    attended = positions(operator, setting.length(operator))
    routed = "ep" in operator.split
    imbalance = setting.expert_imbalance if routed else 1.0
    share = tokens / setting.divisor(operator.split) * imbalance
    flops = operator.flops_per_token + operator.flops_per_token_per_position * attended
    moved = operator.read_bytes_per_token + operator.read_bytes_per_token_per_position * attended
    kept = operator.kept_bytes_per_token + operator.kept_bytes_per_token_per_position * attended
    kept_axes = operator.split if operator.kept_split is None else operator.kept_split
    scale = setting.element_bytes / setting.profile_element_bytes
    product = _product_bytes(operator, setting, tokens, imbalance)
    return Work(
        flops=share * flops,
        moved_bytes=share * moved * scale + product.moved,
        kept_bytes=tokens * kept * scale / setting.divisor(kept_axes) * (imbalance if "ep" in kept_axes else 1.0),
        output_bytes=product.written,
        num_groups=product.num_groups,
    )


def phase_seconds(operator: Operator, size: Work, roofline: Roofline) -> PhaseSeconds:
    """Return the seconds of each phase; a gradient phase runs its factor's multiple of the forward's FLOP and bytes."""
    engine = _engine(operator)
    input_factor, weight_factor = gradient_factors(operator)

    def seconds(factor: float) -> Number:
        if factor <= 0:
            return 0.0
        return roofline.seconds(engine, size.flops * factor, size.moved_bytes * factor, num_groups=size.num_groups)

    return PhaseSeconds(seconds(1.0), seconds(input_factor), seconds(weight_factor))


def peak_seconds(operator: Operator, flops: Number, roofline: Roofline) -> Number:
    """Return the seconds of `flops` of an operator at the peak of its engine: no kernel is faster."""
    return flops / roofline.peak(_engine(operator))


def _engine(operator: Operator) -> Engine:
    if operator.kind == "attention":
        return "batched" if operator.materialised else "attention"
    return _ENGINES.get(operator.kind, "vector")


def gradient_factors(operator: Operator) -> tuple[float, float]:
    """Return the work of the input and of the weight gradient over the forward's."""
    input_factor = operator.input_grad_factor
    weight_factor = operator.weight_grad_factor
    if input_factor is None:
        input_factor = _INPUT_GRAD_FACTOR.get(operator.kind, 1.0)
    if weight_factor is None:
        weight_factor = 1.0 if operator.kind in WEIGHTED_KINDS else 0.0
    return input_factor, weight_factor


class _Product(NamedTuple):
    moved: Number
    written: Number
    num_groups: int


def _product_bytes(operator: Operator, setting: Setting, tokens: Number, imbalance: float) -> _Product:
    """Return the operand traffic of a product: a column-split one reads a whole input, a row-split one writes a whole
    output (`exits`)."""
    degrees, architecture = setting.degrees, setting.architecture
    groups = 1
    if "ep" in operator.split:
        rows = tokens * max(architecture.experts_per_token, 1) * degrees.etp / setting.routed_divisor * imbalance
        divisor = float(degrees.etp)
        groups = max(1, operator.num_groups // degrees.ep)
    else:
        rows = tokens / setting.divisor([axis for axis in operator.split if axis == "sp"])
        divisor = setting.divisor([axis for axis in operator.split if axis != "sp"])
    element = setting.element_bytes
    written = rows * operator.output_features / (1.0 if operator.exits else divisor)
    written *= LOGIT_BYTES if operator.fp32_output else element
    if operator.kind not in WEIGHTED_KINDS or not operator.inner_features:
        return _Product(0.0, written, groups)
    operand = setting.product_bytes
    weights = operator.inner_features * operator.output_features * groups / divisor * operand
    read = rows * operator.inner_features / (divisor if operator.exits else 1.0) * operand
    return _Product(read + weights + written, written, groups)
