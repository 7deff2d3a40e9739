"""What numba's front end does over and over while it compiles, done once or not at all.

Half of the processor's time of a compilation goes into Python objects of numba: types are inferred and intermediate code is written
there. Four things of it are for nothing:

    collections of garbage       the objects of a function live until it is compiled, and every collection looks at all
    types of calls               each call of `+` or `numpy.empty` asks all their implementations, which word an error where they do not fit
    comparisons of options       what implements a call is looked up by the options of its caller, which are compared one by one
    lists of variables           every pass over a function asks each operand for all kinds that it may be

Inside `without_detours` collections wait for the end of a function, the type of a call is asked once, options are compared where
they were set, and the kind of an operand is found once for its type. What numba's own functions are compiled to for one caller
serves another one whose options differ in its wrappers alone. Compiled code does not change. Versions of numba that are not
known compile as they always do.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from numba.core import event, ir, types
from numba.core.targetconfig import ConfigStack, TargetConfig
from numba.core.typing import BaseContext, Signature

from stagewright.planner.machine_code import is_known_numba

# Options of a function that what it calls does not depend on.
_OWN_OPTIONS = frozenset({"no_cfunc_wrapper", "no_compile", "no_cpython_wrapper", "release_gil"})
_LEAF, _VARIABLE, _INSTRUCTION, _SEQUENCE, _MAPPING = range(5)
_KINDS: dict[type, int] = {}  # of the types of operands


class _NoCollections(event.Listener):  # type: ignore[misc]
    """Puts off collections of garbage while a function is compiled, with all that it calls."""

    def __init__(self) -> None:
        self._depth = 0
        self._was_on = False

    def on_start(self, event: object) -> None:
        if self._depth == 0:
            self._was_on = gc.isenabled()
            gc.disable()
        self._depth += 1

    def on_end(self, event: object) -> None:
        self._depth -= 1
        if self._depth == 0 and self._was_on:
            gc.enable()


class _KnownCalls:
    """Signatures that calls of numba's functions were found to have; `ask` finds one (`Function.get_call_type`)."""

    def __init__(self, ask: Callable[..., Signature]) -> None:
        self._ask = ask
        self._found: dict[
            object, tuple[types.Function, Signature]
        ] = {}  # the function too, or another one took its number

    def signature(
        self, function: types.Function, context: BaseContext, args: tuple[types.Type, ...], kws: dict[str, types.Type]
    ) -> Signature:
        """Return the signature of a call; TypingError where there is none."""
        key = id(function), id(context), tuple(args), tuple(dict(kws).items()), ConfigStack.top_or_none()
        if key not in self._found:
            self._found[key] = function, self._ask(function, context, args, kws)
        return self._found[key][1]


@contextmanager
def without_detours() -> Iterator[None]:
    """Compile in less of the processor's time what is compiled inside."""
    if not is_known_numba():
        yield
        return
    calls = _KnownCalls(types.Function.get_call_type)
    better = [
        (TargetConfig, "__eq__", _have_equal_options),
        (TargetConfig, "__hash__", _hash_of_names),
        (ir.Inst, "_rec_list_vars", _variables_of),
        (types.Function, "get_call_type", lambda function, *call: calls.signature(function, *call)),
    ]
    kept = [(owner, name, owner.__dict__.get(name)) for owner, name, _ in better]
    try:
        for owner, name, method in better:
            setattr(owner, name, method)
        with event.install_listener("numba:compile", _NoCollections()):
            yield
    finally:
        for owner, name, method in kept:
            if method is None:
                delattr(owner, name)
            else:
                setattr(owner, name, method)


def _have_equal_options(first: TargetConfig, second: object) -> bool:
    """Tell whether options are equal that a function hands to what it calls (`TargetConfig.__eq__`)."""
    if not isinstance(second, TargetConfig):
        return False
    one, other = first._values, second._values
    if one == other:
        return True
    defaults = first.options
    return all(
        one.get(name, defaults[name].default) == other.get(name, defaults[name].default)
        for name in (one.keys() | other.keys()) - _OWN_OPTIONS
    )


def _hash_of_names(options: TargetConfig) -> int:
    """Return the hash of the names of options, as numba does (`TargetConfig.__hash__`)."""
    return hash(tuple(sorted(options.options)))


def _variables_of(instruction: ir.Inst, value: object) -> list[ir.Var]:
    """Return the variables of an operand, in order (`Inst._rec_list_vars`)."""
    kind, operand = _kind_of(type(value)), cast(Any, value)
    if kind == _VARIABLE:
        return [operand]
    found: list[ir.Var] = []
    if kind == _INSTRUCTION:
        found = operand.list_vars()
    elif kind != _LEAF:
        for part in operand if kind == _SEQUENCE else operand.values():
            found += _variables_of(instruction, part)
    return found


def _kind_of(kind: type) -> int:
    if kind not in _KINDS:
        bases = ((ir.Var, _VARIABLE), (ir.Inst, _INSTRUCTION), ((list, tuple), _SEQUENCE), (dict, _MAPPING))
        _KINDS[kind] = next((found for base, found in bases if issubclass(kind, base)), _LEAF)
    return _KINDS[kind]
