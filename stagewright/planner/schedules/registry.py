"""Every schedule family by name and alias.

`generate(name, request)` is the one way in: it finds the family, suggests the nearest name when there is none, makes
the orders and refuses them, with both numbers, when a rank holds more than the request's memory cap.
"""

from __future__ import annotations

import difflib

import numpy as np

from stagewright.planner.errors import InvalidArgument
from stagewright.planner.schedules import (
    ampnet,
    autopipe,
    avgpipe,
    bpipe,
    breadth_first,
    chimera,
    dapple,
    dhelix,
    distmm,
    dualpipe,
    dualpipe_v,
    dynapipe,
    flexpipe,
    gems,
    gpipe,
    graphpipe,
    interleaved,
    interleaved_zb,
    naive,
    one_f_one_b,
    one_f_one_b_v,
    opt_pipe,
    pipe_offload,
    pipedream,
    pipedream_2bw,
    pipefb,
    pipefisher,
    pipemare,
    seq1f1b,
    spectrain,
    terapipe,
    tessel,
    v_half,
    v_half_vocabulary,
    v_min,
    varuna,
    vocabulary,
    wave,
    wpipe,
    xpipe,
    zb_auto,
    zb_h1,
    zb_h2,
    zb_v,
)
from stagewright.planner.schedules.family import ScheduleFamily, ScheduleRequest
from stagewright.planner.schedules.peak import peak_activations
from stagewright.planner.schedules.schedule import Schedule

_FAMILIES: tuple[ScheduleFamily, ...] = (
    naive.FAMILY,
    gpipe.FAMILY,
    one_f_one_b.FAMILY,
    dapple.FAMILY,
    interleaved.FAMILY,
    breadth_first.FAMILY,
    gems.FAMILY,
    chimera.FAMILY,
    wave.FAMILY,
    zb_h1.FAMILY,
    zb_h2.FAMILY,
    zb_auto.FAMILY,
    interleaved_zb.FAMILY,
    zb_v.FAMILY,
    v_half.FAMILY,
    v_min.FAMILY,
    one_f_one_b_v.FAMILY,
    dualpipe.FAMILY,
    dualpipe_v.FAMILY,
    terapipe.FAMILY,
    seq1f1b.FAMILY,
    bpipe.FAMILY,
    autopipe.FAMILY,
    dynapipe.FAMILY,
    graphpipe.FAMILY,
    distmm.FAMILY,
    varuna.FAMILY,
    dhelix.FAMILY,
    tessel.FAMILY,
    pipefisher.FAMILY,
    vocabulary.FAMILY,
    v_half_vocabulary.FAMILY,
    pipefb.FAMILY,
    pipe_offload.FAMILY,
    opt_pipe.FAMILY,
    flexpipe.FAMILY,
    pipedream.FAMILY,
    pipedream_2bw.FAMILY,
    wpipe.FAMILY,
    ampnet.FAMILY,
    spectrain.FAMILY,
    xpipe.FAMILY,
    pipemare.FAMILY,
    avgpipe.FAMILY,
)


def families() -> tuple[ScheduleFamily, ...]:
    """Return all families in the order of the documentation."""
    return _FAMILIES


def family(name: str) -> ScheduleFamily:
    """Return the family of a name or alias, in any case; raises InvalidArgument with the nearest name."""
    wanted = name.strip().lower().replace("_", "-")
    by_name = {known: row for row in _FAMILIES for known in (row.name, *row.aliases)}
    if wanted in by_name:
        return by_name[wanted]
    nearest = difflib.get_close_matches(wanted, by_name, n=1, cutoff=0.4)
    raise InvalidArgument(
        f"there is no schedule {name!r}",
        field="schedule",
        hint=(f"did you mean {nearest[0]}? " if nearest else "") + "known: " + ", ".join(row.name for row in _FAMILIES),
    )


def generate(name: str, request: ScheduleRequest) -> Schedule:
    """Return the schedule of the named family; raises InvalidArgument for sizes or a cap that it cannot meet."""
    schedule = family(name).generate(request)
    if request.memory_cap is not None:
        _check_cap(schedule, request)
    return schedule


def _check_cap(schedule: Schedule, request: ScheduleRequest) -> None:
    assert request.memory_cap is not None
    peaks = peak_activations(schedule, request.costs)
    rank = int(np.argmax(peaks))
    if peaks[rank] > request.memory_cap * (1.0 + 1e-9):
        raise InvalidArgument(
            f"{schedule.name} holds {peaks[rank]:g} activations on rank {rank}, the cap is {request.memory_cap:g}",
            field="memory_cap",
            hint=f"give a cap of at least {peaks[rank]:g}, or take auto, v-half or v-min",
        )
