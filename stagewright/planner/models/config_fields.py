"""Typed reading of a Hugging Face config: every number is checked where it is read, errors name the field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stagewright.planner.errors import InvalidDocument

LARGEST = 2**40


@dataclass(frozen=True)
class ConfigFields:
    """A config.json as parsed, with getters that refuse what is not a size."""

    values: Mapping[str, object]
    source: str

    def size(self, *names: str, default: int | None = None) -> int:
        """Return the first of `names` that is given, a whole number of at least 1; `default` when none is."""
        found = self.count(*names, default=default)
        if found < 1:
            raise self._error(names[0], found, "a whole number of at least 1")
        return found

    def count(self, *names: str, default: int | None = None) -> int:
        """Return the first of `names` that is given, a whole number of at least 0; `default` when none is."""
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST:
                raise self._error(name, value, "a whole number of at least 0")
            return value
        if default is None:
            raise InvalidDocument(
                f"{self.source}: the config has no {names[0]}",
                field=names[0],
                hint=f"add {' or '.join(names)}, a whole number",
            )
        return default

    def optional(self, *names: str) -> int | None:
        """Return a whole number of at least 1, or None when it is absent, null or 0."""
        found = self.count(*names, default=0)
        return found or None

    def flag(self, name: str, default: bool) -> bool:
        """Return a true or false value."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._error(name, value, "true or false")
        return value

    def probability(self, name: str, *, default: float) -> float:
        """Return a number from 0 to 1; `default` where the field is absent."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise self._error(name, value, "a number from 0 to 1")
        return float(value)

    def text(self, name: str, default: str = "") -> str:
        """Return a string."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._error(name, value, "a string")
        return value

    def strings(self, name: str) -> tuple[str, ...] | None:
        """Return a list of strings, or None when it is absent."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._error(name, value, "a list of strings")
        return tuple(value)

    def sizes(self, name: str) -> tuple[int, ...] | None:
        """Return a list of whole numbers, or None when it is absent."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, int) and 0 <= item <= LARGEST for item in value):
            raise self._error(name, value, "a list of whole numbers")
        return tuple(value)

    def part(self, name: str) -> ConfigFields:
        """Return a config inside this one; raises InvalidDocument when it is absent."""
        value = self.values.get(name)
        if not isinstance(value, Mapping):
            raise self._error(name, value, "an object")
        return ConfigFields(value, f"{self.source}: {name}")

    def has_part(self, name: str) -> bool:
        """Return whether a config of that name is inside this one."""
        return isinstance(self.values.get(name), Mapping)

    def require_divides(self, name: str, value: int, divisor_name: str, divisor: int) -> int:
        """Return value / divisor; raises InvalidDocument with both numbers when it is not whole."""
        if value % divisor:
            raise InvalidDocument(
                f"{self.source}: {name} {value} does not divide by {divisor_name} {divisor}", field=name
            )
        return value // divisor

    def _error(self, name: str, value: object, wanted: str) -> InvalidDocument:
        text = repr(value)
        return InvalidDocument(
            f"{self.source}: {name} is {text if len(text) < 60 else text[:57] + '...'}, it must be {wanted}", field=name
        )
