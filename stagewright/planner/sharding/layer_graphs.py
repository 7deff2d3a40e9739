"""Operator graphs of the layers people shard: a perceptron block, self-attention, a transformer layer."""

from __future__ import annotations

from stagewright.planner.sharding.operator_graph import GraphBuilder, OperatorGraph


def mlp_graph(*, batch: int, sequence: int, hidden: int, ffn: int, element_bytes: float = 2.0) -> OperatorGraph:
    """Return x [b, s, h] -> gelu(x w1) w2, with w1 [h, f] and w2 [f, h]."""
    builder = GraphBuilder({"b": batch, "s": sequence, "h": hidden, "f": ffn}, element_bytes)
    return builder.graph(_mlp(builder, builder.input("x", "b", "s", "h")))


def attention_graph(*, batch: int, sequence: int, hidden: int, heads: int, element_bytes: float = 2.0) -> OperatorGraph:
    """Return self-attention of `heads` heads of hidden / heads features: dimensions n (head), d (feature), t (key)."""
    builder = GraphBuilder(_attention_sizes(batch, sequence, hidden, heads), element_bytes)
    return builder.graph(_attention(builder, builder.input("x", "b", "s", "h")))


def transformer_graph(
    *, batch: int, sequence: int, hidden: int, heads: int, ffn: int, element_bytes: float = 2.0
) -> OperatorGraph:
    """Return a pre-norm transformer layer: x + attention(norm(x)), then y + mlp(norm(y))."""
    builder = GraphBuilder({**_attention_sizes(batch, sequence, hidden, heads), "f": ffn}, element_bytes)
    x = builder.input("x", "b", "s", "h")
    attended = _attention(builder, builder.map("norm1", "rms-norm", [x], whole=("h",)))
    middle = builder.add("middle", [x, attended])
    fed = _mlp(builder, builder.map("norm2", "rms-norm", [middle], whole=("h",)))
    return builder.graph(builder.add("out", [middle, fed]))


def _attention_sizes(batch: int, sequence: int, hidden: int, heads: int) -> dict[str, int]:
    return {"b": batch, "s": sequence, "t": sequence, "h": hidden, "n": heads, "d": hidden // heads}


def _mlp(builder: GraphBuilder, x: str) -> str:
    up = builder.einsum("up", [x, builder.parameter("w1", "h", "f")], "b", "s", "f")
    active = builder.map("active", "gelu", [up])
    return builder.einsum("down", [active, builder.parameter("w2", "f", "h")], "b", "s", "h")


def _attention(builder: GraphBuilder, x: str) -> str:
    parts = {}
    for name in ("q", "k", "v"):
        weight = builder.parameter(f"w{name}", "h", "n", "d")
        parts[name] = builder.einsum(name, [x, weight], "b", "s", "n", "d")
    keys = builder.rename("keys", parts["k"], "b", "t", "n", "d")
    values = builder.rename("values", parts["v"], "b", "t", "n", "d")
    scores = builder.einsum("scores", [parts["q"], keys], "b", "n", "s", "t")
    weights = builder.map("weights", "softmax", [scores], whole=("t",))
    mixed = builder.einsum("mixed", [weights, values], "b", "s", "n", "d")
    return builder.einsum("projected", [mixed, builder.parameter("wo", "n", "d", "h")], "b", "s", "h")
