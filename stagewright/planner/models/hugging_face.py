"""A Hugging Face config.json as an analytic model profile: no weights, no network, no torch."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path

from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.errors import InvalidDocument
from stagewright.planner.models.config_fields import ConfigFields
from stagewright.planner.models.decoders import DECODERS, decoder_shape
from stagewright.planner.models.encoder_decoder import t5_profile
from stagewright.planner.models.vision import vision_language_profile, vit_profile

_GRAPHS: Mapping[str, Callable[[ConfigFields, str], ModelProfile]] = {
    "llava": vision_language_profile,
    "mt5": t5_profile,
    "t5": t5_profile,
    "vit": vit_profile,
}

MODEL_TYPES = tuple(sorted({*DECODERS, *_GRAPHS}))


def config_path(reference: str) -> Path:
    """Return the path of a configuration that is given by its own path or by that of its folder."""
    path = Path(reference)
    return path / "config.json" if path.is_dir() else path


def config_name(path: Path) -> str:
    """Return the name of a model by its configuration's path: a file called config.json is named after its folder."""
    return (path.resolve().parent.name if path.name == "config.json" else path.stem) or "model"


def is_config(value: object) -> bool:
    """Return whether parsed JSON looks like a Hugging Face config."""
    return isinstance(value, Mapping) and "model_type" in value


def profile_from_config(config: object, name: str, *, source: str = "config") -> ModelProfile:
    """Return the profile of a parsed config; raises InvalidDocument naming the field, its value and the way out."""
    if not isinstance(config, Mapping):
        raise InvalidDocument(f"{source}: a config is a JSON object, this is a {type(config).__name__}")
    fields = ConfigFields(config, source)
    kind = fields.text("model_type")
    if kind in _GRAPHS:
        return _GRAPHS[kind](fields, name)
    if kind not in DECODERS:
        nearest = difflib.get_close_matches(kind, MODEL_TYPES, n=1, cutoff=0.5)
        raise InvalidDocument(
            f"{source}: model_type is {kind!r}, which is not known"
            if kind
            else f"{source}: the config has no model_type",
            field="model_type",
            hint=(f"did you mean {nearest[0]}? " if nearest else "")
            + f"known: {', '.join(MODEL_TYPES)}; for another model give a profile or module:factory",
        )
    return decoder_shape(fields).profile(name)
