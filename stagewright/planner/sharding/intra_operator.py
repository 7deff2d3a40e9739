"""The strategy of every operator of a layer, chosen together by an integer programme (Alpa, Zheng et al., OSDI 2022, 4.2).

    variables   s[v,i]      1 when node v (an operator, or a source tensor's home) takes its strategy i
                e[r,o,n]    share of read r (of a tensor, by an operator) that goes from layout o to layout n
                m[t,o,n]    1 when tensor t is brought from layout o to layout n at all
    minimise    sum_v sum_i work[v,i] s[v,i] + sum_t sum_o,n move[t,o,n] m[t,o,n]
    subject to  sum_i s[v,i] = 1                                             each node            `_nodes`
                sum_n e[r,o,n] = sum of s[writer,i] over strategies writing o   each read and o      `_reads`
                sum_o e[r,o,n] = sum of s[reader,j] over strategies reading n   each read and n      `_reads`
                m[t,o,n] >= e[r,o,n]                                         each read of t       `_reads`
                sum of bytes a device keeps <= memory                        once                 `_memory`

The products s[writer] s[reader] of Alpa's objective are linearised by e, whose margins are the strategies (a transport
polytope, tight at integer points), and stand between layouts instead of strategies, which keeps it small. Beyond the
paper, a tensor that several operators read in one layout is moved once (m). Gradients of sources end where their sources
lie, so a replicated parameter pays its all-reduce and a split one its reduce-scatter (the paper's ZeRO post-pass).

Exact for this cost: work and collectives in sequence, no overlap. Exponential in the worst case; a transformer layer with
its backward takes about a second on one axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import pulp

from stagewright.planner.errors import Infeasible, InvalidArgument
from stagewright.planner.sharding.layout import REPLICATED, Layout, Mesh, fits, num_shards, split
from stagewright.planner.sharding.operator_graph import OperatorGraph
from stagewright.planner.sharding.redistribution import Price, sent
from stagewright.planner.sharding.rules import Strategies, Strategy
from stagewright.planner.sharding.spmd import MoveCosts, SpmdProgram, lower


@dataclass(frozen=True)
class LayerProblem:
    """A layer to shard.

    Parameters
    ----------
    mesh, graph : the devices and the operators, with or without their backward.
    fixed : layouts of sources that are given, and of outputs that are asked for; other sources are free.
    price : what a collective's step costs, in the unit of the objective.
    price_per_flop : what a FLOP costs in that unit on one device.
    memory_bytes : what a device may hold of sources, their gradients and what the forward keeps for the backward.
    source_states : bytes held for each byte of a parameter (optimizer, master weights), the parameter included.
    divides_everything : every operator's work and every parameter must be shared by all devices (Tofu).
    given : strategies whose placements on the first axes are settled, one an operator; further axes are free.
    given_homes : likewise for sources.
    """

    mesh: Mesh
    graph: OperatorGraph
    fixed: Mapping[str, Layout]
    price: Price = sent
    price_per_flop: float = 0.0
    memory_bytes: float = float("inf")
    source_states: float = 1.0
    divides_everything: bool = False
    given: tuple[Strategy, ...] = ()
    given_homes: Mapping[str, Layout] = field(default_factory=dict)

    @cached_property
    def strategies(self) -> list[tuple[Strategy, ...]]:
        """What each operator may do."""
        found = Strategies(self.mesh, self.graph)
        choices = [found.of(operator) for operator in self.graph.operators]
        if self.divides_everything:
            choices = [tuple(item for item in row if item.num_workers == self.mesh.num_devices) for row in choices]
        if self.given:
            choices = [
                tuple(item for item in row if _begins(item, settled))
                for row, settled in zip(choices, self.given, strict=True)
            ]
        return choices

    def homes(self, name: str) -> list[Layout]:
        """Return the layouts a source may lie in."""
        if name in self.fixed:
            return [self.fixed[name]]
        dims = self.graph.tensors[name]
        whole = [] if self.divides_everything and name in self.graph.parameters else [REPLICATED]
        choices = [[*map(split, dims), *whole] for _ in self.mesh.axes]
        settled = self.given_homes.get(name, ())
        return [
            layout
            for layout in itertools.product(*choices)
            if fits(self.mesh, layout, dims, self.graph.sizes) and layout[: len(settled)] == settled
        ]

    def work(self, index: int, strategy: Strategy) -> float:
        """Return what an operator's share of work costs."""
        return self.price_per_flop * self.graph.flops(self.graph.operators[index]) / strategy.num_workers

    def kept_bytes(self, name: str, layout: Layout) -> float:
        """Return what a device holds of a tensor: a source's states, an activation that the backward reads, else 0."""
        whole = self.graph.size_bytes(name) / num_shards(self.mesh, layout)
        if name in self.graph.parameters:
            return whole * self.source_states
        return whole if name in self.graph.inputs or name in self._kept else 0.0

    @cached_property
    def _kept(self) -> set[str]:
        first = self.graph.backward_from
        if first is None:
            return set()
        written = {operator.output for operator in self.graph.operators[:first]}
        return {name for operator in self.graph.operators[first:] for name in operator.inputs if name in written}

    def ends(self, homes: Mapping[str, Layout]) -> dict[str, Layout]:
        """Return where outputs must end: as asked, gradients of sources where these lie."""
        ends = {name: layout for name, layout in self.fixed.items() if name in self.graph.outputs}
        return {**ends, **{self.graph.gradients[name]: homes[name] for name in self.graph.gradients}}


@dataclass(frozen=True)
class LayerSharding:
    """The chosen strategies.

    Parameters
    ----------
    chosen : a strategy for each operator.
    homes : the layout of each source.
    cost, bound : objective and the solver's proved bound on it.
    memory_bytes : what a device holds.
    """

    chosen: tuple[Strategy, ...]
    homes: Mapping[str, Layout]
    cost: float
    bound: float
    memory_bytes: float
    program: SpmdProgram


def shard_layer(problem: LayerProblem, *, limit_s: float = 60.0) -> LayerSharding:
    """Return the cheapest strategies, proved by the solver within 1e-6 unless the limit comes first.

    Raises
    ------
    Infeasible : when no choice fits the memory.
    """
    return _Programme(problem).solve(limit_s)


def brute_force(problem: LayerProblem) -> float:
    """Return the least cost over every combination of strategies and homes: the oracle of small graphs."""
    graph = problem.graph
    best = float("inf")
    for homes in itertools.product(*(problem.homes(name) for name in graph.sources)):
        lies = dict(zip(graph.sources, homes, strict=True))
        for chosen in itertools.product(*problem.strategies):
            if _memory(problem, chosen, lies) <= problem.memory_bytes:
                best = min(best, _cost(problem, chosen, lies)[0])
    return best


def _begins(strategy: Strategy, settled: Strategy) -> bool:
    """Tell whether a strategy agrees with one of fewer axes."""
    count = len(settled.output)
    pairs = zip((*strategy.inputs, strategy.output), (*settled.inputs, settled.output), strict=True)
    return all(layout[:count] == other for layout, other in pairs)


def _cost(
    problem: LayerProblem, chosen: tuple[Strategy, ...], homes: Mapping[str, Layout]
) -> tuple[float, SpmdProgram]:
    program = lower(problem.mesh, problem.graph, chosen, homes, problem.ends(homes), price=problem.price)
    work = sum(problem.work(index, strategy) for index, strategy in enumerate(chosen))
    return program.cost(problem.price) + work, program


def _memory(problem: LayerProblem, chosen: tuple[Strategy, ...], homes: Mapping[str, Layout]) -> float:
    lies = dict(homes)
    lies.update(
        {operator.output: strategy.output for operator, strategy in zip(problem.graph.operators, chosen, strict=True)}
    )
    return sum(problem.kept_bytes(name, layout) for name, layout in lies.items())


class _Programme:
    """The integer programme of one problem."""

    def __init__(self, problem: LayerProblem) -> None:
        self._problem = problem
        graph = problem.graph
        self._strategies = problem.strategies
        self._homes = {name: problem.homes(name) for name in graph.sources}
        for name, homes in self._homes.items():
            if not homes:
                raise InvalidArgument(f"no layout divides {name!r}", field="graph", hint="make its sizes divisible")
        self._model = pulp.LpProblem("shard_layer", pulp.LpMinimize)
        self._terms: list[pulp.LpVariable] = []
        self._nodes()
        self._reads()
        self._memory_row()
        self._model += pulp.lpSum(self._terms)

    def _nodes(self) -> None:
        graph = self._problem.graph
        self._takes = [
            [pulp.LpVariable(f"s_{index}_{i}", cat=pulp.LpBinary) for i in range(len(found))]
            for index, found in enumerate(self._strategies)
        ]
        self._lies = {
            name: [pulp.LpVariable(f"h_{number}_{i}", cat=pulp.LpBinary) for i in range(len(self._homes[name]))]
            for number, name in enumerate(graph.sources)
        }
        for variables in (*self._takes, *self._lies.values()):
            self._model += pulp.lpSum(variables) == 1
        for index, (variables, found) in enumerate(zip(self._takes, self._strategies, strict=True)):
            self._terms += [
                self._problem.work(index, strategy) * variable
                for variable, strategy in zip(variables, found, strict=True)
            ]

    def _written(self, name: str) -> dict[Layout, list[pulp.LpVariable]]:
        """Return the variables that put a tensor in each layout when it is written."""
        index = self._problem.graph.producer.get(name)
        if index is None:
            return {layout: [item] for layout, item in zip(self._homes[name], self._lies[name], strict=True)}
        found: dict[Layout, list[pulp.LpVariable]] = {}
        for strategy, variable in zip(self._strategies[index], self._takes[index], strict=True):
            found.setdefault(strategy.output, []).append(variable)
        return found

    def _all_reads(self) -> dict[str, list[dict[Layout, list[pulp.LpVariable]]]]:
        """Return, for each tensor, the variables of each read by the layout that they need."""
        graph = self._problem.graph
        reads: dict[str, list[dict[Layout, list[pulp.LpVariable]]]] = {name: [] for name in graph.tensors}
        for index, operator in enumerate(graph.operators):
            for position, name in enumerate(operator.inputs):
                found: dict[Layout, list[pulp.LpVariable]] = {}
                for strategy, variable in zip(self._strategies[index], self._takes[index], strict=True):
                    found.setdefault(strategy.inputs[position], []).append(variable)
                reads[name].append(found)
        for name, gradient in graph.gradients.items():
            reads[gradient].append(
                {layout: [item] for layout, item in zip(self._homes[name], self._lies[name], strict=True)}
            )
        for name, layout in self._problem.fixed.items():
            if name in graph.outputs:
                reads[name].append({layout: [1.0]})
        return reads

    def _reads(self) -> None:
        moves = MoveCosts(self._problem.mesh, self._problem.graph, self._problem.price)
        for number, (name, reads) in enumerate(self._all_reads().items()):
            written = self._written(name)
            moved: dict[tuple[Layout, Layout], pulp.LpVariable] = {}
            for position, needed in enumerate(reads):
                shares = {
                    (before, after): pulp.LpVariable(f"e_{number}_{position}_{i}_{j}", 0.0, 1.0)
                    for i, before in enumerate(written)
                    for j, after in enumerate(needed)
                }
                for before, variables in written.items():
                    self._model += pulp.lpSum(shares[before, after] for after in needed) == pulp.lpSum(variables)
                for after, variables in needed.items():
                    self._model += pulp.lpSum(shares[before, after] for before in written) == pulp.lpSum(variables)
                for (before, after), share in shares.items():
                    cost = moves(name, before, after)
                    if cost <= 0.0:
                        continue
                    if len(reads) == 1:
                        self._terms.append(cost * share)
                        continue
                    if (before, after) not in moved:
                        moved[before, after] = pulp.LpVariable(f"m_{number}_{len(moved)}", 0.0, 1.0)
                        self._terms.append(cost * moved[before, after])
                    self._model += moved[before, after] >= share

    def _memory_row(self) -> None:
        problem = self._problem
        if problem.memory_bytes == float("inf"):
            return
        terms = []
        for name in problem.graph.tensors:
            for layout, variables in self._written(name).items():
                size = problem.kept_bytes(name, layout) / problem.memory_bytes
                terms += [size * variable for variable in variables] if size else []
        self._model += pulp.lpSum(terms) <= 1.0

    def solve(self, limit_s: float) -> LayerSharding:
        """Return the solution; raises Infeasible when nothing fits the memory."""
        self._model.solve(pulp.HiGHS(msg=False, threads=1, gapRel=1e-6, timeLimit=limit_s))
        if self._model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
            least = sum(
                min(self._problem.kept_bytes(name, layout) for layout in self._written(name))
                for name in self._problem.graph.tensors
            )
            raise Infeasible(
                f"no strategy fits {self._problem.memory_bytes:.4g} bytes; the least of each tensor adds up to {least:.4g}",
                field="memory_bytes",
                hint="use more devices or a smaller microbatch",
            )
        chosen = tuple(
            found[max(range(len(found)), key=lambda i: variables[i].value())]
            for found, variables in zip(self._strategies, self._takes, strict=True)
        )
        homes = {
            name: self._homes[name][max(range(len(variables)), key=lambda i: variables[i].value())]
            for name, variables in self._lies.items()
        }
        cost, program = _cost(self._problem, chosen, homes)
        proved = self._model.sol_status == pulp.LpSolutionOptimal
        bound = min(cost, float(self._model.solverModel.getInfo().mip_dual_bound)) if not proved else cost
        return LayerSharding(chosen, homes, cost, bound, _memory(self._problem, chosen, homes), program)
