"""Models by catalogue name, from a Hugging Face config.json, or from a profile document.

An entry holds the config as published (or the sizes of a builder), where it comes from, and the published number of
parameters where one was published to the unit; a test compares it with the profile's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from stagewright.planner.catalog.data_file import read_entries, shortened, suggestion
from stagewright.planner.documents.document import Count, Name, Part, read_json
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.errors import InvalidArgument, InvalidDocument
from stagewright.planner.models.convolutional import alexnet, resnet, vgg
from stagewright.planner.models.hugging_face import config_name, config_path, is_config, profile_from_config
from stagewright.planner.models.recurrent import gnmt


class ModelEntry(Part):
    """One model.

    Parameters
    ----------
    parameters : as published, to the unit; None where only a rounded figure was (`published`).
    prediction_parameters : of these not counted there: layers of multi-token prediction that training also holds.
    """

    name: Name
    reference: str
    config: dict[str, object] | None = None
    builder: str | None = None
    stages: tuple[int, ...] = ()
    expansion: Count = 1
    parameters: int | None = None
    prediction_parameters: int = 0
    published: str = ""

    def profile(self) -> ModelProfile:
        """Return the analytic profile."""
        if self.config is not None:
            return profile_from_config(self.config, self.name, source=f"catalogue entry {self.name}")
        match self.builder:
            case "vgg":
                return vgg(self.name, self.stages)
            case "resnet":
                return resnet(self.name, self.stages, expansion=self.expansion)
            case "alexnet":
                return alexnet(self.name)
            case _:
                return gnmt(self.name)


@cache
def model_entries() -> tuple[ModelEntry, ...]:
    """Return all models of the catalogue."""
    return read_entries("models", "models", ModelEntry)


def resolve_model(text: str | Mapping[str, object]) -> ModelProfile:
    """Return the profile that a user's text names: a path, or a catalogue name; or the one a parsed config describes.

    Raises InvalidArgument for an unknown name and InvalidDocument for a file that is neither a profile nor a config.
    """
    if isinstance(text, Mapping):
        return profile_from_object(text, name="model", source="model")
    wanted = text.strip()
    if not wanted:
        raise InvalidArgument("the model is empty", field="model", hint=_FORMS)
    path = config_path(wanted)
    for entry in model_entries():
        if wanted.lower() == entry.name:
            return entry.profile()
    if path.is_file() or wanted.endswith(".json"):
        return profile_from_object(read_json(path), name=config_name(path), source=str(path))
    names = [entry.name for entry in model_entries()]
    raise InvalidArgument(
        f"there is no model {text!r}",
        field="model",
        hint=suggestion(wanted.lower(), names) + f"{_FORMS}; known: {shortened(names)}",
    )


def profile_from_object(value: object, *, name: str, source: str) -> ModelProfile:
    """Return the profile that parsed JSON holds: a profile document, or a Hugging Face config."""
    if isinstance(value, Mapping) and "layers" in value and "classes" in value:
        return ModelProfile.from_object(value, source=source)
    if is_config(value):
        return profile_from_config(value, name, source=source)
    raise InvalidDocument(
        f"{source}: neither a profile (layers, classes) nor a Hugging Face config (model_type)",
        field="model",
        hint=_FORMS,
    )


_FORMS = "give a catalogue name such as gpt3-175b, the path of a config.json or of a profile"
