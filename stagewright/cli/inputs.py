"""Turns what users type (models, clusters, pins) into documents."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stagewright.planner.documents.job import EQUAL_NAMES, PIN_NAMES, Forbid, Pins
from stagewright.planner.errors import InvalidArgument

if TYPE_CHECKING:
    from stagewright.cli.output import ReportsProgress
    from stagewright.planner.documents import Cluster, ModelProfile

_FACTORY = re.compile(r"^[\w./\\-]+:\w+$")


def is_factory(model: str) -> bool:
    """Tell whether `model` names code: `module:factory` or `path.py:factory`."""
    return bool(_FACTORY.match(model)) and not Path(model).exists()


def is_config(model: str) -> bool:
    """Tell whether `model` is the path of a Hugging Face configuration, or of a folder with one."""
    from stagewright.planner.documents.document import read_json
    from stagewright.planner.models.hugging_face import config_path
    from stagewright.planner.models.hugging_face import is_config as has_model_type

    path = config_path(model)
    return path.is_file() and has_model_type(read_json(path))


def load_cluster(text: str, progress: ReportsProgress) -> Cluster:
    """Return the cluster that `--cluster` names; `local` measures this machine."""
    if text == "local":
        from stagewright.profiler.discover import discover_local

        return discover_local(progress=progress)
    from stagewright.planner.catalog import resolve_cluster

    return resolve_cluster(text)


def load_model(text: str) -> ModelProfile:
    """Return the profile that MODEL names: a profile or config.json by path, or a catalogue name."""
    from stagewright.planner.catalog import resolve_model

    if is_factory(text):
        raise InvalidArgument(
            f"{text} is code, and planning needs its profile",
            field="model",
            hint=f"measure it first: stagewright profile {text} -o profile.json; or `stagewright run {text}` does all of it",
        )
    return resolve_model(text)


def parse_pins(texts: Sequence[str], *, option: str = "pin") -> Pins:
    """Return the pins of `--pin k=v` (or another option); raises InvalidArgument for an unknown name, a bad value or a repeated name."""
    values: dict[str, str] = {}
    for text in texts:
        for item in text.split(","):
            name, separator, value = item.partition("=")
            name = name.strip()
            if name not in PIN_NAMES or not separator:
                raise InvalidArgument(
                    f"--{option} {item!r} is not NAME=VALUE with a known name",
                    field=option,
                    hint="names: " + ", ".join(PIN_NAMES),
                )
            if values.setdefault(name, value.strip()) != value.strip():
                raise InvalidArgument(
                    f"{name} is pinned to {values[name]} and to {value.strip()}", field=f"{option}.{name}"
                )
    from pydantic import ValidationError

    from stagewright.planner.documents.document import invalid_document

    try:
        return Pins.model_validate(values)
    except ValidationError as error:
        raise invalid_document(option, error) from error


def parse_ties(texts: Sequence[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Return the pairs of degrees and the groups of layers of `--tie a=b[=c...]`."""
    degrees: list[list[str]] = []
    layers: list[list[str]] = []
    for text in texts:
        names = [name.strip() for name in text.split("=")]
        if len(names) < 2 or not all(names):
            raise InvalidArgument(
                f"--tie {text!r}: names and = between them are needed",
                field="tie",
                hint="e.g. ep=dp, or blocks.3=blocks.4",
            )
        (degrees if all(name in EQUAL_NAMES for name in names) else layers).append(names)
    return degrees, layers


def parse_forbids(texts: Sequence[str]) -> tuple[Forbid, ...]:
    """Return the forbids of `--forbid k[=v]`."""
    forbids: list[Forbid] = []
    for text in texts:
        for item in text.split(","):
            name, _, value = item.partition("=")
            if name.strip() not in PIN_NAMES:
                raise InvalidArgument(
                    f"--forbid {item!r}: unknown name", field="forbid", hint="names: " + ", ".join(PIN_NAMES)
                )
            forbids.append(Forbid(name=name.strip(), value=value.strip() or None))
    return tuple(forbids)
