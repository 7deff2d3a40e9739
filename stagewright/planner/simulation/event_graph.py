"""The event times of any schedule: all its orders and waits as a weighted graph, and longest paths through it.

A schedule fixes the order on every resource it uses: compute of a rank, each directed link, each rank's collective lane
and each direction of its peer and host lanes, because whatever a rank issues, it issues in program order. So everything
that can happen is a node, every wait is an edge with a weight w,

    start(x) = max over edges (y, x) of start(y) + w,      w = duration(y), or what y occupies, or 0,

and one pass in topological order gives all times. Nodes are compute actions (a fused group is one), messages, moves of
activations, and collectives (a reduction of several replicas is one, with edges from all its ranks).

    compute       after the compute before it in its list; after its messages, its stage's UNSHARD, its activation's return
    message       after its producer (or where its SEND row stands); after the message before it on the link
    EVICT, OFFLOAD    after the compute before it in the list
    LOAD, RELOAD      with the start of the compute before it, so that it runs under it; after the activation is away
    UNSHARD           with the start of the compute before it; REDUCE_GRAD after its end; OPT after its REDUCE_GRAD

Blocking sends and collectives also hold back the compute behind them. O((N + M) log N) for N rows and M messages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.schedule import FUSED, KIND, MICROBATCH, REPLICA, SLICE, STAGE
from stagewright.planner.simulation.chain_sweep import Hops
from stagewright.planner.simulation.program import Program
from stagewright.planner.simulation.timeline import COLLECTIVE_LANE, COMPUTE_LANE, HOST_LANE, SEND_LANE

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]

_ON_COMPUTE = [int(kind) for kind in (Kind.F, Kind.B, Kind.I, Kind.W, Kind.R, Kind.FILL, Kind.OPT)]
_AWAY = [int(Kind.EVICT), int(Kind.OFFLOAD)]
_BACK = [int(Kind.LOAD), int(Kind.RELOAD)]
_COLLECTIVE = [int(Kind.UNSHARD), int(Kind.REDUCE_GRAD)]
_BACKWARD = [int(Kind.B), int(Kind.I)]


class Costed(NamedTuple):
    """Seconds and sizes of every row, and how rows use the network.

    `row_s` [num_rows] is a row's duration, a fused group's on its first row; `moved_s` [num_rows] is how long a move
    occupies its lane. `size_share` [num_rows] is the share of a whole microbatch. `joint`: the replicas of a stage
    reduce together.
    """

    row_s: Floats
    moved_s: Floats
    size_share: Floats
    hops: Hops
    overlap: bool
    collectives_overlap: bool
    sends_are_rows: bool
    joint: bool


@dataclass
class _Edges:
    """Edges under construction; a weight of NaN stands for the duration of `source`."""

    source: list[Longs] = field(default_factory=list)
    target: list[Longs] = field(default_factory=list)
    weight: list[Floats] = field(default_factory=list)

    def add(self, source: Longs, target: Longs, weight: float | Floats = np.nan) -> None:
        keep = (source >= 0) & (target >= 0)
        self.source.append(source[keep])
        self.target.append(target[keep])
        self.weight.append(np.broadcast_to(np.asarray(weight, np.float64), source.shape)[keep])


class Solved(NamedTuple):
    """Times of nodes, the nodes of rows and messages, and what never got a time.

    `row_node` [num_rows] is -1 for rows without a span (RECV, SEND, RESHARD); `message_row`, `message_rank` and
    `message_node` describe the messages; `arrival_s` [2, num_edge_keys] is when each edge's data is there, inf where it
    never is; `timed` [num_nodes] is False behind a deadlock.
    """

    start_s: Floats
    end_s: Floats
    before: Longs
    row_node: Longs
    row_lane: npt.NDArray[np.int8]
    row_start_s: Floats
    row_end_s: Floats
    message_row: Longs
    message_rank: Longs
    message_node: Longs
    message_bytes: float
    arrival_s: Floats
    timed: npt.NDArray[np.bool_]
    rows_done: npt.NDArray[np.bool_]


class _Layout(NamedTuple):
    """Row columns and the nodes of rows, before messages."""

    rows: Ints
    rank: Longs
    node: Longs
    previous: Longs  # last compute node before each row on its rank, -1 for none
    following: Longs  # first compute node behind each row on its rank, -1 for none


def solve(program: Program, costed: Costed) -> Solved:
    """Return the times of everything in the schedule; what stands behind a deadlock has none."""
    layout = _layout(program, costed)
    num_row_nodes = int(layout.node.max(initial=-1)) + 1
    edges = _Edges()
    _add_compute_order(layout, edges)
    messages = _messages(program, costed, layout, num_row_nodes)
    bad = _add_messages(program, costed, layout, messages, edges)
    bad |= _add_inputs(program, layout, messages, edges)
    bad |= _add_moves(program, costed, layout, edges)
    _add_collectives(costed, layout, edges)
    bad |= _own_order(program, layout)
    duration = _durations(costed, layout, messages, num_row_nodes)
    return _finish(program, costed, layout, messages, edges, duration, bad)


def _layout(program: Program, costed: Costed) -> _Layout:
    rows = program.rows
    rank = np.repeat(np.arange(len(program.offset) - 1), np.diff(program.offset))
    kind = rows[:, KIND]
    opens = np.ones(len(rows), dtype=np.bool_)
    opens[1:] = rows[:-1, FUSED] == 0
    opens[program.offset[1:-1][program.offset[1:-1] < len(rows)]] = True
    compute = np.isin(kind, _ON_COMPUTE)
    node = np.full(len(rows), -1, dtype=np.int64)
    own = np.isin(kind, _ON_COMPUTE + _AWAY + _BACK + _COLLECTIVE)
    node[own] = np.cumsum(opens[own] | ~compute[own]) - 1
    if costed.joint:
        node = _share_reductions(rows, rank, node)
    previous = _last_before(np.where(compute, node, -1), program.offset)
    following = _first_behind(np.where(compute, node, -1), program.offset)
    while (inside := compute & (following == node)).any():  # of a fused group, all rows look behind its last one
        following[inside] = np.append(following[1:], -1)[inside]
    return _Layout(rows, rank, node, previous, following)


def _share_reductions(rows: Ints, rank: Longs, node: Longs) -> Longs:
    """Give the k-th reductions of a stage on all its ranks one node."""
    reductions = np.flatnonzero(rows[:, KIND] == int(Kind.REDUCE_GRAD))
    if not len(reductions):
        return node
    seen: dict[tuple[int, int], int] = {}
    first: dict[tuple[int, int], int] = {}
    shared = node.copy()
    for index in reductions.tolist():
        place = (int(rank[index]), int(rows[index, STAGE]))
        seen[place] = seen.get(place, -1) + 1
        shared[index] = first.setdefault((place[1], seen[place]), int(node[index]))
    return shared


def _last_before(node: Longs, offset: Ints) -> Longs:
    """Return, for each row, the last node >= 0 of an earlier row of the same rank."""
    place = np.where(node >= 0, np.arange(len(node)), -1)
    latest = np.maximum.accumulate(place) if len(place) else place
    before = np.concatenate(([-1], latest[:-1])) if len(place) else place
    starts = np.repeat(offset[:-1], np.diff(offset))
    return np.where(before >= starts, node[before], -1)


def _first_behind(node: Longs, offset: Ints) -> Longs:
    flipped = _last_before(node[::-1], (offset[-1] - offset[::-1]).astype(np.int32))
    return flipped[::-1]


def _add_compute_order(layout: _Layout, edges: _Edges) -> None:
    compute = np.isin(layout.rows[:, KIND], _ON_COMPUTE)
    later = compute & (layout.previous != layout.node)
    edges.add(layout.previous[later], layout.node[later])


class _Messages(NamedTuple):
    row: Longs
    rank: Longs
    way: Longs  # 0 forwards, 1 gradients
    cell: Longs  # replica * num_edges + edge
    node: Longs
    latency_s: Floats
    occupied_s: Floats
    size: Floats
    timed: npt.NDArray[np.bool_]  # a node of its own; otherwise the node is the producer's


def _messages(program: Program, costed: Costed, layout: _Layout, first_node: int) -> _Messages:
    """Return what each producing row hands on, over each of its stage edges."""
    rows, kind = layout.rows, layout.rows[:, KIND]
    parts = []
    for direction, kinds, send in ((0, [int(Kind.F)], Kind.SEND_F), (1, _BACKWARD, Kind.SEND_B)):
        start, edge = (program.out_start, program.out_edge) if direction == 0 else (program.in_start, program.in_edge)
        makers = np.flatnonzero(np.isin(kind, kinds))
        row, found = _expand(rows, makers, start, edge)
        cell = rows[row, REPLICA].astype(np.int64) * len(program.edge_from) + found
        local = costed.hops.target[direction, cell] < 0
        if costed.sends_are_rows:
            sent, sent_edge = _expand(rows, np.flatnonzero(kind == int(send)), start, edge)
            sent_cell = rows[sent, REPLICA].astype(np.int64) * len(program.edge_from) + sent_edge
            crosses = costed.hops.target[direction, sent_cell] >= 0
            row = np.concatenate((row[local], sent[crosses]))
            cell = np.concatenate((cell[local], sent_cell[crosses]))
            local = np.concatenate((np.ones(local.sum(), np.bool_), np.zeros(crosses.sum(), np.bool_)))
        parts.append((row, np.full(len(row), direction), cell, local))
    row = np.concatenate([part[0] for part in parts])
    way = np.concatenate([part[1] for part in parts])
    cell = np.concatenate([part[2] for part in parts])
    local = np.concatenate([part[3] for part in parts])
    order = np.lexsort((cell, row))  # a rank's messages leave in list order
    row, way, cell, local = row[order], way[order], cell[order], local[order]
    share = costed.size_share[row]
    latency = costed.hops.latency_s[way, cell] * ~local
    occupied = costed.hops.occupied_s[way, cell] * share * ~local
    size = costed.hops.size[way, cell] * share * ~local
    timed = (latency + occupied > 0.0) | ~(local | costed.overlap)  # blocking sends queue behind each other
    node = np.where(timed, first_node - 1 + np.cumsum(timed), layout.node[row])
    node = np.where((node < 0) & ~timed, layout.previous[row], node)  # a SEND row that takes no time
    return _Messages(row, layout.rank[row], way, cell, node, latency, occupied, size, timed)


def _expand(rows: Ints, chosen: Longs, start: Ints, edge: Ints) -> tuple[Longs, Longs]:
    """Return (row, edge) for every edge of each chosen row's stage."""
    stage = rows[chosen, STAGE]
    degree = (start[stage + 1] - start[stage]).astype(np.int64)
    row = np.repeat(chosen, degree)
    within = np.arange(len(row)) - np.repeat(np.cumsum(degree) - degree, degree)
    return row, edge[start[rows[row, STAGE]] + within].astype(np.int64)


def _add_messages(
    program: Program, costed: Costed, layout: _Layout, messages: _Messages, edges: _Edges
) -> npt.NDArray[np.bool_]:
    """Add the waits of messages; return the rows that send before they have anything to send."""
    bad = np.zeros(len(layout.rows), dtype=np.bool_)
    timed = messages.timed
    row, node = messages.row[timed], messages.node[timed]
    is_send = np.isin(layout.rows[row, KIND], [int(Kind.SEND_F), int(Kind.SEND_B)])
    edges.add(np.where(is_send, layout.previous[row], layout.node[row]), node)
    for kinds, send in (([int(Kind.F)], Kind.SEND_F), (_BACKWARD, Kind.SEND_B)):
        sends = np.flatnonzero(layout.rows[:, KIND] == int(send))
        made = _first_row(program, layout.rows, kinds)
        late = _rows_of_keys(program, layout.rows, sends, made).max(axis=1, initial=-1) >= sends
        bad[sends[late]] = True
    link = costed.hops.link[messages.way, messages.cell][timed]
    occupied = messages.occupied_s[timed]
    busy = np.flatnonzero(occupied > 0.0)
    busy = busy[np.argsort(link[busy], kind="stable")]
    follows = np.flatnonzero(link[busy][1:] == link[busy][:-1])
    edges.add(node[busy][follows], node[busy][follows + 1], occupied[busy][follows])
    if not costed.overlap:
        edges.add(node, layout.following[row])
        rank = messages.rank[timed]
        follows = np.flatnonzero(rank[1:] == rank[:-1])
        edges.add(node[follows], node[follows + 1])
    return bad


def _first_row(program: Program, rows: Ints, kinds: list[int]) -> Longs:
    """Return, by key, the row that runs one of the kinds; past the end where none does."""
    found = np.full(program.placement.size * program.num_microbatches * program.num_slices, len(rows), dtype=np.int64)
    chosen = np.flatnonzero(np.isin(rows[:, KIND], kinds))[::-1]
    keys, row = _keys(program, rows, chosen)
    found[keys] = row
    return found


def _keys(program: Program, rows: Ints, chosen: Longs) -> tuple[Longs, Longs]:
    """Return (key, row) for every slot of each chosen row."""
    slices = program.num_slices
    cell = rows[chosen, REPLICA].astype(np.int64) * program.placement.shape[1] + rows[chosen, STAGE]
    base = (cell * program.num_microbatches + rows[chosen, MICROBATCH]) * slices
    part = rows[chosen, SLICE]
    if slices == 1:
        return base, chosen
    whole = part < 0
    keys = np.concatenate((base[~whole] + part[~whole], (base[whole][:, None] + np.arange(slices)).ravel()))
    order = np.concatenate((chosen[~whole], np.repeat(chosen[whole], slices)))
    return keys, order


def _rows_of_keys(program: Program, rows: Ints, chosen: Longs, by_key: Longs) -> Longs:
    """Return `by_key` for every slot of each chosen row, [len(chosen), num_slices]."""
    slices = program.num_slices
    cell = rows[chosen, REPLICA].astype(np.int64) * program.placement.shape[1] + rows[chosen, STAGE]
    base = (cell * program.num_microbatches + rows[chosen, MICROBATCH]) * slices
    part = rows[chosen, SLICE]
    slot = np.where((part < 0)[:, None], np.arange(slices), np.maximum(part, 0)[:, None])
    found: Longs = by_key[base[:, None] + slot]
    return found


def _own_order(program: Program, layout: _Layout) -> npt.NDArray[np.bool_]:
    """Return the rows that stand before what they need of their own stage: B, I, R before F, W before I."""
    bad = np.zeros(len(layout.rows), dtype=np.bool_)
    kind = layout.rows[:, KIND]
    for kinds, needed in (([*_BACKWARD, int(Kind.R)], [int(Kind.F)]), ([int(Kind.W)], [int(Kind.I)])):
        chosen = np.flatnonzero(np.isin(kind, kinds))
        made = _first_row(program, layout.rows, needed)
        bad[chosen] |= _rows_of_keys(program, layout.rows, chosen, made).max(axis=1, initial=-1) >= chosen
    return bad


def _add_inputs(program: Program, layout: _Layout, messages: _Messages, edges: _Edges) -> npt.NDArray[np.bool_]:
    """Add the waits of compute for what other stages make; return the rows whose input is never made."""
    bad = np.zeros(len(layout.rows), dtype=np.bool_)
    table = _arrivals(program, layout, messages)
    for way, kinds in ((0, [int(Kind.F)]), (1, _BACKWARD)):
        start, edge = (program.in_start, program.in_edge) if way == 0 else (program.out_start, program.out_edge)
        row, found = _expand(layout.rows, np.flatnonzero(np.isin(layout.rows[:, KIND], kinds)), start, edge)
        bringers = table[way][_edge_slots(program, layout.rows, row, found)]
        bad[row[(bringers < 0).any(axis=1)]] = True
        edges.add(bringers.ravel(), np.repeat(layout.node[row], bringers.shape[1]))
    return bad


def _edge_slots(program: Program, rows: Ints, row: Longs, edge: Longs) -> Longs:
    """Return the edge keys that each (row, edge) touches, [len(row), num_slices], one repeated for a single slice."""
    slices = program.num_slices
    cell = rows[row, REPLICA].astype(np.int64) * len(program.edge_from) + edge
    base = (cell * program.num_microbatches + rows[row, MICROBATCH]) * slices
    part = rows[row, SLICE]
    slots: Longs = base[:, None] + np.where((part < 0)[:, None], np.arange(slices), np.maximum(part, 0)[:, None])
    return slots


def _arrivals(program: Program, layout: _Layout, messages: _Messages) -> Longs:
    """Return, [2, num_edge_keys], the node that brings each edge's data, -1 where nothing does."""
    size = max(program.placement.shape[0] * len(program.edge_from) * program.num_microbatches * program.num_slices, 1)
    table = np.full((2, size), -1, dtype=np.int64)
    slots = _edge_slots(program, layout.rows, messages.row, messages.cell % max(len(program.edge_from), 1))
    table[np.broadcast_to(messages.way[:, None], slots.shape), slots] = messages.node[:, None]
    return table


def _add_moves(program: Program, costed: Costed, layout: _Layout, edges: _Edges) -> npt.NDArray[np.bool_]:
    """Add the waits of moved activations; return the rows that move, or use, what is not where they think."""
    bad = np.zeros(len(layout.rows), dtype=np.bool_)
    kind = layout.rows[:, KIND]
    moves = np.flatnonzero(np.isin(kind, _AWAY + _BACK))
    if not len(moves):
        return bad
    users = np.isin(kind, [*_BACKWARD, int(Kind.R)])
    state: dict[int, tuple[int, bool]] = {}  # key -> (row of the last move, away now)
    for index in np.flatnonzero(users | np.isin(kind, _AWAY + _BACK)).tolist():
        away = int(kind[index]) in _AWAY
        for key in _keys(program, layout.rows, np.array([index]))[0].tolist():
            row, gone = state.get(key, (-1, False))
            node = layout.node[[row]] if row >= 0 else np.array([-1])
            if users[index]:
                bad[index] |= gone
                edges.add(node, layout.node[[index]])
                continue
            bad[index] |= gone == away
            edges.add(node, layout.node[[index]])
            state[key] = (index, away)
    away_rows, back_rows = moves[np.isin(kind[moves], _AWAY)], moves[np.isin(kind[moves], _BACK)]
    edges.add(layout.previous[away_rows], layout.node[away_rows])
    edges.add(layout.previous[back_rows], layout.node[back_rows], 0.0)
    for each in (*_AWAY, *_BACK):
        lane = np.flatnonzero(kind == each)
        follows = np.flatnonzero(layout.rank[lane][1:] == layout.rank[lane][:-1])
        edges.add(layout.node[lane][follows], layout.node[lane][follows + 1], costed.moved_s[lane[follows]])
    made = _first_row(program, layout.rows, [int(Kind.F)])
    bad[moves] |= _rows_of_keys(program, layout.rows, moves, made).max(axis=1, initial=-1) >= moves
    return bad


def _add_collectives(costed: Costed, layout: _Layout, edges: _Edges) -> None:
    kind = layout.rows[:, KIND]
    rows = np.flatnonzero(np.isin(kind, _COLLECTIVE))
    early = costed.collectives_overlap & (kind[rows] == int(Kind.UNSHARD))
    edges.add(layout.previous[rows], layout.node[rows], np.where(early, 0.0, np.nan))
    follows = np.flatnonzero(layout.rank[rows][1:] == layout.rank[rows][:-1])
    edges.add(layout.node[rows][follows], layout.node[rows][follows + 1])
    if not costed.collectives_overlap:
        edges.add(layout.node[rows], layout.following[rows])
    for collective, users in (
        (Kind.UNSHARD, [int(Kind.F), int(Kind.R), *_BACKWARD]),
        (Kind.REDUCE_GRAD, [int(Kind.OPT)]),
    ):
        made = np.flatnonzero(kind == int(collective))
        if len(made):
            using = np.flatnonzero(np.isin(kind, users))
            latest = _latest(layout, made, using)
            edges.add(np.where(latest >= 0, layout.node[latest], -1), layout.node[using])


def _latest(layout: _Layout, made: Longs, using: Longs) -> Longs:
    """Return, for each using row, the last `made` row before it of the same rank, replica and stage, or -1."""
    rows = np.concatenate((made, using))
    columns = (layout.rank[rows], layout.rows[rows, REPLICA], layout.rows[rows, STAGE])
    order = np.lexsort((rows, *columns))
    starts = np.ones(len(order), dtype=np.bool_)
    starts[1:] = np.any([column[order][1:] != column[order][:-1] for column in columns], axis=0)
    place = np.arange(len(order))
    last_made = np.maximum.accumulate(np.where(order < len(made), place, -1))
    begin = np.maximum.accumulate(np.where(starts, place, 0))
    found = np.where(last_made >= begin, rows[order[last_made]], -1)
    latest = np.empty(len(order), dtype=np.int64)
    latest[order] = found
    return latest[len(made) :]


def _durations(costed: Costed, layout: _Layout, messages: _Messages, num_row_nodes: int) -> Floats:
    timed = messages.timed
    duration = np.zeros(num_row_nodes + int(timed.sum()))
    np.add.at(duration, layout.node[layout.node >= 0], costed.row_s[layout.node >= 0])
    shared = layout.rows[:, KIND] == int(Kind.REDUCE_GRAD)
    duration[layout.node[shared]] = costed.row_s[shared]
    duration[messages.node[timed]] = (messages.occupied_s + messages.latency_s)[timed]
    return duration


def _finish(
    program: Program,
    costed: Costed,
    layout: _Layout,
    messages: _Messages,
    edges: _Edges,
    duration: Floats,
    bad: npt.NDArray[np.bool_],
) -> Solved:
    source, target = np.concatenate(edges.source), np.concatenate(edges.target)
    weight = np.concatenate(edges.weight)
    weight = np.where(np.isnan(weight), duration[source], weight)
    stuck = np.zeros(len(duration), dtype=np.bool_)
    stuck[layout.node[bad & (layout.node >= 0)]] = True
    stuck[layout.following[bad & (layout.node < 0) & (layout.following >= 0)]] = True
    start_s, before, timed = _longest_paths(len(duration), source, target, weight, stuck)
    end_s = start_s + duration
    has_node = layout.node >= 0
    own = np.where(has_node, layout.node, layout.previous)
    row_end = np.where(own >= 0, end_s[own], 0.0)
    row_start = np.where(has_node, start_s[own], row_end)
    table = _arrivals(program, layout, messages)
    arrival = np.where(table >= 0, end_s[table], np.inf)
    moves = timed[messages.node] & (messages.occupied_s + messages.latency_s > 0.0) & (messages.node >= 0)
    return Solved(
        start_s,
        end_s,
        before,
        layout.node,
        _lanes(layout.rows[:, KIND]),
        row_start,
        row_end,
        messages.row[moves],
        messages.rank[moves],
        messages.node[moves],
        float(messages.size.sum()),
        arrival,
        timed,
        ~bad & (~has_node | timed[own]),
    )


def _lanes(kind: Ints) -> npt.NDArray[np.int8]:
    lane_of = np.full(len(Kind), -1, dtype=np.int8)
    lane_of[_ON_COMPUTE] = COMPUTE_LANE
    lane_of[_COLLECTIVE] = COLLECTIVE_LANE
    lane_of[[int(Kind.EVICT), int(Kind.LOAD)]] = SEND_LANE
    lane_of[[int(Kind.OFFLOAD), int(Kind.RELOAD)]] = HOST_LANE
    return lane_of[kind]


@njit(cache=True)
def _longest_paths(
    num_nodes: int, source: Longs, target: Longs, weight: Floats, stuck: npt.NDArray[np.bool_]
) -> tuple[Floats, Longs, npt.NDArray[np.bool_]]:
    """Return start times, the source of each node's binding edge (-1 for none), and which nodes were reached at all."""
    first = np.zeros(num_nodes + 1, np.int64)
    waiting = np.zeros(num_nodes, np.int64)
    for edge in range(len(source)):
        first[source[edge] + 1] += 1
        waiting[target[edge]] += 1
    for node in range(num_nodes):
        first[node + 1] += first[node]
    place = first[:-1].copy()
    order = np.empty(len(source), np.int64)
    for edge in range(len(source)):
        order[place[source[edge]]] = edge
        place[source[edge]] += 1
    start_s, before = np.zeros(num_nodes), np.full(num_nodes, -1, np.int64)
    timed = np.zeros(num_nodes, np.bool_)
    stack = np.empty(num_nodes, np.int64)
    depth = 0
    for node in range(num_nodes - 1, -1, -1):
        if waiting[node] == 0 and not stuck[node]:
            stack[depth] = node
            depth += 1
    while depth > 0:
        depth -= 1
        node = stack[depth]
        timed[node] = True
        for index in range(first[node], first[node + 1]):
            edge = order[index]
            other = target[edge]
            if start_s[node] + weight[edge] > start_s[other]:
                start_s[other] = start_s[node] + weight[edge]
                before[other] = node
            waiting[other] -= 1
            if waiting[other] == 0 and not stuck[other]:
                stack[depth] = other
                depth += 1
    return start_s, before, timed
