"""What numba's front end does over and over while it compiles, done once or not at all.

Half of the processor's time of a compilation goes into Python objects of numba: types are inferred and intermediate code is written
there. Much of it is for nothing:

    collections of garbage       the objects of a function live until it is compiled, and every collection looks at all
    types of calls               each call of `+` or `numpy.empty` asks all their implementations, which word an error where they do not fit
    comparisons of options       what implements a call is looked up by the options of its caller, which are compared one by one
    lists of variables           every pass over a function asks each operand for all kinds that it may be
    lives of variables           ten passes over a function leave a list of what is alive in each block; the last one's is read
    counts of references         to count a tuple of arrays, all shapes and strides are taken out of it: a third of the code before LLVM
    sizes of numbers             LLVM reads a module to tell the bytes of one
    wrappers for C               one for each function that nobody calls from C
    notes of locks               each call of LLVM tells all functions under compilation that it took a lock, and that it left it

Inside `without_detours` nothing that is compiled there counts as garbage before the end, the type of a call is asked once, options are
compared where they were set, the kind of an operand is found once for its type, and the rest is made where it is used. What
numba's own functions are compiled to for one caller serves another one whose options differ in its wrappers alone. Compiled code
does not change. Versions of numba that are not known compile as they always do.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from llvmlite import ir as llvm
from numba.core import base, event, ir, transforms, types
from numba.core.lowering import Lower
from numba.core.postproc import PostProcessor, VariableLifetime
from numba.core.runtime.context import NRTContext
from numba.core.targetconfig import ConfigStack, TargetConfig
from numba.core.typing import BaseContext, Signature

from stagewright.planner.machine_code import is_known_numba

# Options of a function that what it calls does not depend on.
_OWN_OPTIONS = frozenset({"no_cfunc_wrapper", "no_compile", "no_cpython_wrapper", "release_gil"})
_POST_PROCESS: Callable[..., None] = PostProcessor.run
_SIZE_OF: Callable[..., int] = base.BaseContext.get_abi_sizeof
_LEAF, _VARIABLE, _INSTRUCTION, _SEQUENCE, _MAPPING = range(5)
_COUNTED: dict[types.Type, bool] = {}  # whether references to a value, or to parts of it, are counted
_SIZES: dict[str, int] = {}  # bytes by type
_LOCKS = frozenset({"numba:compiler_lock", "numba:llvm_lock"})


class _Kinds(dict[type, int]):
    """Kinds of operands by type."""

    def __missing__(self, kind: type) -> int:
        bases = ((ir.Var, _VARIABLE), (ir.Inst, _INSTRUCTION), ((list, tuple), _SEQUENCE), (dict, _MAPPING))
        found = self[kind] = next((number for base, number in bases if issubclass(kind, base)), _LEAF)
        return found


_KINDS = _Kinds()


class _NoCollections(event.Listener):  # type: ignore[misc]
    """Collects no garbage while a function is compiled, with all that it calls, and none of what that left before `end`."""

    def __init__(self) -> None:
        self._depth = 0
        self._was_on = False
        self._may_freeze = gc.get_freeze_count() == 0  # else what others froze would thaw

    def on_start(self, event: object) -> None:
        if self._depth == 0:
            self._was_on = gc.isenabled()
            gc.disable()
        self._depth += 1

    def on_end(self, event: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            if self._may_freeze:
                gc.freeze()
            if self._was_on:
                gc.enable()

    def end(self) -> None:
        """Let all be collected."""
        if self._may_freeze:
            gc.unfreeze()


class _KnownCalls:
    """Signatures that calls of numba's functions were found to have; `ask` finds one (`Function.get_call_type`)."""

    def __init__(self, ask: Callable[..., Signature]) -> None:
        self._ask = ask
        # With the function, or another one could take its number.
        self._found: dict[object, tuple[types.Function, Signature]] = {}

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
    collections = _NoCollections()
    better = [
        (TargetConfig, "__eq__", _have_equal_options),
        (TargetConfig, "__hash__", _hash_of_names),
        (ir.Inst, "_rec_list_vars", _variables_of),
        (PostProcessor, "run", _post_process),
        (types.Function, "get_call_type", lambda function, *call: calls.signature(function, *call)),
        (NRTContext, "get_meminfos", _counted_parts),
        (base.BaseContext, "get_abi_sizeof", _size_of),
        (Lower, "create_cfunc_wrapper", lambda lowering: None),
        (event, "start_event", _unless_of_a_lock(event.start_event)),
        (event, "end_event", _unless_of_a_lock(event.end_event)),
    ]
    kept = [(owner, name, owner.__dict__.get(name)) for owner, name, _ in better]
    try:
        for owner, name, method in better:
            setattr(owner, name, method)
        with event.install_listener("numba:compile", collections):
            yield
    finally:
        collections.end()
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
    kind, operand = _KINDS[type(value)], cast(Any, value)
    if kind == _VARIABLE:
        return [operand]
    found: list[ir.Var] = []
    if kind == _INSTRUCTION:
        found = operand.list_vars()
    elif kind != _LEAF:
        for part in operand if kind == _SEQUENCE else operand.values():
            if (inner := _KINDS[type(part)]) == _VARIABLE:
                found.append(part)
            elif inner != _LEAF:
                found += _variables_of(instruction, part)
    return found


def _post_process(processor: PostProcessor, emit_dels: bool = False, extend_lifetimes: bool = False) -> None:
    """Put the blocks of a function in order, and end the lives of variables where asked (`PostProcessor.run`)."""
    function = processor.func_ir
    if function.is_generator:
        _POST_PROCESS(processor, emit_dels, extend_lifetimes)
        return
    function.blocks = transforms.canonicalize_cfg(function.blocks)
    function.variable_lifetime = VariableLifetime(function.blocks)
    function.generator_info = None
    if emit_dels:
        processor._insert_var_dels(extend_lifetimes=extend_lifetimes)


def _counted_parts(
    context: NRTContext, builder: llvm.IRBuilder, kind: types.Type, value: llvm.Value
) -> list[tuple[types.Type, llvm.Value]]:
    """Return what is counted of the references of a value, with its type (`NRTContext.get_meminfos`)."""
    model = context._context.data_model_manager[kind]
    found = [(kind, model.get_nrt_meminfo(builder, value))] if model.has_nrt_meminfo() else []
    for inner, part_of in model.traverse(builder):
        if _is_counted(context, inner):
            found += _counted_parts(context, builder, inner, part_of(value))
    return found


def _is_counted(context: NRTContext, kind: types.Type) -> bool:
    found = _COUNTED.get(kind)
    if found is None:
        found = _COUNTED[kind] = context._context.data_model_manager[kind].contains_nrt_meminfo()
    return found


def _size_of(context: base.BaseContext, kind: llvm.Type) -> int:
    """Return the bytes of a value of a type (`BaseContext.get_abi_sizeof`)."""
    if isinstance(kind, llvm.IdentifiedStructType):
        return _SIZE_OF(context, kind)
    name = str(kind)
    if name not in _SIZES:
        _SIZES[name] = _SIZE_OF(context, kind)
    return _SIZES[name]


def _unless_of_a_lock(tell: Callable[..., None]) -> Callable[..., None]:
    def told(kind: str, *details: object, **named: object) -> None:
        if kind not in _LOCKS:
            tell(kind, *details, **named)

    return told
