"""Vision transformers, and a vision tower in front of a language model.

A tower sees a fixed number of patches a sample, whatever the job's sequence length. The language model's sequence length
counts the image tokens that the projector puts among the text, as training code does. The two inputs join in one layer,
so the model is a graph: tower and text embedding are parallel branches.
"""

from __future__ import annotations

from dataclasses import dataclass

from stagewright.planner.documents.operator import Architecture, Operator
from stagewright.planner.documents.profile import LayerClass, LayerRun, ModelProfile
from stagewright.planner.errors import InvalidDocument
from stagewright.planner.models.config_fields import ConfigFields
from stagewright.planner.models.decoders import DECODERS, decoder_shape
from stagewright.planner.models.language_model import chain_edges, layer_class, norm_class
from stagewright.planner.models.transformer_block import (
    ELEMENT,
    AttentionShape,
    BlockShape,
    FeedForwardShape,
    block_operators,
)


@dataclass(frozen=True)
class TowerShape:
    """A vision transformer: patches, blocks, what stands round them.

    Parameters
    ----------
    num_tokens : patches and, where there is one, the class token.
    """

    hidden: int
    num_layers: int
    num_heads: int
    ffn_size: int
    patch_size: int
    num_channels: int
    num_tokens: int
    class_token: bool
    patch_bias: bool
    pre_norm: bool

    @property
    def num_patches(self) -> int:
        return self.num_tokens - (1 if self.class_token else 0)


def tower_shape(fields: ConfigFields, *, clip: bool) -> TowerShape:
    """Return the sizes of a ViT or of a CLIP vision tower."""
    hidden = fields.size("hidden_size", default=768)
    image = fields.size("image_size", default=224)
    patch = fields.size("patch_size", default=16)
    side = fields.require_divides("image_size", image, "patch_size", patch)
    heads = fields.size("num_attention_heads", default=12)
    fields.require_divides("hidden_size", hidden, "num_attention_heads", heads)
    return TowerShape(
        hidden=hidden,
        num_layers=fields.size("num_hidden_layers", default=12),
        num_heads=heads,
        ffn_size=fields.size("intermediate_size", default=4 * hidden),
        patch_size=patch,
        num_channels=fields.size("num_channels", default=3),
        num_tokens=side * side + 1,
        class_token=True,
        patch_bias=not clip,
        pre_norm=clip,
    )


def patch_class(shape: TowerShape) -> LayerClass:
    """Return the patch embedding: one product for each patch, class token, positions."""
    pixels = shape.num_channels * shape.patch_size**2
    bias = shape.hidden if shape.patch_bias else 0
    extra = (shape.num_tokens + (1 if shape.class_token else 0)) * shape.hidden
    norm = 2 * shape.hidden if shape.pre_norm else 0
    return layer_class(
        "embedding",
        [
            Operator(
                name="patches",
                kind="matmul",
                flops_per_token=2.0 * pixels * shape.hidden,
                inner_features=pixels,
                output_features=shape.hidden,
                kept_bytes_per_token=ELEMENT * pixels,
                input_grad_factor=0.0,
                parameters=pixels * shape.hidden + bias,
                tokens_per_sample=shape.num_tokens,
            ),
            Operator(
                name="positions",
                kind="elementwise",
                read_bytes_per_token=2 * ELEMENT * shape.hidden,
                input_grad_factor=1.0,
                split=("sp",),
                parameters=extra + norm,
                output_bytes_per_token=ELEMENT * shape.hidden,
                tokens_per_sample=shape.num_tokens,
            ),
        ],
    )


def tower_block(shape: TowerShape) -> LayerClass:
    """Return one block of the tower."""
    head_size = shape.hidden // shape.num_heads
    return layer_class(
        "block",
        block_operators(
            BlockShape(
                attention=AttentionShape(
                    shape.hidden,
                    shape.num_heads,
                    shape.num_heads,
                    head_size,
                    causal=False,
                    rotary=False,
                    qkv_bias=True,
                    output_bias=True,
                ),
                feed_forward=FeedForwardShape(shape.hidden, shape.ffn_size, gated=False, bias=True),
                norm_parameters=2 * shape.hidden,
                tokens_per_sample=shape.num_tokens,
            )
        ),
    )


def vit_profile(fields: ConfigFields, name: str) -> ModelProfile:
    """Return the profile of an image classifier: tower, norm, head on the class token."""
    shape = tower_shape(fields, clip=False)
    labels = fields.count("num_labels", default=0) or 1000
    head = layer_class(
        "head",
        [
            Operator(
                name="classifier",
                kind="matmul",
                flops_per_token=2.0 * shape.hidden * labels,
                inner_features=shape.hidden,
                output_features=labels,
                kept_bytes_per_token=ELEMENT * shape.hidden,
                parameters=shape.hidden * labels + labels,
                output_bytes_per_token=ELEMENT * labels,
                tokens_per_sample=1,
            )
        ],
    )
    return ModelProfile(
        name=name,
        dtype="bf16",
        layers=(
            LayerRun(name="patches", layer_class="patches"),
            LayerRun(name="blocks.{}", layer_class="block", count=shape.num_layers),
            LayerRun(name="norm", layer_class="norm"),
            LayerRun(name="head", layer_class="head"),
        ),
        classes={
            "patches": patch_class(shape),
            "block": tower_block(shape),
            "norm": norm_class(shape.hidden, 2 * shape.hidden, tokens_per_sample=shape.num_tokens),
            "head": head,
        },
        architecture=Architecture(
            family="vision",
            hidden_size=shape.hidden,
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_heads,
            head_size=shape.hidden // shape.num_heads,
            ffn_size=shape.ffn_size,
            max_sequence_length=shape.num_tokens,
        ),
    )


def vision_language_profile(fields: ConfigFields, name: str) -> ModelProfile:
    """Return the profile of a LLaVA: CLIP tower and two-layer projector beside the text embedding, then the decoder."""
    tower = tower_shape(fields.part("vision_config"), clip=True)
    text = fields.part("text_config")
    if text.text("model_type") not in DECODERS:
        raise InvalidDocument(
            f"{fields.source}: text_config.model_type is {text.text('model_type')!r}",
            field="text_config.model_type",
            hint=f"known: {', '.join(sorted(DECODERS))}",
        )
    decoder = decoder_shape(text)
    language = decoder.profile(name)
    hidden = decoder.runs[0].shape.attention.hidden
    used_layers = _used_layers(fields, tower.num_layers)
    classes = {
        "patches": patch_class(tower),
        "tower_block": tower_block(tower),
        "projector": _projector(tower, hidden, tower.num_layers - used_layers),
        "merge": _merge(hidden),
        **language.classes,
    }
    runs = [
        LayerRun(name="patches", layer_class="patches"),
        LayerRun(name="tower.{}", layer_class="tower_block", count=used_layers),
        LayerRun(name="projector", layer_class="projector"),
        language.layers[0],
        LayerRun(name="merge", layer_class="merge"),
        *language.layers[1:],
    ]
    tower_names = ["patches", *(f"tower.{index}" for index in range(used_layers)), "projector", "merge"]
    text_names = ["embedding", "merge", *language.layer_names[1:]]
    architecture = language.architecture
    assert architecture is not None
    return ModelProfile(
        name=name,
        dtype="bf16",
        layers=tuple(runs),
        classes=classes,
        edges=(*chain_edges(tower_names), *chain_edges(text_names)),
        tied=language.tied,
        architecture=architecture.model_copy(update={"family": "vision-language"}),
    )


def _used_layers(fields: ConfigFields, num_layers: int) -> int:
    """Return the blocks that the chosen feature layer needs (-2: all but the last)."""
    value = fields.values.get("vision_feature_layer", -2)
    if not isinstance(value, int) or isinstance(value, bool) or not -num_layers <= value < num_layers:
        raise InvalidDocument(
            f"{fields.source}: vision_feature_layer is {value!r}, the tower has {num_layers} layers",
            field="vision_feature_layer",
        )
    return num_layers + 1 + value if value < 0 else value


def _projector(tower: TowerShape, hidden: int, unused_blocks: int) -> LayerClass:
    """Return the projector; blocks behind the feature layer and the last norm hold parameters but do no work."""
    patches = tower.num_patches

    def linear(name: str, inner: int, output: float) -> Operator:
        return Operator(
            name=name,
            kind="matmul",
            flops_per_token=2.0 * inner * hidden,
            inner_features=inner,
            output_features=hidden,
            kept_bytes_per_token=ELEMENT * inner,
            parameters=inner * hidden + hidden,
            output_bytes_per_token=output,
            tokens_per_sample=patches,
        )

    activation = Operator(
        name="activation",
        kind="elementwise",
        read_bytes_per_token=2 * ELEMENT * hidden,
        kept_bytes_per_token=ELEMENT * hidden,
        tokens_per_sample=patches,
    )
    unused = Operator(
        name="unused_tower",
        kind="elementwise",
        parameters=unused_blocks * tower_block(tower).parameters + 2 * tower.hidden,
        tokens_per_sample=patches,
    )
    operators = [unused, linear("first", tower.hidden, 0.0), activation, linear("second", hidden, ELEMENT * hidden)]
    return layer_class("other", operators)


def _merge(hidden: int) -> LayerClass:
    return layer_class(
        "other",
        [
            Operator(
                name="scatter",
                kind="elementwise",
                read_bytes_per_token=2 * ELEMENT * hidden,
                input_grad_factor=1.0,
                split=("sp",),
                output_bytes_per_token=ELEMENT * hidden,
            )
        ],
    )
