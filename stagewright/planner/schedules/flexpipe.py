"""FlexPipe: a schedule written as a program, checked, and explored over the numbers it leaves open.

One line serves all ranks. A pass is a kind, F, B, I or W, of the rank's chunk (`F:1` is the forward of its second stage); a pass
or a group in parentheses is repeated by `*n` or `*{expression}`. Expressions are integers over D (ranks), d (this rank), T
(microbatches), v (chunks) and free variables, with + - * // and min(), max(); a negative count is none. Microbatches are numbered by
the order of a pass. 1F1B reads

    F*{min(D-d,T)} (B F)*{T-min(D-d,T)} B*{min(D-d,T)}

and is, with D = 2 and T = 3,

    rank 0  0F0 0F1 0B0 0F2 0B1 0B2
    rank 1  1F0 1B0 1F1 1B1 1F2 1B2

A program is refused with its first wrong character, and its schedule, where passes are missing or wait for each other, by the
validator with the rank and the action. `explore` tries every combination of values for the free variables and keeps the fastest
schedule under the cap. `parameters`: program (1F1B unless given, or breadth-first order for several chunks); placement, "loop" (default) or "wave".

The idea follows the abstract of: FlexPipe: A Programmable and Efficient Pipeline Parallelism Framework, 2025.
"""

from __future__ import annotations

import ast
import itertools
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stagewright.planner.errors import InvalidArgument, StagewrightError
from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.peak import peak_activations
from stagewright.planner.schedules.schedule import Schedule, encode, loop_placement, wave_placement
from stagewright.planner.schedules.sizes import check_placement, costs_of, require, sizes_of
from stagewright.planner.simulation.network import Links
from stagewright.planner.simulation.simulate import simulate
from stagewright.planner.simulation.validate import validate

ONE_F_ONE_B = "F*{min(D-d,T)} (B F)*{T-min(D-d,T)} B*{min(D-d,T)}"
MOST_PASSES = 4_000_000
_TOKEN = re.compile(
    r"\s*(?:(?P<kind>[FBIW])(?::(?P<chunk>\d+))?|(?P<open>\()|(?P<close>\))|\*(?:(?P<count>\d+)|\{(?P<text>[^}]*)\}))"
)
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {"min": min, "max": max}


@dataclass(frozen=True)
class Pass:
    """One action of a rank's chunk, without its microbatch."""

    kind: Kind
    chunk: int


@dataclass(frozen=True)
class Group:
    """Items that run in turn, `count` times; an expression in the program's variables."""

    items: tuple[Pass | Group, ...]
    count: str


@dataclass(frozen=True)
class Explored:
    """The fastest schedule, its makespan, the values of the free variables, and how many of the combinations could run."""

    schedule: Schedule
    makespan_s: float
    values: Mapping[str, int]
    num_valid: int


def flexpipe(request: ScheduleRequest) -> Schedule:
    """Return the schedule of `parameters["program"]`, 1F1B's unless given; raises InvalidSchedule where it cannot run."""
    sizes = sizes_of(request, "flexpipe", most_chunks=None)
    make = {"loop": loop_placement, "wave": wave_placement}
    shape = str(request.parameters.get("placement", "loop"))
    require(shape in make, f"placement is {shape!r}, flexpipe knows {' and '.join(make)}", field="parameters")
    placement = make[shape](sizes.num_ranks, sizes.num_chunks)
    check_placement(request, placement, "flexpipe")
    program = str(
        request.parameters.get("program", ONE_F_ONE_B if sizes.num_chunks == 1 else _chunk_by_chunk(sizes.num_chunks))
    )
    items = parse(program)
    free = {name: value for name, value in request.parameters.items() if isinstance(value, int)}
    orders = []
    for rank in range(sizes.num_ranks):
        names = {**free, "D": sizes.num_ranks, "d": rank, "T": sizes.num_microbatches, "v": sizes.num_chunks}
        stages = np.flatnonzero(placement[0] == rank).tolist()
        orders.append(encode(_numbered(_expanded(items, names), stages)))
    schedule = Schedule(
        "flexpipe",
        sizes.num_microbatches,
        placement,
        tuple(orders),
        parameters={"program": program, "placement": shape},
    )
    validate(schedule)
    return schedule


def _chunk_by_chunk(num_chunks: int) -> str:
    """Return the program of all forwards of one chunk after the other, then all backwards in reverse."""
    forwards = [f"F:{chunk}*{{T}}" for chunk in range(num_chunks)]
    backwards = [f"B:{chunk}*{{T}}" for chunk in reversed(range(num_chunks))]
    return " ".join(forwards + backwards)


def parse(program: str) -> tuple[Pass | Group, ...]:
    """Return the items of a program; raises InvalidArgument with the place of the first character that does not belong."""
    stack: list[list[Pass | Group]] = [[]]
    at = 0
    while program[at:].strip():
        match = _TOKEN.match(program, at)
        if match is None or (match["close"] and len(stack) == 1) or (_is_count(match) and not stack[-1]):
            raise _wrong(program, at)
        if match["kind"]:
            stack[-1].append(Pass(Kind[match["kind"]], int(match["chunk"] or 0)))
        elif match["open"]:
            stack.append([])
        elif match["close"]:
            group = Group(tuple(stack.pop()), "1")
            stack[-1].append(group)
        else:
            last = stack[-1].pop()
            count = match["count"] or match["text"]
            _value(count, None)
            stack[-1].append(Group((last,), count))
        at = match.end()
    if len(stack) > 1:
        raise _wrong(program, len(program))
    return tuple(stack[0])


def explore(request: ScheduleRequest, free: Mapping[str, Sequence[int]]) -> Explored:
    """Return the fastest schedule over all values of the free variables, at the request's costs, latency and cap.

    Combinations whose program cannot run or passes the cap are left out; raises InvalidArgument when none is left.
    """
    best: Explored | None = None
    tried = num_valid = 0
    for values in itertools.product(*free.values()):
        tried += 1
        chosen = dict(zip(free, values, strict=True))
        asked = replace(request, parameters={**request.parameters, **chosen})
        try:
            schedule = flexpipe(asked)
        except StagewrightError:
            continue
        costs = costs_of(asked, sizes_of(asked, "flexpipe", most_chunks=None))
        if request.memory_cap is not None and peak_activations(schedule, costs).max() > request.memory_cap * (1 + 1e-9):
            continue
        num_valid += 1
        makespan_s = simulate(schedule, costs, links=Links(latency_s=request.latency_s), trace=False).makespan_s
        if best is None or makespan_s < best.makespan_s * (1.0 - 1e-12):
            best = Explored(schedule, makespan_s, chosen, num_valid)
    if best is None:
        raise InvalidArgument(
            f"none of {tried} combinations can run under the cap of {request.memory_cap}",
            field="parameters",
            hint="widen the values, or raise the cap",
        )
    return replace(best, num_valid=num_valid)


def _is_count(match: re.Match[str]) -> bool:
    return match["count"] is not None or match["text"] is not None


def _wrong(program: str, at: int) -> InvalidArgument:
    shown = program[at:].strip()[:12] or "the end"
    return InvalidArgument(
        f"program: character {at + 1} of {len(program)} ({shown!r}) does not belong there",
        field="parameters",
        hint="a program reads F*{D-d} (B F)*{T-D+d} B*{D-d}; a pass is F, B, I or W, with :chunk where a rank has several",
    )


def _expanded(items: tuple[Pass | Group, ...], names: Mapping[str, int]) -> Iterator[Pass]:
    for item in items:
        if isinstance(item, Pass):
            yield item
            continue
        count = _value(item.count, names)
        require(
            count <= MOST_PASSES, f"{item.count} is {count}, at most {MOST_PASSES} repeats are made", field="parameters"
        )
        for _ in range(count):
            yield from _expanded(item.items, names)


def _numbered(passes: Iterator[Pass], stages: list[int]) -> Iterator[Action]:
    seen: dict[Pass, int] = {}
    for each in passes:
        require(
            each.chunk < len(stages),
            f"program: {each.kind.name}:{each.chunk} names chunk {each.chunk}, the rank has {len(stages)}",
            field="parameters",
        )
        microbatch = seen.get(each, 0)
        seen[each] = microbatch + 1
        yield Action(each.kind, stages[each.chunk], microbatch)


def _value(text: str, names: Mapping[str, int] | None) -> int:
    """Return the integer of an expression; with `names` None only check its form."""

    def walk(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(value)):
                return value
            case ast.Name(id=name) if names is None:
                return 1
            case ast.Name(id=name) if name in (names or {}):
                return (names or {})[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                one, other = walk(left), walk(right)
                if isinstance(op, ast.FloorDiv) and other == 0:
                    require(names is None, f"program: {text!r} divides by 0", field="parameters")
                    return 0
                return _OPERATORS[type(op)](one, other)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -walk(operand)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS and len(args) > 1:
                return _FUNCTIONS[name](*(walk(argument) for argument in args))
        known = ", ".join(names or ("D", "d", "T", "v"))
        raise InvalidArgument(
            f"program: {text!r} is not an expression of {known}",
            field="parameters",
            hint="integers, + - * //, min() and max()",
        )

    try:
        return walk(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InvalidArgument(f"program: {text!r} is not an expression", field="parameters") from error


FAMILY = ScheduleFamily(
    "flexpipe",
    "FlexPipe: A Programmable and Efficient Pipeline Parallelism Framework, 2025",
    flexpipe,
    plain=False,
)
