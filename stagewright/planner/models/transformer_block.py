"""The operators of one transformer block: attention, feed-forward or experts, norms and residuals.

Byte counts are for 2-byte activations and 1-byte dropout masks. Two implementations of attention are described:

- fused (FlashAttention, Dao et al. 2022): scores never reach memory, the causal half is skipped, the backward runs the
  forward's products again (five products in place of two), queries, keys, values, output and a statistic are kept;
- materialised (Megatron-LM of 2021 and 2022): all scores are written, soft-maxed, dropped out and kept, 5 a s^2 b bytes.
  With dropout and GELU the block then keeps sbh (34 + 5 a s / h) bytes (Korthikanti et al. 2022, equation 1).

What selective recomputation drops is what is cheap for its bytes: the scores where they are materialised, otherwise the
norms' and the activation function's outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stagewright.planner.documents.operator import Axis, Operator

ELEMENT = 2.0
MASK = 1.0
STATISTIC = 4.0

Level = Literal["selective", "full"]


@dataclass(frozen=True)
class LatentShape:
    """Multi-head latent attention (DeepSeek-V2): low-rank queries and keys-values; query_rank 0 is a full projection."""

    query_rank: int
    kv_rank: int
    nope_size: int
    rope_size: int
    value_size: int


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of an attention; `cross` attends to another sequence, whose projections of keys and values are its own.

    `fused` says that one projection makes queries, keys and values.
    """

    hidden: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    causal: bool = True
    window: int | None = None
    rotary: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    head_norm: Literal["none", "per-head", "whole"] = "none"
    latent: LatentShape | None = None
    materialised: bool = False
    dropout: bool = False
    cross: bool = False
    fused: bool = False
    num_extra_parameters: int = 0

    @property
    def query_features(self) -> int:
        return self.num_heads * self.head_size

    @property
    def kv_features(self) -> int:
        """Features of keys and values together."""
        return 2 * self.num_kv_heads * self.head_size

    @property
    def head_norm_parameters(self) -> int:
        """Parameters of the norms of queries and keys: of one head each, or of all heads."""
        match self.head_norm:
            case "per-head":
                return 2 * self.head_size
            case "whole":
                return self.query_features + self.kv_features // 2
            case _:
                return 0


@dataclass(frozen=True)
class ExpertShape:
    """Routed experts of `size`, of which each token visits `top_k`; shared ones work on every token.

    `fused` experts lie one behind the other in the same tensors.
    """

    num_experts: int
    top_k: int
    size: int
    shared_size: int = 0
    shared_gate: bool = False
    router_bias: bool = False
    biases: bool = False
    fused: bool = False


@dataclass(frozen=True)
class FeedForwardShape:
    """Sizes of a feed-forward layer; gated ones have two up-projections (SwiGLU, GeGLU)."""

    hidden: int
    size: int
    gated: bool
    bias: bool = False
    experts: ExpertShape | None = None


@dataclass(frozen=True)
class BlockShape:
    """One transformer block.

    Parameters
    ----------
    parallel : attention and feed-forward read the same norm and add to the residual together (GPT-J, Falcon).
    norm_parameters : parameters of one norm (h, or 2h with a bias).
    num_norms : norms of the block; 2 usually, 1 when parallel ones share, 4 with norms after each part as well.
    norms_behind : how many of each part's norms stand behind it, in front of its residual (1 of OLMo 2's one and of Gemma 2's two).
    dropout : masks after attention and feed-forward.
    """

    attention: AttentionShape
    feed_forward: FeedForwardShape
    norm_parameters: int
    num_norms: int = 2
    norms_behind: int = 0
    parallel: bool = False
    dropout: bool = False
    cross_attention: AttentionShape | None = None
    tokens_per_sample: int = 0


def block_operators(shape: BlockShape) -> tuple[Operator, ...]:
    """Return the operators of a block in the order of its forward."""
    hidden = shape.attention.hidden
    builder = _Builder(shape)
    operators = [builder.kept_input(hidden)]
    norms_each = 1 if shape.parallel else shape.num_norms // (3 if shape.cross_attention else 2)
    norms_before = norms_each - shape.norms_behind
    operators += builder.norms("attention", norms_before)
    operators += builder.attention("attention", shape.attention)
    operators += builder.norms("attention_post", shape.norms_behind)
    attention_bias = shape.attention.hidden if shape.attention.output_bias else 0
    if not shape.parallel:
        operators.append(builder.residual("attention", keeps=True, parameters=attention_bias))
        attention_bias = 0
    if shape.cross_attention is not None:
        operators += builder.norms("cross", norms_before)
        operators += builder.attention("cross", shape.cross_attention)
        operators += builder.norms("cross_post", shape.norms_behind)
        bias = hidden if shape.cross_attention.output_bias else 0
        operators.append(builder.residual("cross", keeps=True, parameters=bias))
    if not shape.parallel or shape.num_norms > 1:
        operators += builder.norms("feed_forward", norms_before)
    operators += builder.feed_forward(shape.feed_forward)
    operators += builder.norms("feed_forward_post", shape.norms_behind)
    down_bias = hidden if shape.feed_forward.bias and shape.feed_forward.experts is None else 0
    operators.append(builder.residual("block", keeps=False, parameters=attention_bias + down_bias))
    return tuple(operators)


class _Builder:
    """Makes the operators of one block; holds what all of them share."""

    def __init__(self, shape: BlockShape) -> None:
        self._shape = shape
        self._hidden = shape.attention.hidden
        self._tokens = shape.tokens_per_sample
        # Where scores are materialised they are what selective recomputation drops, and only they (Korthikanti et al.).
        self._cheap: Level = "full" if shape.attention.materialised else "selective"

    def kept_input(self, features: int) -> Operator:
        """Return the block's input, which the first norm and the residual need."""
        return self._vector("input", kept=ELEMENT * features, moved=0.0, split=("sp",))

    def norms(self, part: str, count: int) -> list[Operator]:
        """Return `count` norms, which keep a tensor each: in front of a part its input, behind it what the part made."""
        norm = Operator(
            name=f"{part}_norm",
            kind="norm",
            read_bytes_per_token=2 * ELEMENT * self._hidden,
            kept_bytes_per_token=ELEMENT * self._hidden,
            recomputed_by=self._cheap,
            split=("sp",),
            parameters=self._shape.norm_parameters,
            tokens_per_sample=self._tokens,
        )
        return [norm] * count

    def residual(self, part: str, *, keeps: bool, parameters: int) -> Operator:
        """Return bias, dropout and residual addition in one kernel; the last one writes the block's output.

        The bias of a row-split product is added here, once and whole on each device, so its parameters stand here.
        """
        mask = MASK if self._shape.dropout else 0.0
        return self._vector(
            f"{part}_residual",
            moved=(3 * ELEMENT + mask) * self._hidden,
            kept=((ELEMENT if keeps else 0.0) + mask) * self._hidden,
            split=("sp",),
            input_grad_factor=(2 * ELEMENT + mask) / (3 * ELEMENT + mask) if mask else 1.0,
            output=0.0 if keeps else ELEMENT * self._hidden,
            parameters=parameters,
        )

    def attention(self, part: str, shape: AttentionShape) -> list[Operator]:
        """Return projections, rotation, scores and output projection."""
        projections = self._latent(part, shape) if shape.latent is not None else self._projections(part, shape)
        value_features = shape.num_heads * (shape.latent.value_size if shape.latent else shape.head_size)
        return [
            *projections,
            *(self._materialised(part, shape) if shape.materialised else [self._fused(part, shape)]),
            self._matmul(
                f"{part}_output",
                value_features,
                self._hidden,
                split=("tp",),
                exits=True,
                kept=ELEMENT * value_features if shape.materialised else 0.0,
            ),
        ]

    def _projections(self, part: str, shape: AttentionShape) -> list[Operator]:
        queries, kv = shape.query_features, shape.kv_features
        result = [
            self._matmul(
                f"{part}_query",
                self._hidden,
                queries,
                split=("tp",),
                bias=shape.qkv_bias,
                enters=True,
                extra_parameters=shape.num_extra_parameters,
            ),
            # The input is gathered once for queries, keys and values together, so only the first one enters.
            self._matmul(f"{part}_key_value", self._hidden, kv, split=("kv",), bias=shape.qkv_bias),
        ]
        passes = (1 if shape.rotary else 0) + (1 if shape.head_norm != "none" else 0)
        if passes:
            features = queries + kv / 2
            result.append(
                self._vector(
                    f"{part}_rotary",
                    moved=passes * 2 * ELEMENT * features,
                    kept=ELEMENT * features if shape.head_norm != "none" else 0.0,
                    split=("tp",),
                    input_grad_factor=1.0,
                    level=self._cheap,
                )
            )
        return [*result, *self._head_norms(part, shape)]

    def _head_norms(self, part: str, shape: AttentionShape) -> list[Operator]:
        """Return what norms of queries and keys hold and sum; they run with the rotation.

        Norms of single heads are whole on each device, those over all heads are split with them.
        """
        nothing = self._vector(f"{part}_head_norms", moved=0.0, kept=0.0, split=("sp",))
        match shape.head_norm:
            case "per-head":
                norms = {"parameters": shape.head_norm_parameters, "sums_gradients": True}
                return [nothing.model_copy(update=norms)]
            case "whole":
                queries = {"parameters": shape.query_features, "split": ("tp",), "summed_features": 2}
                keys = {"name": f"{part}_key_norm", "parameters": shape.kv_features // 2, "split": ("kv",)}
                return [nothing.model_copy(update=queries), nothing.model_copy(update=keys)]
            case _:
                return []

    def _latent(self, part: str, shape: AttentionShape) -> list[Operator]:
        latent = shape.latent
        assert latent is not None
        query_features = shape.num_heads * (latent.nope_size + latent.rope_size)
        kv_features = shape.num_heads * (latent.nope_size + latent.value_size)
        down = latent.kv_rank + latent.rope_size
        result = []
        if latent.query_rank:
            result += [
                self._matmul(f"{part}_query_down", self._hidden, latent.query_rank, split=("sp",)),
                self._latent_norm(f"{part}_query_norm", latent.query_rank),
                self._matmul(f"{part}_query", latent.query_rank, query_features, split=("tp",), enters=True),
            ]
        else:
            result.append(self._matmul(f"{part}_query", self._hidden, query_features, split=("tp",), enters=True))
        result += [
            self._matmul(f"{part}_key_value_down", self._hidden, down, split=("sp",)),
            self._latent_norm(f"{part}_key_value_norm", latent.kv_rank),
            self._matmul(f"{part}_key_value", latent.kv_rank, kv_features, split=("tp",), enters=True),
            # The part of the keys that all heads share goes round the second projection, and enters by itself.
            self._vector(f"{part}_shared_key", moved=0.0, kept=0.0, split=("tp",)).model_copy(
                update={"inner_features": latent.rope_size, "enters": True}
            ),
            self._vector(
                f"{part}_rotary",
                moved=2 * ELEMENT * shape.num_heads * 2 * latent.rope_size,
                kept=0.0,
                split=("tp",),
                input_grad_factor=1.0,
                level=self._cheap,
            ),
        ]
        return result

    def _latent_norm(self, name: str, features: int) -> Operator:
        return Operator(
            name=name,
            kind="norm",
            read_bytes_per_token=2 * ELEMENT * features,
            kept_bytes_per_token=2 * ELEMENT * features,
            recomputed_by=self._cheap,
            split=("sp",),
            parameters=features,
            tokens_per_sample=self._tokens,
        )

    def _fused(self, part: str, shape: AttentionShape) -> Operator:
        """Return fused attention; its backward runs five products of the forward's two, 2.5 times the work."""
        query_size, value_size = _score_sizes(shape)
        queries, values = shape.num_heads * query_size, shape.num_heads * value_size
        kv = shape.num_kv_heads * (query_size + value_size) if shape.latent is None else queries + values
        return Operator(
            name=f"{part}_scores",
            kind="attention",
            flops_per_token_per_position=2.0 * (queries + values),
            output_features=values,
            read_bytes_per_token=ELEMENT * (queries + kv + values),
            kept_bytes_per_token=ELEMENT * (queries + kv + values) + STATISTIC * shape.num_heads,
            split=("tp",),
            input_grad_factor=2.5,
            positions="causal" if shape.causal else "all",
            window=shape.window,
            kv_features=kv,
            tokens_per_sample=self._tokens,
        )

    def _materialised(self, part: str, shape: AttentionShape) -> list[Operator]:
        """Return the two batched products with their score traffic, and the soft-max with its dropout.

        Forward bytes a score: 2 written by QK', 4 by the soft-max, 5 by the dropout, 2 read by AV. Backward: 2 + 2 for
        the gradient of AV, 5 for the dropout, 6 for the soft-max, 4 for the gradients of Q and K.
        """
        heads, queries, kv = shape.num_heads, shape.query_features, shape.kv_features
        product_bytes = 2 * ELEMENT
        forward_bytes = 2 * ELEMENT + ((2 * ELEMENT + MASK) if shape.dropout else 0.0)
        backward_bytes = 3 * ELEMENT + ((2 * ELEMENT + MASK) if shape.dropout else 0.0)
        kept = ELEMENT + ((ELEMENT + MASK) if shape.dropout else 0.0)
        products = Operator(
            name=f"{part}_scores",
            kind="attention",
            flops_per_token_per_position=4.0 * queries,
            output_features=queries,
            read_bytes_per_token=ELEMENT * (2 * queries + kv),
            read_bytes_per_token_per_position=product_bytes * heads,
            kept_bytes_per_token=ELEMENT * (queries + kv),
            split=("tp",),
            input_grad_factor=2.0,
            kv_features=kv,
            materialised=True,
            window=shape.window,
            tokens_per_sample=self._tokens,
        )
        # Queries, keys and values stay; only the scores' part is run again, but both products are part of it.
        scores = Operator(
            name=f"{part}_softmax",
            kind="elementwise",
            read_bytes_per_token_per_position=forward_bytes * heads,
            kept_bytes_per_token_per_position=kept * heads,
            recomputed_by="selective",
            split=("tp",),
            input_grad_factor=backward_bytes / forward_bytes,
            window=shape.window,
            tokens_per_sample=self._tokens,
        )
        inputs = self._vector(f"{part}_heads", moved=0.0, kept=products.kept_bytes_per_token, split=("tp",))
        return [
            inputs,
            products.model_copy(update={"kept_bytes_per_token": 0.0, "recomputed_by": "selective"}),
            scores,
        ]

    def feed_forward(self, shape: FeedForwardShape) -> list[Operator]:
        """Return the feed-forward layer: dense, or router, dispatch, experts and combine."""
        if shape.experts is None:
            return self._dense_feed_forward("feed_forward", shape.size, gated=shape.gated, bias=shape.bias)
        experts = shape.experts
        result = self._experts(shape, experts)
        if experts.shared_size:
            result += self._dense_feed_forward("shared", experts.shared_size, gated=shape.gated, bias=shape.bias)
            if experts.shared_gate:
                result.append(self._matmul("shared_gate", self._hidden, 1, split=("sp",)))
        return result

    def _dense_feed_forward(self, part: str, size: int, *, gated: bool, bias: bool) -> list[Operator]:
        up = 2 * size if gated else size
        return [
            # Its output is the activation function's input and always kept.
            self._matmul(f"{part}_up", self._hidden, up, split=("tp",), bias=bias, enters=True, kept=ELEMENT * up),
            self._activation(f"{part}_activation", up, size, split=("tp",)),
            self._matmul(f"{part}_down", size, self._hidden, split=("tp",), exits=True),
        ]

    def _activation(self, name: str, up: int, size: int, *, split: tuple[Axis, ...]) -> Operator:
        """Return the activation function; its output is the down-projection's kept input."""
        return Operator(
            name=name,
            kind="elementwise",
            read_bytes_per_token=ELEMENT * (up + size),
            kept_bytes_per_token=ELEMENT * size,
            recomputed_by=self._cheap,
            split=split,
            input_grad_factor=(2 * up + size) / (up + size),
            tokens_per_sample=self._tokens,
        )

    def _experts(self, shape: FeedForwardShape, experts: ExpertShape) -> list[Operator]:
        hidden, size, k, count = self._hidden, experts.size, experts.top_k, experts.num_experts
        up = 2 * size if shape.gated else size
        split: tuple[Axis, ...] = ("ep", "etp")
        router_parameters = hidden * count + (count if experts.router_bias else 0)
        return [
            Operator(
                name="router",
                kind="router",
                flops_per_token=2.0 * hidden * count,
                output_features=count,
                inner_features=hidden,
                kept_bytes_per_token=3 * STATISTIC * count,
                split=("sp",),
                parameters=router_parameters,
                tokens_per_sample=self._tokens,
            ),
            # Permutation to expert order and back: k copies of each token, read and written twice.
            Operator(
                name="dispatch",
                kind="dispatch",
                read_bytes_per_token=2 * 2 * ELEMENT * hidden * k,
                kept_bytes_per_token=2 * ELEMENT * hidden * k,
                output_features=hidden,
                input_grad_factor=1.0,
                split=split,
                tokens_per_sample=self._tokens,
            ),
            self._expert_matmul("experts_up", hidden, up, experts, shape.bias or experts.biases, enters=True),
            self._activation("experts_activation", k * up, k * size, split=split),
            self._expert_matmul("experts_down", size, hidden, experts, shape.bias or experts.biases, exits=True),
        ]

    def _expert_matmul(
        self,
        name: str,
        inner: int,
        output: int,
        experts: ExpertShape,
        bias: bool,
        *,
        enters: bool = False,
        exits: bool = False,
    ) -> Operator:
        each = inner * output + (output if bias else 0)
        return Operator(
            name=name,
            kind="matmul",
            flops_per_token=2.0 * inner * output * experts.top_k,
            output_features=output,
            inner_features=inner,
            # The up-projection's output is kept for the activation function; its input by the dispatch.
            kept_bytes_per_token=ELEMENT * output * experts.top_k if enters else 0.0,
            split=("ep", "etp"),
            parameters=each * experts.num_experts,
            num_groups=experts.num_experts,
            enters=enters,
            exits=exits,
            tokens_per_sample=self._tokens,
        )

    def _matmul(
        self,
        name: str,
        inner: int,
        output: int,
        *,
        split: tuple[Axis, ...],
        bias: bool = False,
        enters: bool = False,
        exits: bool = False,
        kept: float = 0.0,
        extra_parameters: int = 0,
    ) -> Operator:
        return Operator(
            name=name,
            kind="matmul",
            flops_per_token=2.0 * inner * output,
            output_features=output,
            inner_features=inner,
            kept_bytes_per_token=kept,
            split=split,
            parameters=inner * output + (output if bias else 0) + extra_parameters,
            enters=enters,
            exits=exits,
            tokens_per_sample=self._tokens,
        )

    def _vector(
        self,
        name: str,
        *,
        moved: float,
        kept: float,
        split: tuple[Axis, ...],
        input_grad_factor: float | None = None,
        output: float = 0.0,
        level: Level = "full",
        parameters: int = 0,
    ) -> Operator:
        return Operator(
            name=name,
            kind="elementwise",
            read_bytes_per_token=moved,
            kept_bytes_per_token=kept,
            recomputed_by=level,
            split=split,
            input_grad_factor=input_grad_factor,
            output_bytes_per_token=output,
            parameters=parameters,
            tokens_per_sample=self._tokens,
        )


def _score_sizes(shape: AttentionShape) -> tuple[int, int]:
    """Return the sizes of a query and of a value head."""
    if shape.latent is None:
        return shape.head_size, shape.head_size
    return shape.latent.nope_size + shape.latent.rope_size, shape.latent.value_size
