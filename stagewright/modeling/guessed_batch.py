"""Random batches for models that come without data: what a Hugging Face configuration, or the first layer, asks for.

The inputs are those that the model's class names as its main input: tokens, pixels, a sound's samples or its spectrogram;
a model of text and vision gets both. The targets are those of its task.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from stagewright.modeling.batch import Batch
from stagewright.planner.errors import InvalidArgument

_NUM_CLASSES = 2
_MAX_TOKEN = 32_000
_NUM_CHOICES = 2


def guessed_batch(model: nn.Module, microbatch: int, sequence_length: int) -> Batch:
    """Return random inputs that fit the model's configuration or its first layer; raises InvalidArgument if neither tells."""
    config = getattr(model, "config", None)
    if config is not None:
        for guess in (_text_and_vision, _spectrogram, _sound, _pixels, _text):
            batch = guess(model, config, microbatch, sequence_length)
            if batch is not None:
                return batch
    embedding = next((part for part in model.modules() if isinstance(part, nn.Embedding)), None)
    if embedding is None:
        raise InvalidArgument(
            f"no batch can be guessed for {type(model).__name__}",
            field="data",
            hint="name a data factory that yields batches: --data module:factory",
        )
    tokens = torch.randint(min(embedding.num_embeddings, _MAX_TOKEN), (microbatch, sequence_length))
    return (tokens, tokens.clone())


def _text_and_vision(model: nn.Module, config: Any, microbatch: int, length: int) -> dict[str, Any] | None:  # noqa: ANN401
    """Both towers' inputs; an image's tokens stand first where the text holds them."""
    text, vision = getattr(config, "text_config", None), getattr(config, "vision_config", None)
    if text is None or vision is None:
        return None
    positions = int(getattr(text, "max_position_embeddings", length))
    tokens = torch.randint(int(text.vocab_size), (microbatch, min(length, positions)))
    image_token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    if image_token is not None:
        tokens[tokens == image_token] = 0
        tokens[:, : _num_patches(vision)] = int(image_token)
    batch: dict[str, Any] = {"input_ids": tokens, "pixel_values": _image(vision, microbatch)}
    if _takes(model, "return_loss"):
        batch["return_loss"] = True
    elif _takes(model, "labels"):
        batch["labels"] = tokens.clone()
    return batch


def _spectrogram(model: nn.Module, config: Any, microbatch: int, length: int) -> dict[str, Tensor] | None:  # noqa: ANN401
    """Mel frames: to transcribe (Whisper, Speech2Text), or to classify (AST)."""
    name = getattr(model, "main_input_name", "")
    bins = getattr(config, "num_mel_bins", getattr(config, "input_feat_per_channel", None))
    if name == "input_features" and bins is not None and hasattr(config, "max_target_positions"):
        tokens = torch.randint(int(config.vocab_size), (microbatch, min(length, int(config.max_target_positions))))
        frames = 2 * int(config.max_source_positions)  # the stem of a speech encoder halves them
        mel, time = int(bins), min(frames, 2 * max(length, 1)) if hasattr(config, "conv_channels") else frames
        shape = (microbatch, time, mel) if hasattr(config, "conv_channels") else (microbatch, mel, time)
        return {"input_features": torch.randn(shape), "labels": tokens}
    if name == "input_values" and bins is not None and hasattr(config, "max_length"):
        values = torch.randn(microbatch, int(config.max_length), int(bins))
        return {"input_values": values, "labels": torch.randint(_num_labels(config), (microbatch,))}
    return None


def _sound(model: nn.Module, config: Any, microbatch: int, length: int) -> dict[str, Tensor] | None:  # noqa: ANN401
    """Samples of a sound, as many as the convolutions turn into `length` frames."""
    if getattr(model, "main_input_name", "") != "input_values" or not hasattr(config, "conv_stride"):
        return None
    samples = length
    for stride, kernel in reversed(list(zip(config.conv_stride, config.conv_kernel, strict=True))):
        samples = (samples - 1) * int(stride) + int(kernel)
    values = torch.randn(microbatch, samples)
    if type(model).__name__.endswith("ForCTC"):
        return {
            "input_values": values,
            "labels": torch.randint(1, int(config.vocab_size), (microbatch, max(length // 4, 1))),
        }
    return {"input_values": values, "labels": torch.randint(_num_labels(config), (microbatch,))}


def _pixels(model: nn.Module, config: Any, microbatch: int, length: int) -> dict[str, Tensor] | None:  # noqa: ANN401
    """An image, and its class or, for a model that writes about it, a text."""
    if getattr(model, "main_input_name", "") != "pixel_values":
        return None
    encoder, decoder = getattr(config, "encoder", config), getattr(config, "decoder", None)
    pixels = _image(encoder, microbatch)
    if decoder is not None and hasattr(decoder, "vocab_size"):
        return {"pixel_values": pixels, "labels": torch.randint(int(decoder.vocab_size), (microbatch, length))}
    if not _takes(model, "labels"):
        return {"pixel_values": pixels}
    if type(model).__name__.endswith("ForSemanticSegmentation"):
        return {"pixel_values": pixels, "labels": torch.randint(_num_labels(config), (microbatch, *pixels.shape[2:]))}
    return {"pixel_values": pixels, "labels": torch.randint(_num_labels(config), (microbatch,))}


def _text(model: nn.Module, config: Any, microbatch: int, length: int) -> dict[str, Tensor] | None:  # noqa: ANN401
    """Tokens with the targets of the model's task: of each token, of the sample, or a span's two ends."""
    task = type(model).__name__
    if not hasattr(config, "vocab_size"):
        # A model of characters hashes them: its tokens are code points.
        if getattr(model, "main_input_name", "") != "input_ids":
            return None
        tokens = torch.randint(1, 128, (microbatch, length))
    else:
        tokens = torch.randint(int(config.vocab_size), (microbatch, length))
    if task.endswith("ForMultipleChoice"):
        choices = tokens.unsqueeze(1).expand(-1, _NUM_CHOICES, -1).contiguous()
        return {"input_ids": choices, "labels": torch.randint(_NUM_CHOICES, (microbatch,))}
    if task.endswith(("ForSequenceClassification", "ForNextSentencePrediction")):
        return {"input_ids": tokens, "labels": torch.randint(_num_labels(config), (microbatch,))}
    if task.endswith("ForQuestionAnswering"):
        ends = torch.randint(length, (2, microbatch))
        return {"input_ids": tokens, "start_positions": ends[0], "end_positions": ends[1]}
    if task.endswith("ForTokenClassification"):
        return {"input_ids": tokens, "labels": torch.randint(_num_labels(config), tokens.shape)}
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    for name in ("next_sentence_label", "sentence_order_label"):
        if _takes(model, name):
            batch[name] = torch.randint(2, (microbatch,))
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        batch["decoder_input_ids"] = tokens.clone()
    return batch


def _image(config: Any, microbatch: int) -> Tensor:  # noqa: ANN401
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return torch.randn(microbatch, int(getattr(config, "num_channels", 3)), int(height), int(width))


def _num_patches(config: Any) -> int:  # noqa: ANN401
    size, patch = getattr(config, "image_size", 224), getattr(config, "patch_size", 16)
    sides = size if isinstance(size, (tuple, list)) else (size, size)
    patches = patch if isinstance(patch, (tuple, list)) else (patch, patch)
    return math.prod(int(side) // int(own) for side, own in zip(sides, patches, strict=True))


def _num_labels(config: Any) -> int:  # noqa: ANN401
    return max(int(getattr(config, "num_labels", _NUM_CLASSES)), 1)


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(inspect.unwrap(type(model).forward)).parameters
