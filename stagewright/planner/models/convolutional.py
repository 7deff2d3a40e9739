"""Convolutional networks from layer tables: VGG, AlexNet, ResNet.

A row of a table is one layer of the profile: a convolution with what follows it, a pooling, a residual block, a fully
connected layer. Sizes are per sample (one token a sample). Kept for the backward: each convolution's input, each
batch norm's input, each ReLU's output where the next layer does not keep it anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from stagewright.planner.documents.operator import Architecture, Operator
from stagewright.planner.documents.profile import LayerClass, LayerRun, ModelProfile
from stagewright.planner.models.language_model import layer_class
from stagewright.planner.models.transformer_block import ELEMENT


@dataclass(frozen=True)
class Picture:
    """A tensor of channels x side x side."""

    channels: int
    side: int

    @property
    def size(self) -> int:
        return self.channels * self.side**2


@dataclass
class LayerTable:
    """Layers of a network in order, grown row by row from the picture that enters.

    `rows` holds (name, kind, operators) of each finished layer.
    """

    picture: Picture
    rows: list[tuple[str, Literal["convolution", "pooling", "head", "block"], list[Operator]]] = field(
        default_factory=list
    )

    def convolution(
        self, name: str, channels: int, kernel: int, *, stride: int = 1, padding: int, norm: bool = False, pool: int = 0
    ) -> None:
        """Append a convolution with ReLU, with a batch norm and a pooling (window 3) where told."""
        operators = _convolution(self.picture, name, channels, kernel, stride, padding, norm=norm, relu=True)
        self.picture = Picture(channels, _side(self.picture.side, kernel, stride, padding))
        if pool:
            self.picture = Picture(channels, _side(self.picture.side, 3, pool, 1 if norm else 0))
        self._finish(name, "convolution", operators)

    def pooling(self, name: str, window: int, stride: int) -> None:
        """Append a max pooling."""
        before = self.picture
        self.picture = Picture(before.channels, _side(before.side, window, stride, 0))
        self._finish(name, "pooling", [_vector("max", moved=before.size + self.picture.size, kept=self.picture.size)])

    def average(self, name: str, side: int) -> None:
        """Append an adaptive average pooling to side x side."""
        before = self.picture
        self.picture = Picture(before.channels, side)
        self._finish(name, "pooling", [_vector("mean", moved=before.size + self.picture.size, kept=0)])

    def bottleneck(self, name: str, channels: int, stride: int, *, expansion: int) -> None:
        """Append a residual block: 1x1, 3x3, 1x1 (expansion 4), or 3x3, 3x3 (expansion 1)."""
        before, picture = self.picture, self.picture
        operators: list[Operator] = []
        sizes = [(1, 1), (3, stride), (1, 1)] if expansion > 1 else [(3, stride), (3, 1)]
        for index, (kernel, step) in enumerate(sizes):
            last = index == len(sizes) - 1
            output = channels * (expansion if last else 1)
            part = f"convolution_{index + 1}"
            operators += _convolution(picture, part, output, kernel, step, kernel // 2, norm=True, relu=not last)
            picture = Picture(output, _side(picture.side, kernel, step, kernel // 2))
        if before.channels != picture.channels or stride > 1:
            operators += _convolution(before, "shortcut", picture.channels, 1, stride, 0, norm=True, relu=False)
        operators.append(_vector("addition", moved=3 * picture.size, kept=picture.size))
        self.picture = picture
        self._finish(name, "block", operators)

    def linear(self, name: str, features: int, *, relu: bool) -> None:
        """Append a fully connected layer."""
        inner = self.picture.size
        operators = [
            Operator(
                name="product",
                kind="matmul",
                flops_per_token=2.0 * inner * features,
                inner_features=inner,
                output_features=features,
                kept_bytes_per_token=ELEMENT * inner,
                parameters=inner * features + features,
                tokens_per_sample=1,
            )
        ]
        if relu:
            # ReLU and dropout: the output and a mask.
            operators.append(_vector("relu", moved=2 * features, kept=1.5 * features))
        self.picture = Picture(features, 1)
        self._finish(name, "convolution" if relu else "head", operators)

    def _finish(
        self, name: str, kind: Literal["convolution", "pooling", "head", "block"], operators: list[Operator]
    ) -> None:
        output = operators[-1].model_copy(update={"output_bytes_per_token": ELEMENT * self.picture.size})
        self.rows.append((name, kind, [*operators[:-1], output]))


def cnn_profile(name: str, table: LayerTable) -> ModelProfile:
    """Return the profile of a finished layer table."""
    classes: dict[str, LayerClass] = {row: layer_class(kind, operators) for row, kind, operators in table.rows}
    return ModelProfile(
        name=name,
        dtype="bf16",
        layers=tuple(LayerRun(name=row, layer_class=row) for row, _, _ in table.rows),
        classes=classes,
        architecture=Architecture(family="cnn", num_layers=len(table.rows)),
    )


def vgg(name: str, stages: Sequence[int], *, image: int = 224, num_labels: int = 1000) -> ModelProfile:
    """Return a VGG (Simonyan and Zisserman 2015): stages of 3x3 convolutions of 64 to 512 channels, three linear layers."""
    table = LayerTable(Picture(3, image))
    for stage, (count, channels) in enumerate(zip(stages, (64, 128, 256, 512, 512), strict=True), start=1):
        for index in range(count):
            table.convolution(f"conv{stage}_{index + 1}", channels, 3, padding=1)
        table.pooling(f"pool{stage}", 2, 2)
    table.linear("fc6", 4096, relu=True)
    table.linear("fc7", 4096, relu=True)
    table.linear("fc8", num_labels, relu=False)
    return cnn_profile(name, table)


def resnet(
    name: str, stages: Sequence[int], *, expansion: int, image: int = 224, num_labels: int = 1000
) -> ModelProfile:
    """Return a ResNet (He et al. 2016): residual blocks of 64 to 512 channels times the expansion."""
    table = LayerTable(Picture(3, image))
    table.convolution("stem", 64, 7, stride=2, padding=3, norm=True, pool=2)
    for stage, (count, channels) in enumerate(zip(stages, (64, 128, 256, 512), strict=True), start=1):
        for index in range(count):
            stride = 2 if stage > 1 and index == 0 else 1
            table.bottleneck(f"stage{stage}_{index + 1}", channels, stride, expansion=expansion)
    table.average("pool", 1)
    table.linear("fc", num_labels, relu=False)
    return cnn_profile(name, table)


def alexnet(name: str, *, image: int = 224, num_labels: int = 1000) -> ModelProfile:
    """Return AlexNet in its one-tower form (Krizhevsky 2014)."""
    table = LayerTable(Picture(3, image))
    table.convolution("conv1", 64, 11, stride=4, padding=2)
    table.pooling("pool1", 3, 2)
    table.convolution("conv2", 192, 5, padding=2)
    table.pooling("pool2", 3, 2)
    table.convolution("conv3", 384, 3, padding=1)
    table.convolution("conv4", 256, 3, padding=1)
    table.convolution("conv5", 256, 3, padding=1)
    table.pooling("pool5", 3, 2)
    table.linear("fc6", 4096, relu=True)
    table.linear("fc7", 4096, relu=True)
    table.linear("fc8", num_labels, relu=False)
    return cnn_profile(name, table)


def _convolution(
    picture: Picture, name: str, channels: int, kernel: int, stride: int, padding: int, *, norm: bool, relu: bool
) -> list[Operator]:
    side = _side(picture.side, kernel, stride, padding)
    output = channels * side**2
    weights = picture.channels * channels * kernel**2
    operators = [
        Operator(
            name=name,
            kind="convolution",
            flops_per_token=2.0 * weights * side**2,
            read_bytes_per_token=ELEMENT * (picture.size + output),
            kept_bytes_per_token=ELEMENT * picture.size,
            parameters=weights + (0 if norm else channels),
            tokens_per_sample=1,
        )
    ]
    if norm:
        operators.append(
            Operator(
                name=f"{name}_norm",
                kind="norm",
                # Statistics need one pass more than a layer norm's row.
                read_bytes_per_token=3 * ELEMENT * output,
                kept_bytes_per_token=ELEMENT * output,
                parameters=2 * channels,
                tokens_per_sample=1,
            )
        )
    if relu:
        operators.append(_vector(f"{name}_relu", moved=2 * output, kept=0))
    return operators


def _vector(name: str, *, moved: float, kept: float) -> Operator:
    return Operator(
        name=name,
        kind="elementwise",
        read_bytes_per_token=ELEMENT * moved,
        kept_bytes_per_token=ELEMENT * kept,
        tokens_per_sample=1,
    )


def _side(side: int, kernel: int, stride: int, padding: int) -> int:
    return (side + 2 * padding - kernel) // stride + 1
