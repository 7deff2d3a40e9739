"""What a target format can express, as a union of parts of the search space.

A format that needs every layer to recompute alike is the union of one part a level; one that always divides the
vocabulary with tensor parallelism is the part without tensor parallelism and the part with both. Parts are disjoint but
for plans that are the same in two of them. The exporters say of each field whether it came through exactly; a plan of
these parts comes through exactly in all that it chose.

    megatron-args   1F1B, interleaved; ZeRO 0 and 1; one recomputation level; the vocabulary divided where tp > 1
    deepspeed       1F1B, one chunk; ZeRO 2 and 3 without a pipeline only; no or full recomputation; no sequence or
                    context parallelism (AutoTP has no regions, and all of its context parallelism is Ulysses)
    torch-csv, chrome-trace, svg, html   everything
"""

from __future__ import annotations

from collections.abc import Mapping

from stagewright.planner.documents.job import Pins, SearchSpace, TrainingJob
from stagewright.planner.documents.profile import Recompute
from stagewright.planner.errors import InvalidArgument

Changes = Mapping[str, object]

_ONE_LEVEL: tuple[Changes, ...] = tuple({"recompute": level} for level in Recompute)
_NONE_OR_FULL: tuple[Changes, ...] = ({"recompute": Recompute.NONE}, {"recompute": Recompute.FULL})
_VOCABULARY: tuple[Changes, ...] = ({"tp": 1}, {"vocab_parallel": "on"})

TARGETS: Mapping[str, tuple[tuple[str, ...], tuple[tuple[Changes, tuple[int, ...]], ...]]] = {
    "megatron-args": (
        ("1f1b", "interleaved"),
        tuple(({**level, **vocabulary}, (0, 1)) for level in _ONE_LEVEL for vocabulary in _VOCABULARY),
    ),
    "deepspeed": (
        ("1f1b",),
        tuple(
            ({**level, **depth, "sp": "off", "cp": 1}, zeros)
            for level in _NONE_OR_FULL
            for depth, zeros in (({"pp": 1}, (0, 1, 2, 3)), ({}, (0, 1)))
        ),
    ),
    "torch-csv": ((), (({}, (0, 1, 2, 3)),)),
    "chrome-trace": ((), (({}, (0, 1, 2, 3)),)),
    "svg": ((), (({}, (0, 1, 2, 3)),)),
    "html": ((), (({}, (0, 1, 2, 3)),)),
}


def target_jobs(job: TrainingJob) -> list[TrainingJob] | None:
    """Return the job on each part of its target's space; None without a target.

    Raises InvalidArgument for a target whose limits are not known. A part that contradicts the job's own pins or leaves no
    ZeRO stage or schedule is left out; without any part left the list holds the job with an empty space.
    """
    space = job.space
    if space.target is None:
        return None
    if space.target not in TARGETS:
        raise InvalidArgument(
            f"what {space.target} can express is not known to the search",
            field="target",
            hint="known: " + ", ".join(TARGETS),
        )
    schedules, parts = TARGETS[space.target]
    found = []
    for changes, zeros in parts:
        pins = _merged(space.pins, changes)
        zero = tuple(stage for stage in space.zero if stage in zeros)
        names = tuple(name for name in space.schedules if name in schedules) if space.schedules and schedules else None
        if pins is None or not zero or names == ():
            continue
        update = {"pins": pins, "zero": zero, "target": None}
        update["schedules"] = names if names is not None else (schedules or space.schedules)
        if pins.schedule is not None and schedules and pins.schedule not in schedules:
            continue
        if pins.recompute is not None and pins.recompute not in space.recompute:
            continue
        found.append(_in(job, update))
    return found or [_in(job, {"target": None, "zero": ()})]


def _merged(pins: Pins, changes: Changes) -> Pins | None:
    """Return the pins with a part's own; None where they contradict each other."""
    if any(getattr(pins, name) not in (None, value) for name, value in changes.items()):
        return None
    return pins.model_copy(update=dict(changes))


def _in(job: TrainingJob, update: Mapping[str, object]) -> TrainingJob:
    space: SearchSpace = job.space.model_copy(update=dict(update))
    return job.model_copy(update={"space": space})
