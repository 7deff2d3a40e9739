"""A rank's peak, action by action, on instances a hand can add up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stagewright.planner.schedules.action import Kind, parse_action
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.lowering import lower
from stagewright.planner.schedules.registry import generate
from stagewright.planner.schedules.schedule import encode
from stagewright.planner.simulation.peak import (
    GradientPhase,
    Reduction,
    StageBytes,
    message_bytes_beside,
    peak_activations,
    reductions_behind,
)


def stage(kept, workspace, late=None, split_workspace=None):
    """Return the bytes of a stage's layers."""
    late = np.zeros(len(kept)) if late is None else np.array(late, dtype=float)
    split = workspace if split_workspace is None else split_workspace
    return StageBytes(np.array(kept, dtype=float), late, np.array(workspace, dtype=float), np.array(split, dtype=float))


def peaks(name, stages, *, ranks=2, microbatches=4, chunks=1):
    """Return the peaks of a schedule."""
    return peak_activations(generate(name, ScheduleRequest(ranks, microbatches, num_chunks=chunks)), stages)


def test_a_workspace_counts_above_what_the_layers_before_it_keep():
    """One microbatch at a time: 10 + 1 with the second layer's 5 is 16; the first layer's 20 comes before it, 30."""
    assert peaks("1f1b", [stage([10, 1], [20, 5])], ranks=1).tolist() == [30]
    assert peaks("1f1b", [stage([1, 10], [5, 20])], ranks=1).tolist() == [31]


def test_microbatches_in_flight_count_beside_the_action():
    """1F1B on two ranks holds two microbatches on the first and one on the last; GPipe holds all four."""
    stages = [stage([10], [3]), stage([10], [3])]
    assert peaks("1f1b", stages).tolist() == [2 * 10 + 3, 10 + 3]
    assert peaks("gpipe", stages).tolist() == [4 * 10 + 3, 4 * 10 + 3]


def test_the_largest_workspace_need_not_meet_the_most_that_lives():
    """Interleaved: rank 1 holds stages 1 and 3; stage 3's workspace of 100 meets what stage 1 keeps, never all of rank 0's."""
    stages = [stage([10], [0]), stage([10], [0]), stage([10], [100]), stage([10], [0])]
    schedule = generate("interleaved", ScheduleRequest(2, 4, num_chunks=2))
    found = peak_activations(schedule, stages)
    live, least, most = 0.0, 0.0, 0.0
    for step in schedule.actions(0):
        for action in step:
            if action.kind.name == "F":
                live += 10
            most = max(most, live)
            if action.stage == 2:
                least = max(least, live + 100)
            if action.kind.name == "B":
                live -= 10
    assert found[0] == max(least, most)


def test_an_input_gradient_leaves_what_waits_behind_it():
    """ZB-H1, one rank, one microbatch, two layers that keep 1 and wait with 8: I holds 1 + 8 + workspace, then 16; W none more."""
    stages = [stage([1, 1], [8, 8], late=[8, 8], split_workspace=[3, 0])]
    # second layer: 1 + max(1, 8) + 0; first layer: max(1, 8) + 3 + 8 behind it; forwards: 1 + 1 + 8
    assert peaks("zb-h1", stages, ranks=1, microbatches=1).tolist() == [19]


def test_forwards_and_weight_gradients_have_workspaces_of_their_own():
    """Kept 4 and 6, late 3 and 5, one microbatch: a forward needs 4 + 6 + 1, an input gradient 4 + 6 + 2, a weight gradient 3 + 5 + w."""
    made = stage([4, 6], [20, 20], late=[3, 5], split_workspace=[2, 2])
    for first, most in ((0, 12), (7, 15)):
        own = replace(made, forward_workspace=np.array([1.0, 1.0]), late_workspace=np.array([first, 9.0]))
        expected = max(most, 5 + 9)  # the second layer's products are made when the first layer's have been
        assert peaks("zb-h1", [own], ranks=1, microbatches=1).tolist() == [expected]
    assert peaks("zb-h1", [made], ranks=1, microbatches=1).tolist() == [4 + 6 + 20]  # not told from a backward's


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipe-v", "chimera", "seq1f1b"])
def test_no_peak_is_above_the_sum_of_both_maxima(name):
    """With one layer a stage, the peak lies between the most that lives and that plus the largest workspace."""
    chunks = 2 if name in ("interleaved", "zb-v", "dualpipe-v") else 1
    slices = 2 if name == "seq1f1b" else 1
    schedule = generate(name, ScheduleRequest(2, 8, num_chunks=chunks, num_slices=slices))
    generator = np.random.default_rng(7)
    kept = generator.integers(1, 20, schedule.num_stages).astype(float)
    workspace = generator.integers(1, 20, schedule.num_stages).astype(float)
    bare = peak_activations(schedule, [stage([k], [0], late=[k / 2]) for k in kept])
    full = peak_activations(schedule, [stage([k], [w], late=[k / 2]) for k, w in zip(kept, workspace, strict=True)])
    assert bare is not None and full is not None
    assert (bare <= full).all() and (full <= bare + workspace.max()).all()


def test_other_actions_are_left_to_the_ledger():
    schedule = generate("bpipe", ScheduleRequest(4, 8))
    assert peak_activations(schedule, [stage([1], [1])] * schedule.num_stages) is None


def test_a_message_stands_beside_the_action_in_front_of_the_one_that_takes_it():
    """1F1B on two ranks. The last one runs F0 B0 F1 B1 F2 B2 F3 B3; a B has the next F's input beside it."""
    schedule = generate("1f1b", ScheduleRequest(2, 4))
    lowered = lower(schedule, StageCosts.uniform(2), merge="none", optimizer=False)
    first, last = message_bytes_beside(lowered, np.array([5.0]))
    assert [str(action) for step in schedule.actions(0) for action in step] == [
        "0F0",
        "0F1",
        "0B0",
        "0F2",
        "0B1",
        "0F3",
        "0B2",
        "0B3",
    ]
    assert first.tolist() == [0, 5, 0, 5, 0, 5, 5, 0]
    assert last.tolist() == [5, 5, 0, 5, 0, 5, 0, 0]  # F1's input comes as F0 ends: its receive is posted with F0
    stages = [stage([10], [3]), stage([10], [3])]
    assert peak_activations(schedule, stages, [first, last]).tolist() == [2 * 10 + 3 + 5, 10 + 3 + 5]


def test_what_is_sent_stands_beside_the_weight_gradients_up_to_the_next_message_taken():
    """ZB-H1's last rank runs F I W in turn, and sends the gradient of I to the stage before."""
    lowered = lower(generate("zb-h1", ScheduleRequest(2, 4)), StageCosts.uniform(2), merge="none", optimizer=False)
    first, last = message_bytes_beside(lowered, np.array([5.0]))
    order = [action for step in lowered.actions(1) for action in step if action.kind.name in "FIW"]
    assert [action.kind.name for action in order[:6]] == ["F", "I", "W", "F", "I", "W"]
    received = [5, 5, 5, 0] + [0] * (len(order) - 4)  # F1's input comes as F0 ends, and is taken by F1
    assert last[2] == received[2] + 5
    after = [at for at, action in enumerate(order) if action.kind.name == "W" and order[at - 1].kind.name == "I"]
    assert last[after[-1]] == 5  # of the last microbatch nothing else is on its way
    assert first[-1] == 0  # the first stage sends no gradient


def test_what_a_later_stage_of_the_same_rank_takes_stands_beside_what_runs_meanwhile():
    """ZB-V turns on the last rank; the first rank's stages 0 and 3 have no edge between them."""
    schedule = generate("zb-v", ScheduleRequest(2, 4, num_chunks=2))
    lowered = lower(schedule, StageCosts.uniform(4), merge="none", optimizer=False)
    found = message_bytes_beside(lowered, np.array([0.0, 7.0, 0.0]))
    assert found[0].tolist() == [0.0] * len(found[0])
    order = [action for step in schedule.actions(1) for action in step]
    units = {(action.kind.name, action.stage, action.microbatch): at for at, action in enumerate(order)}
    expected = np.zeros(len(order))
    for microbatch in range(4):
        expected[units["F", 1, microbatch] + 1 : units["F", 2, microbatch]] += 7
        expected[units["I", 2, microbatch] + 1 : units["I", 1, microbatch]] += 7
    assert found[1].tolist() == expected.tolist() and expected.any()


def test_gradients_of_a_stage_are_reduced_beside_what_other_units_of_its_rank_keep():
    """Interleaved, the last rank: stage 3 is done while two microbatches of stage 1 are still to run back."""
    schedule = generate("interleaved", ScheduleRequest(2, 4, num_chunks=2))
    lowered = lower(schedule, StageCosts.uniform(4), data_parallel=True, merge="none")
    stages = [stage([10], [3]) for _ in range(4)]
    found = {}
    for stays in (0.0, 100.0):
        behind = reductions_behind(lowered, [Reduction(100.0, stays, 50.0 + index) for index in range(4)])
        names = [("step" if each.is_step else "reduction", each.reduction.stepped) for each in behind[1]]
        assert names == [("reduction", 53), ("reduction", 51), ("step", 51), ("step", 53)]
        found[stays] = peak_activations(schedule, stages, None, behind)[1]
    num_actions = len(schedule.orders[1])
    left = num_actions - behind[1][0].position  # backwards of stage 1 behind the reduction, each of a unit that is kept
    assert left > 0
    bare = peak_activations(schedule, stages)[1]
    assert found[0.0] == max(bare, left * 10 + 100)
    # one that is waited for later stands beside these backwards, the other reduction, and the other stage's step
    assert found[100.0] == max(bare, left * 10 + 3 + 100, 100 + 100, 100 + 51)


def test_whole_gradients_come_as_a_layers_kept_bytes_go():
    """Two layers that keep 1 and 10; gradients of 4 and 20, 30 on their way: 1 + 20 + w, then 4 + w + 30, or twice 20."""
    bare = stage([1, 10], [2, 3])
    phases = tuple(
        (GradientPhase(kept, max(kept, gradients) + workspace, gradients, scattered), GradientPhase(0.0, 0.0))
        for kept, workspace, gradients, scattered in ((1.0, 2.0, 4.0, 6.0), (10.0, 3.0, 20.0, 30.0))
    )
    passing = replace(bare, phases=phases)
    assert peak_activations(generate("1f1b", ScheduleRequest(1, 2)), [passing]).tolist() == [
        max(1 + 2 * 20, 4 + 2 + 30)
    ]


def test_what_a_norm_computes_behind_its_layers_last_gradients_stands_beside_these_on_their_way():
    """A first layer whose gradients of 20 leave while 2 more are there, 30 on their way beside the 7 of a norm's rest."""
    phases = (GradientPhase(11.0, 21.0, 20.0, 30.0), GradientPhase(2.0, 7.0))
    given = replace(stage([10], [3]), phases=(phases,))
    assert given.need(Kind.B, 1.0) == max(2 + 2 * 20, 7 + 30)


def test_layers_without_waiting_products_scatter_in_the_input_gradient():
    """An embedding's gradients of 20 leave in I, beside the 8 that wait behind it; those of a layer with products that wait in W."""
    phases = ((GradientPhase(0.0, 20.0, 20.0, 30.0), GradientPhase(0.0, 0.0)),) * 2
    given = replace(stage([0, 10], [0, 3], late=[0, 8]), phases=phases)
    assert given.need(Kind.I, 1.0) == 8 + 2 * 20
    assert given.need(Kind.W, 1.0) == 2 * 20


def test_weight_gradients_in_a_row_make_theirs_beside_what_the_last_one_scattered_and_a_workspace():
    """Two layers with gradients of 6, of which 15 are on their way; a GPT in bf16 under ZB-V and ZeRO-3 was 8 % low."""
    phases = ((GradientPhase(0.0, 6.0, 6.0, 15.0), GradientPhase(0.0, 0.0)),) * 2
    given = replace(stage([4, 4], [1, 1], late=[3, 2]), phases=phases, beside_product=np.array([10.0, 9.0]))
    # The first layer's beside what waits of the last, then those of both.
    assert given.made(1.0) == max(6 + 10 + 2, 2 * 6 + 9)
    # A product of 8 is made while its layer's operands wait still: a Llama's last rank under V-Min was 2 % low.
    assert replace(given, late_workspace=np.array([8.0, 20.0])).made(1.0) == 6 + 2 + 20
    assert given.on_its_way == 15
    for order, expected in (("0I0 0I1 0W0 0W1", 15 + 21), ("0I0 0W0 0I1 0W1", 8 + 21)):
        rows = encode([parse_action(text) for text in ("0F0 0F1 " + order).split()])
        schedule = replace(generate("gpipe", ScheduleRequest(1, 2)), orders=(rows,))
        assert (
            peak_activations(schedule, [replace(given, workspace=np.zeros(2), split_workspace=np.zeros(2))]) == expected
        )


def test_weights_that_arrive_stand_beside_the_layer_at_work_and_its_next_one_only():
    """Three layers of weights 1, 5 and 2 that keep 10 each; those of the next one come in a copy."""
    bare = stage([10, 10, 10], [3, 3, 3])
    given = StageBytes(
        bare.kept,
        bare.late,
        bare.workspace,
        bare.split_workspace,
        whole=np.array([1.0, 5.0, 2.0]),
        copied=np.array([1.0, 5.0, 2.0]),
    )
    # Its own copies are there until it begins: those of 1 beside 10, of 2 and 5 beside 30.
    assert given.need(Kind.F, 1.0) == max(10 + 3 + 1 + 2 * 5, 20 + 5 + 5 + 2 * 2, 30 + 3 + 2)
    assert given.need(Kind.B, 1.0) == max(30 + 3 + 2 + 2 * 5, 20 + 5 + 5 + 2 * 1, 30 + 2 * (2 + 5))
    waiting = replace(given, late=np.array([4.0, 6.0, 7.0]))  # behind the first layer those of the others
    assert waiting.need(Kind.I, 1.0) == max(
        30 + 3 + 2 + 2 * 5, 20 + 5 + 5 + 2 * 1 + 7, 10 + 3 + 1 + 6 + 7, 30 + 2 * (2 + 5)
    )
    heavy = replace(given, copied=np.array([1.0, 5.0, 20.0]))
    assert heavy.need(Kind.B, 1.0) == 30 + (2 + 20) + (5 + 5)
    nothing = np.zeros(3)
    for gathered in (replace(bare, at_once=8.0), replace(bare, whole=nothing, copied=nothing, at_once=8.0)):
        assert gathered.need(Kind.B, 1.0) == gathered.need(Kind.F, 1.0) == 30 + 3 + 8


def test_gradients_of_experts_leave_before_those_of_the_rest_of_their_layer():
    """Two layers of experts (gradients of 6, 15 on their way) and of all else (2, 5): never more than one kind is on its way."""
    bare = stage([4, 4], [1, 1])
    phases = (GradientPhase(4.0, 7.0, 6.0, 15.0), GradientPhase(0.0, 2.0, 2.0, 5.0), GradientPhase(0.0, 0.0))
    given = replace(bare, phases=(phases, phases), late=np.array([1.0, 1.0]))
    # The last layer's experts are on their way beside its other gradients.
    assert given.need(Kind.B, 1.0) == 4 + 2 + 15
    # A weight gradient lets all other gradients leave first: 6 of the last layer's experts wait for those of the first.
    assert given.need(Kind.W, 1.0) == 6 + 15


def test_gradients_that_nothing_defers_stay_until_a_weight_gradient():
    """Two layers of stacks of experts, 6 and 5, of which products wait too: later units add to what stays."""
    bare = stage([10, 10], [3, 3], late=[2, 2])
    given = replace(bare, staying=np.array([6.0, 5.0]))
    assert given.need(Kind.I, 1.0) == max(10 + 10 + 3, 10 + 3 + 2 + 5)
    assert given.need(Kind.I, 1.0, is_first=False) == 10 + 10 + 3
    assert given.need(Kind.W, 1.0) == 2 + 2 + 6 + 5
    assert given.need(Kind.B, 1.0) == given.need(Kind.F, 1.0) == bare.need(Kind.B, 1.0)
    order = encode([parse_action(text) for text in ("0F0", "0F1", "0I0", "0I1", "0W0", "0W1")])
    schedule = replace(generate("zb-h1", ScheduleRequest(1, 2)), orders=(order,))
    # The second input gradient runs beside what waits of the first, 4, and its gradients.
    assert peak_activations(schedule, [given]).tolist() == [max(20 + 23, 4 + 11 + 23)]
    heavy = replace(given, staying=np.array([6.0, 25.0]))
    assert peak_activations(schedule, [heavy]).tolist() == [max(20 + 10 + 3 + 2 + 25, 4 + 31 + 23)]


def test_experts_gradients_that_leave_by_themselves_do_so_in_the_input_gradient():
    """Divided experts in a stack (6, 15 on their way) leave in I, all else (2, 5) in W."""
    phases = (
        GradientPhase(4.0, 7.0, 6.0, 15.0, by_input=True),
        GradientPhase(0.0, 2.0, 2.0, 5.0),
        GradientPhase(0.0, 0.0),
    )
    given = replace(stage([4], [1], late=[1]), phases=(phases,))
    assert given.need(Kind.I, 1.0) == max(4 + 1, 7, 15 + 1)
    assert given.need(Kind.W, 1.0) == 5
