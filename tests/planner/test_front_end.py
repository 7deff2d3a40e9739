"""What numba's front end is relieved of changes neither what is compiled nor numba itself."""

from __future__ import annotations

import gc
import itertools
import re
import subprocess
import sys

import pytest
from numba import njit
from numba.core import base, event, ir, types
from numba.core.compiler import Flags, run_frontend
from numba.core.lowering import Lower
from numba.core.postproc import PostProcessor
from numba.core.runtime.context import NRTContext
from numba.core.targetconfig import TargetConfig

from stagewright.planner import front_end
from stagewright.planner.front_end import without_detours
from stagewright.planner.search import dual_simplex, local_search

_REPLACED = (
    (TargetConfig, "__eq__"),
    (TargetConfig, "__hash__"),
    (ir.Inst, "_rec_list_vars"),
    (types.Function, "get_call_type"),
    (PostProcessor, "run"),
    (NRTContext, "get_meminfos"),
    (base.BaseContext, "get_abi_sizeof"),
    (Lower, "create_cfunc_wrapper"),
    (event, "start_event"),
    (event, "end_event"),
)
_PROGRAM = """
import sys
from contextlib import nullcontext
from typing import NamedTuple
import numpy as np
from numba import njit
from stagewright.planner.front_end import without_detours

class Halves(NamedTuple):
    first: np.ndarray
    rest: tuple[np.ndarray, np.ndarray]
    count: int

@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def largest(values):
    found = -np.inf
    for index in range(len(values)):
        found = max(found, values[index])
    return found

@njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
def halved(values, count):
    middle = len(values) // 2
    return Halves(values[:middle], (values[middle:], values[::2].copy()), count)

@njit(no_cfunc_wrapper=True)
def spread(values, count):
    room = np.zeros(count)
    halves = halved(values, count)
    for index in range(count):
        if index % 7 == 3:
            halves = halved(room, index)
        kept = halves.rest[1]
        room[index] = values[index % len(values)] + largest(kept) * halves.count
    return np.empty(count).sum() + room.max() if count > 3 else room[0] + largest(halves.first)

with without_detours() if sys.argv[1] == "inside" else nullcontext():
    spread(np.ones(3), 2)
print(*spread.inspect_asm().values())
"""


class CollectionsOn(event.Listener):  # type: ignore[misc]
    """Notes at each pass of a compilation whether garbage may be collected."""

    def __init__(self) -> None:
        self.found: set[bool] = set()

    def on_start(self, event: object) -> None:
        self.found.add(gc.isenabled())

    def on_end(self, event: object) -> None:
        pass


def test_collections_wait_until_a_function_is_compiled() -> None:
    @njit
    def squared(value):  # type: ignore[no-untyped-def]
        return value * value

    with event.install_listener("numba:run_pass", CollectionsOn()) as seen, without_detours():
        assert squared(3) == 9
    assert seen.found == {False} and gc.isenabled()
    with event.install_listener("numba:run_pass", CollectionsOn()) as seen:
        assert squared(3.0) == 9.0
    assert seen.found == {True}
    gc.disable()
    try:
        with without_detours():
            assert squared(3j) == -9
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_compilation_leaves_is_collected_at_the_end() -> None:
    @njit
    def cubed(value):  # type: ignore[no-untyped-def]
        return value * value * value

    with without_detours():
        assert cubed(3) == 27
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        held = gc.get_freeze_count()
        with without_detours():
            assert cubed(3.0) == 27.0
        assert held * 0.9 < gc.get_freeze_count() <= held
    finally:
        gc.unfreeze()


def test_locks_are_told_to_nobody_and_the_rest_to_who_listens() -> None:
    @njit
    def halved(value):  # type: ignore[no-untyped-def]
        return value / 2

    with (
        event.install_recorder("numba:llvm_lock") as locks,
        event.install_recorder("numba:compile") as compilations,
        without_detours(),
    ):
        assert halved(3) == 1.5
    assert not locks.buffer
    assert compilations.buffer
    with event.install_recorder("numba:llvm_lock") as locks:
        assert halved(3.0) == 1.5
    assert locks.buffer


def test_numba_is_as_before_behind_it() -> None:
    before = [owner.__dict__.get(name) for owner, name in _REPLACED]
    with pytest.raises(RuntimeError), without_detours():
        assert [owner.__dict__.get(name) for owner, name in _REPLACED] != before
        raise RuntimeError
    assert [owner.__dict__.get(name) for owner, name in _REPLACED] == before


def test_the_type_of_a_call_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0
    ask = types.Function.get_call_type

    def counted(function: types.Function, *call: object) -> object:
        nonlocal asked
        asked += 1
        return ask(function, *call)

    monkeypatch.setattr(types.Function, "get_call_type", counted)

    def compile_sum() -> int:
        @njit
        def summed(a, b):  # type: ignore[no-untyped-def]
            return a * b + a * b * a + a * b * a * b + a * b * a * b * a

        before = asked
        assert summed(2.0, 3.0) == 6.0 + 12.0 + 36.0 + 72.0
        return asked - before

    outside = compile_sum()
    with without_detours():
        inside = compile_sum()
    assert 0 < inside <= 3 < 10 < outside, (inside, outside)


def test_options_are_equal_when_numba_says_so_but_for_a_functions_own() -> None:
    numba_equal, numba_hash = TargetConfig.__eq__, TargetConfig.__hash__
    settings = [
        {},
        {"nrt": True},
        {"nrt": False},
        {"nrt": True, "fastmath": True},
        {"nrt": True, "error_model": "numpy"},
        {"boundscheck": True},
    ]
    own = [{}, {"no_cpython_wrapper": True}, {"release_gil": True, "no_cpython_wrapper": False}]

    def flags(*parts: dict[str, object]) -> Flags:
        made = Flags()
        for name, value in itertools.chain(*(part.items() for part in parts)):
            setattr(made, name, value)
        return made

    for first, second in itertools.product(settings, repeat=2):
        expected = numba_equal(flags(first), flags(second))
        for mine, other in itertools.product(own, repeat=2):
            assert front_end._have_equal_options(flags(first, mine), flags(second, other)) is expected
    assert front_end._hash_of_names(Flags()) == numba_hash(Flags())


@pytest.mark.parametrize("kernel", [dual_simplex.probe, local_search.descend])
def test_variables_of_statements_are_those_that_numba_lists(kernel: object) -> None:
    listed = ir.Inst._rec_list_vars
    statements = [
        statement
        for block in run_frontend(kernel.py_func).blocks.values()
        for statement in block.body  # type: ignore[attr-defined]
    ]
    assert len(statements) > 50
    for statement in statements:
        expected = listed(statement, statement.__dict__)
        found = front_end._variables_of(statement, statement.__dict__)
        assert len(found) == len(expected)
        assert all(one is other for one, other in zip(found, expected, strict=True))


def test_machine_code_is_the_same() -> None:
    code = []
    for where in ("inside", "outside"):
        command = [sys.executable, "-c", _PROGRAM, where]
        found = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert found.returncode == 0, found.stderr
        code.append(re.sub(r"_ZN\w+|\d{6,}|\.L\w+", "", found.stdout))
    assert len(code[0].splitlines()) > 100
    assert code[0] == code[1]
