"""Machine code of compiled functions, made only for those that Python calls.

numba makes it for every function: it optimises the function together with all that it calls, down to the last, and emits
the lot. A function that five others call is so optimised and emitted six times, one below those thirty times. Only what
Python calls needs machine code of its own. Inside `for_what_python_calls` the others (`no_cpython_wrapper`, and numba's
own) are kept as intermediate code, simplified a little, and are optimised and emitted within those that Python calls.
Results do not change, nor does the code that numba would inline; the first search of an installation takes less
of the processor's time. This reaches into numba's own parts: versions that are not known compile as they always do.

Cached functions are numba's usual ones, as object code or as bitcode, so that processes outside of this load them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba.core.codegen import JITCodeLibrary
from numba.core.environment import lookup_environment
from numba.core.registry import cpu_target

KNOWN_VERSIONS = ("0.68",)
_FOR_PYTHON = "wrapper"  # numba's name of the module through which Python calls a function
_ENVIRONMENT = "_ZN08NumbaEnv"  # prefix of the variables that hold a function's constants


class KernelLibrary(JITCodeLibrary):  # type: ignore[misc]
    """What numba compiles one function into, with what that function calls."""

    def __init__(self, codegen: object, name: str) -> None:
        super().__init__(codegen, name)
        self._is_called_by_python = False

    def add_ir_module(self, ir_module: ir.Module) -> None:
        """Add intermediate code, and take note of whether it is a wrapper for Python."""
        self._is_called_by_python |= ir_module.name == _FOR_PYTHON
        super().add_ir_module(ir_module)

    def serialize_using_object_code(self) -> tuple[str, str, object]:
        """Return what the cache keeps: object code where there is some, bitcode otherwise."""
        kept: tuple[str, str, object] = (
            super().serialize_using_object_code() if self._is_called_by_python else self.serialize_using_bitcode()
        )
        return kept

    def _set_compiled_object(self, value: bytes) -> None:
        self._is_called_by_python = True
        super()._set_compiled_object(value)

    def _optimize_functions(self, ll_module: llvm.ModuleRef) -> None:
        """Simplify what is optimised later, and drop what numba's typing names and the code does not use.

        Blocks stay as they are: an index of a loop that is joined with its turn below zero is no index of a loop any more, and
        neighbours are then gathered one by one.
        """
        ll_module.data_layout = self._codegen._data_layout
        passes = llvm.create_new_module_pass_manager()
        passes.add_sroa_pass()
        passes.add_instruction_combine_pass()
        passes.add_global_dead_code_eliminate_pass()
        passes.run(ll_module, self._codegen._pass_builder())

    def _optimize_final_module(self) -> None:
        if self._is_called_by_python:
            super()._optimize_final_module()

    def _finalize_final_module(self) -> None:
        if self._is_called_by_python:
            super()._finalize_final_module()
            self._set_environments()
        else:
            self._finalize_dynamic_globals()
            self._verify_declare_only_symbols()
            self._finalized = True

    def _set_environments(self) -> None:
        """Set the constants of the functions emitted here, which numba does where each has code of its own."""
        for variable in self._final_module.global_variables:
            environment = lookup_environment(variable.name) if variable.name.startswith(_ENVIRONMENT) else None
            if environment is not None:
                self._codegen.set_env(variable.name, environment)


def is_known_numba() -> bool:
    """Tell whether this numba is one whose own parts may be reached into."""
    return numba.__version__.rpartition(".")[0] in KNOWN_VERSIONS


@contextmanager
def for_what_python_calls() -> Iterator[None]:
    """Make machine code for the functions that Python calls alone, of those compiled or loaded inside."""
    codegen = cpu_target.target_context.codegen()
    if not is_known_numba() or codegen._library_class is KernelLibrary:
        yield
        return
    set_env = codegen.set_env

    def set_emitted(name: str, environment: object) -> None:
        if codegen._engine.is_symbol_defined(name):
            set_env(name, environment)

    codegen._library_class = KernelLibrary
    codegen.set_env = set_emitted
    try:
        yield
    finally:
        del codegen._library_class, codegen.set_env
