"""Import of users' code: the one function that does it, for the command line and for each rank at its start."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from stagewright.planner.errors import InvalidArgument


def load_object(reference: str) -> object:
    """Return what `module:name` or `path.py:name` names; raises InvalidArgument with the reason when there is none.

    `name` may be dotted. A module is looked up as Python would, with the working directory first.
    """
    place, separator, name = reference.rpartition(":")
    if not separator or not place or not name:
        raise InvalidArgument(
            f"{reference!r} does not name a factory", field="model", hint="write module:factory or path.py:factory"
        )
    value: object = _load_module(place, reference)
    for step in name.split("."):
        if not hasattr(value, step):
            raise InvalidArgument(f"{reference!r}: {place} has no {name!r}", field="model")
        value = getattr(value, step)
    return value


def load_function(reference: str | None) -> Callable[[int], float] | None:
    """Return the function of a step's number that a reference names; None for None. Raises InvalidArgument when it is none."""
    if reference is None:
        return None
    value = load_object(reference)
    if not callable(value):
        raise InvalidArgument(f"{reference!r} is {type(value).__name__}, no function", field="learning_rate_schedule")
    return value


def _load_module(place: str, reference: str) -> object:
    if not place.endswith(".py"):
        here = str(Path.cwd())
        if here not in sys.path:
            sys.path.insert(0, here)
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not place.startswith(error.name):
                raise
            raise InvalidArgument(f"{reference!r}: there is no module {place!r}", field="model") from error
    path = Path(place).resolve()
    if not path.is_file():
        raise InvalidArgument(f"{reference!r}: there is no file {place!r}", field="model")
    name = f"stagewright_user_{path.stem}"
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InvalidArgument(
            f"{reference!r}: {place} cannot be loaded: {type(error).__name__}: {error}", field="model"
        ) from error
    return module
