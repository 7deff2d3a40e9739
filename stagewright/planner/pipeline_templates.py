"""Pipeline templates (Oobleck, Jang et al., SOSP 2023): plans ready for every loss of nodes.

A template is the best pipeline (one replica) on n nodes. With templates for n0 .. n_max = N - f n0 nodes, every N' from
(f + 1) n0 to N is a sum of at least f + 1 template sizes: f of n0 nodes and one of N' - f n0 <= n_max. So losing at most f
nodes at once leaves a replica of every layer, and the nodes left are covered again while there are (f + 1) n0.

    cover of N' nodes   sizes n_1 >= n_2 >= ... with sum N', at least f + 1 of them (one, and some nodes idle, when fewer
                        than (f + 1) n0 nodes are left)
    batch               microbatches go one by one to the pipeline that then ends first
    step                max over pipelines of (first_i + T_i each_i), the plan simulated with T_i microbatches
                        + all-reduce of the fullest stage's gradients between the pipelines

Of all covers the one with the least estimated step is taken. Enumerating them is exponential in N' / n0; above
MOST_COVERS only those with the fewest different sizes are compared. States are not sharded over pipelines, since
their depths differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice, product

from stagewright.planner.cost.communication import collective_s
from stagewright.planner.cost.groups import GroupShape, Tier
from stagewright.planner.documents.cluster import Cluster
from stagewright.planner.documents.job import TrainingJob
from stagewright.planner.documents.plan import Plan
from stagewright.planner.documents.profile import ModelProfile
from stagewright.planner.documents.templates import Cover, Template, TemplateSet
from stagewright.planner.errors import Infeasible, InvalidArgument
from stagewright.planner.planning import make_plan
from stagewright.planner.prediction import evaluate

MOST_COVERS = 5000

Report = Callable[[str, int, int], None]


def pipeline_templates(
    profile: ModelProfile,
    cluster: Cluster,
    job: TrainingJob,
    *,
    tolerate: int,
    microbatch: int = 1,
    least_nodes: int | None = None,
    report: Report = lambda phase, done, total: None,
) -> TemplateSet:
    """Return templates and covers for a cluster of equal nodes.

    Raises
    ------
    InvalidArgument : for a mixed cluster, a batch the microbatch does not divide, or fewer than (tolerate + 1) n0 nodes.
    Infeasible : when no number of nodes holds a replica.
    """
    if cluster.is_mixed:
        raise InvalidArgument(
            f"cluster {cluster.name} has {len(cluster.groups)} groups, templates are for equal nodes", field="cluster"
        )
    if job.global_batch % microbatch:
        raise InvalidArgument(
            f"microbatch {microbatch} does not divide the global batch {job.global_batch}", field="microbatch"
        )
    total = cluster.groups[0].num_nodes
    found: dict[int, Template] = {}
    size = least_nodes or 1
    last = total
    while size <= last:
        report("templates", size, last)
        template = _template(profile, cluster, job, size, microbatch)
        if template is not None:
            found[size] = template
            last = min(last, largest_size(total, min(found), tolerate))
        elif found:
            break
        size += 1
    report("templates", last, last)
    if not found:
        raise Infeasible(f"no pipeline on 1 to {total} nodes holds {profile.name}", field="cluster")
    first = min(found)
    if total < (tolerate + 1) * first:
        raise InvalidArgument(
            f"to lose {tolerate} nodes takes {tolerate + 1} replicas of {first} nodes, the cluster has {total} nodes",
            field="tolerate",
            hint=f"tolerate at most {total // first - 1}, or take {(tolerate + 1) * first} nodes",
        )
    covers = tuple(
        best_cover(found, nodes, tolerate, job.global_batch // microbatch, cluster, profile)
        for nodes in range(total, first - 1, -1)
    )
    return TemplateSet(
        model=profile.name,
        cluster=cluster.name,
        global_batch=job.global_batch,
        microbatch=microbatch,
        tolerate=tolerate,
        least_nodes=first,
        templates=tuple(found[size] for size in sorted(found)),
        covers=covers,
        losses_checked=check_losses(covers[0].pipelines, tuple(found), tolerate, first),
    )


def largest_size(num_nodes: int, least_nodes: int, tolerate: int) -> int:
    """Return n_max = N - f n0, at least n0: with sizes n0 .. n_max every N' <= N is covered by f + 1 pipelines."""
    return max(least_nodes, num_nodes - tolerate * least_nodes)


def covers_of(num_nodes: int, sizes: Sequence[int], least: int) -> Iterator[tuple[int, ...]]:
    """Yield the multisets of at least `least` sizes that add up to `num_nodes`, each descending, the longest first size first."""
    ordered = sorted(set(sizes), reverse=True)

    def extend(left: int, most: int, chosen: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if left == 0:
            if len(chosen) >= least:
                yield chosen
            return
        for size in ordered:
            if size <= min(left, most):
                yield from extend(left - size, size, (*chosen, size))

    yield from extend(num_nodes, num_nodes, ())


def has_cover(num_nodes: int, sizes: tuple[int, ...], least: int) -> bool:
    """Tell whether at least `least` sizes add up to `num_nodes`; O(num_nodes * least * sizes)."""

    @cache
    def possible(left: int, wanted: int) -> bool:
        if left == 0:
            return wanted <= 0
        return any(size <= left and possible(left - size, max(wanted - 1, 0)) for size in sizes)

    return possible(num_nodes, least)


def usable_nodes(num_nodes: int, sizes: tuple[int, ...]) -> int:
    """Return the most nodes up to `num_nodes` that the sizes add up to; 0 for none."""
    return next((count for count in range(num_nodes, 0, -1) if has_cover(count, sizes, 1)), 0)


def check_losses(pipelines: Sequence[int], sizes: tuple[int, ...], tolerate: int, least_nodes: int) -> int:
    """Return how many losses of at most `tolerate` nodes were checked: one whole pipeline is left, and a cover exists.

    While (f + 1) n0 nodes are left the cover uses all of them in f + 1 pipelines; with fewer, one pipeline is enough and
    nodes may stay idle. Raises Infeasible, naming the loss, for one without either.
    """
    checked = 0
    for lost in product(*(range(min(size, tolerate) + 1) for size in pipelines)):
        if sum(lost) > tolerate:
            continue
        checked += 1
        left = sum(pipelines) - sum(lost)
        enough = left >= (tolerate + 1) * least_nodes
        covered = has_cover(left, sizes, tolerate + 1) if enough else usable_nodes(left, sizes) > 0
        if all(lost) or not covered:
            raise Infeasible(
                f"losing {list(lost)} nodes of pipelines of {list(pipelines)} nodes leaves {left} nodes that templates of "
                f"{sorted(sizes)} nodes cannot cover, or no whole replica",
                field="tolerate",
            )
    return checked


def best_cover(
    templates: Mapping[int, Template],
    num_nodes: int,
    tolerate: int,
    num_microbatches: int,
    cluster: Cluster,
    profile: ModelProfile,
) -> Cover:
    """Return the cover of least estimated step among those with enough pipelines, its step simulated."""
    used = usable_nodes(num_nodes, tuple(templates))
    least = tolerate + 1 if num_nodes >= (tolerate + 1) * min(templates) else 1
    choices = islice(covers_of(used, tuple(templates), least), MOST_COVERS)
    best: tuple[float, tuple[int, ...], tuple[int, ...]] | None = None
    for pipelines in choices:
        if len(pipelines) > num_microbatches:
            continue
        shares = split_batch([templates[size] for size in pipelines], num_microbatches)
        estimate = max(
            templates[size].first_s + share * templates[size].each_s
            for size, share in zip(pipelines, shares, strict=True)
        )
        if best is None or estimate < best[0]:
            best = (estimate, pipelines, shares)
    if best is None:
        raise Infeasible(
            f"{num_nodes} nodes have no cover by templates of {sorted(templates)} nodes with {least} to "
            f"{num_microbatches} pipelines",
            field="tolerate",
        )
    _, pipelines, shares = best
    steps = [
        evaluate(with_microbatches(templates[size].plan, share), profile).prediction.step_time_s
        for size, share in zip(pipelines, shares, strict=True)
    ]
    gradients = max(items.gradients for size in pipelines for items in templates[size].plan.prediction.memory)
    return Cover(
        num_nodes=num_nodes,
        pipelines=pipelines,
        microbatches=shares,
        step_time_s=max(steps) + _between(len(pipelines), gradients, cluster),
        tolerates=len(pipelines) - 1,
    )


def split_batch(templates: Sequence[Template], num_microbatches: int) -> tuple[int, ...]:
    """Return microbatches of each pipeline, at least one each: the next one goes to the pipeline that then ends first."""
    shares = [1] * len(templates)
    for _ in range(num_microbatches - len(templates)):
        ends = [
            (template.first_s + (share + 1) * template.each_s, place)
            for place, (template, share) in enumerate(zip(templates, shares, strict=True))
        ]
        shares[min(ends)[1]] += 1
    return tuple(shares)


def with_microbatches(plan: Plan, num_microbatches: int) -> Plan:
    """Return a pipeline's plan for another number of microbatches, its prediction unchanged."""
    spec = plan.schedule
    job = plan.job.model_copy(update={"global_batch": spec.microbatch * num_microbatches})
    return plan.model_copy(
        update={"job": job, "schedule": spec.model_copy(update={"num_microbatches": num_microbatches})}
    )


def _template(
    profile: ModelProfile, cluster: Cluster, job: TrainingJob, num_nodes: int, microbatch: int
) -> Template | None:
    group = cluster.groups[0]
    devices = num_nodes * group.devices_per_node
    pins = job.space.pins.model_copy(update={"dp": 1, "zero": 0, "microbatch": microbatch, "schedule": "1f1b"})
    share = max(1, round(job.global_batch * num_nodes / (group.num_nodes * microbatch)))
    part = job.model_copy(
        update={
            "global_batch": microbatch * share,
            "space": job.space.model_copy(update={"pins": pins, "schedules": ()}),
        }
    )
    nodes = group.model_copy(update={"num_nodes": num_nodes})
    plan = make_plan(profile, cluster.model_copy(update={"groups": (nodes,)}), part, num_devices=devices, top=0).plan
    if plan is None:
        return None
    depth = plan.schedule.num_ranks
    near, far = 2 * depth, 4 * depth
    steps = [evaluate(with_microbatches(plan, count), profile).prediction.step_time_s for count in (near, far)]
    each_s = (steps[1] - steps[0]) / (far - near)
    return Template(num_nodes=num_nodes, first_s=max(0.0, steps[0] - near * each_s), each_s=each_s, plan=plan)


def _between(num_pipelines: int, gradient_bytes: float, cluster: Cluster) -> float:
    """Return the seconds of summing the fullest stage's gradients over the pipelines."""
    if num_pipelines == 1:
        return 0.0
    link = cluster.groups[0].links[-1]
    return collective_s("all-reduce", gradient_bytes, GroupShape((Tier(num_pipelines, link),)))
