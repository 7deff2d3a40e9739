"""Models with random weights from Hugging Face configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.models.hugging_face import config_path

_TASKS = (
    "CausalLM",
    "Seq2SeqLM",
    "MaskedLM",
    "SpeechSeq2Seq",
    "CTC",
    "ImageTextToText",
    "ImageClassification",
    "AudioClassification",
)


def is_huggingface(reference: str) -> bool:
    """Whether a reference is the path of a Hugging Face configuration, or of its folder, rather than `place:factory`."""
    return config_path(reference).suffix == ".json"


def huggingface_model(reference: str, *, num_layers: int | None = None) -> nn.Module:
    """Return a model with random weights from a configuration file; raises InvalidArgument for an unknown one."""
    try:
        import transformers
    except ImportError as error:
        raise InvalidArgument(
            f"{reference}: Hugging Face models need transformers", field="model", hint="pip install 'stagewright[hf]'"
        ) from error
    path = config_path(reference)
    if not path.is_file():
        raise InvalidArgument(f"{path}: there is no such file", field="model")
    try:
        config = transformers.AutoConfig.from_pretrained(str(path))
    except Exception as error:
        raise InvalidArgument(f"{reference}: not a known Hugging Face configuration: {error}", field="model") from error
    if num_layers is not None and hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = num_layers
    if hasattr(config, "use_cache"):
        config.use_cache = False
    build = _builder(config)
    if build is None:
        raise InvalidArgument(
            f"{reference}: {type(config).__name__} has no model with a loss that is known here",
            field="model",
            hint="name a class under `architectures`, or give module:factory",
        )
    try:
        return build(config)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise InvalidArgument(
            f"{reference}: no model can be built from it: {type(error).__name__}: {error}",
            field="model",
            hint="correct the configuration, or give module:factory",
        ) from error


def _builder(config: Any) -> Callable[[Any], nn.Module] | None:  # noqa: ANN401
    """Return what builds the class that a configuration names, else the one for its first task that has a loss."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)._from_config
    for task in _TASKS:
        automatic = getattr(transformers, f"AutoModelFor{task}")
        if type(config) in automatic._model_mapping:
            return automatic.from_config
    return None
