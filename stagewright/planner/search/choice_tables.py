"""What sets of choices cost at least, by stage: no candidate of a product of the sets undercuts it.

A bound by `stage_ranges` grows with every second and every byte of a stage. So with the least of each over a set of
choices, layer by layer, it bounds every choice of the set. A set that such a bound does not close is cut in two where
its choices differ most, in seconds or in the recomputation that their bytes may cost.

Recomputation: with levels k_l of layers l, s_l(k) bytes of a microbatch saved and c_l(k) seconds more than at the level
of least seconds, bytes short B of a microbatch and any price x >= 0 of a byte,

    sum_l c_l(k_l) = sum_l (x s_l(k_l) - (x s_l(k_l) - c_l(k_l))) >= x B - sum_l g_l(x)
    g_l(x) = max_k (x s_l(k) - c_l(k))

because the levels save at least B. Over a set of choices that is least with the least B and the largest g_l. Three
prices are taken: that of the best level of any layer, and those of both steps of the layers that can save most, so that
what a first level can't save is bought at the price of the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from stagewright.planner.search.layer_costs import LayerCosts
from stagewright.planner.search.order import Layout
from stagewright.planner.search.pricing import LayerClasses, Priced
from stagewright.planner.search.stage_ranges import NUM_PRICES, StageTables

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]

_SUMMED = ("forward", "input_grad", "weight_grad", "state", "step", "kept", "late", "full_kept", "full_late")
_FULL_RECOMPUTE = 1.0 / 3.0  # of a microbatch's seconds, about: the forward once more


@dataclass(frozen=True, eq=False)
class ChoiceTables:
    """Choices of a pool under an order: [n, C] by class of layers, `latency` [n], the last three [n, levels, C].

    The names are those of `StageTables`, before prefix sums.

    Parameters
    ----------
    slower : seconds of a level more than the one of least seconds takes.
    spared, spared_late : bytes of a microbatch less than that one keeps, before and after the input gradient.
    """

    forward: Floats
    input_grad: Floats
    weight_grad: Floats
    state: Floats
    step: Floats
    kept: Floats
    late: Floats
    full_kept: Floats
    full_late: Floats
    workspace: Floats
    latency: Floats
    slower: Floats
    spared: Floats
    spared_late: Floats

    @classmethod
    def of(cls, priced: Priced, levels: list[int], layout: Layout) -> ChoiceTables:
        """Return the tables of priced rows under the allowed recomputation levels."""
        return cls._of(
            priced.forward_s,
            priced.input_grad_s,
            priced.weight_grad_of(np.arange(len(priced)), layout),
            priced.state_bytes,
            priced.step_s,
            priced.latency_s,
            priced.recompute_s[:, levels],
            priced.kept_bytes[:, levels],
            priced.late_bytes[:, levels],
            np.minimum(priced.workspace_bytes, priced.split_workspace_bytes)[:, levels],
        )

    @classmethod
    def of_one(cls, costs: LayerCosts, levels: list[int], layout: Layout, classes: LayerClasses) -> ChoiceTables:
        """Return the tables of one choice from its layer costs."""
        first = classes.first

        def by_level(values: Floats) -> Floats:
            return values[levels][:, first][None]

        return cls._of(
            costs.forward_s[None, first],
            costs.input_grad_s[None, first],
            costs.weight_grad_of(layout)[None, first],
            costs.static_bytes[None, first],
            costs.step_s[None, first],
            np.array([costs.stage_latency_s]),
            by_level(costs.recompute_s),
            by_level(costs.kept_bytes),
            by_level(costs.late_bytes),
            by_level(np.minimum(costs.workspace_bytes, costs.split_workspace_bytes)),
        )

    @classmethod
    def _of(
        cls,
        forward: Floats,
        input_grad: Floats,
        weight_grad: Floats,
        state: Floats,
        step: Floats,
        latency: Floats,
        recompute: Floats,
        kept: Floats,
        late: Floats,
        workspace: Floats,
    ) -> ChoiceTables:
        base = np.lexsort((kept, recompute), axis=1)[:, :1]
        at_base, kept_base, late_base = (np.take_along_axis(row, base, axis=1) for row in (recompute, kept, late))
        return cls(
            forward=forward,
            input_grad=input_grad + at_base[:, 0],
            weight_grad=weight_grad,
            state=state,
            step=step,
            kept=kept.min(axis=1),
            late=late.min(axis=1),
            full_kept=kept_base[:, 0],
            full_late=late_base[:, 0],
            workspace=workspace.min(axis=1),
            latency=latency,
            slower=recompute - at_base,
            spared=kept_base - kept,
            spared_late=late_base - late,
        )

    def take(self, rows: Longs) -> ChoiceTables:
        """Return some of the choices."""
        return ChoiceTables(*(getattr(self, field.name)[rows] for field in fields(self)))

    def prices(self, shares: Floats, counts: Ints) -> tuple[Floats, Floats]:
        """Return prices of a byte [U, NUM_PRICES] and the most that a layer gains at them, [U, NUM_PRICES, C].

        Parameters
        ----------
        shares : [U], part of the live microbatches that wait for their input gradient.
        counts : layers of each class.
        """
        part = shares[:, None, None, None]
        saved = part * self.spared + (1.0 - part) * self.spared_late
        slower = np.broadcast_to(self.slower, saved.shape)
        best = _ratio(saved, slower).reshape(*saved.shape[:2], -1).max(axis=2, initial=0.0)
        # The class that can save most: its best level, and from there the best of those that save more.
        main = np.argmax(counts * saved.max(axis=2), axis=2)[:, :, None, None]
        own, own_slower = (np.take_along_axis(row, main, axis=3)[..., 0] for row in (saved, slower))
        ratio = _ratio(own, own_slower)
        first = np.argmax(ratio, axis=2)[:, :, None]
        further = own - np.take_along_axis(own, first, axis=2)
        second = _ratio(further, own_slower - np.take_along_axis(own_slower, first, axis=2)).max(axis=2)
        ratios = np.stack((best, ratio.max(axis=2), second), axis=2)
        each = np.divide(1.0, ratios, out=np.full_like(ratios, np.inf), where=ratios > 0)
        price = each.min(axis=1)
        price[~np.isfinite(price)] = 0.0
        gains = price[:, None, :, None, None] * saved[:, :, None] - slower[:, :, None]
        return price, np.maximum(gains.max(axis=(1, 3)), 0.0)

    def range_s(self, numbers: Floats, num_microbatches: int, num_ranks: int, live: float, room_bytes: float) -> Floats:
        """Return about what each choice takes for so many layers of each class spread over its ranks, [n].

        Recomputation is what bytes short of room cost at the mean rate of the cheapest levels; infinite where nothing
        fits. A guess, no bound.
        """
        time_s = (self.forward + self.input_grad + self.weight_grad) @ numbers
        most, least = (self.state @ numbers + live * (kept @ numbers) for kept in (self.full_kept, self.kept))
        part = np.clip((most - num_ranks * room_bytes) / np.maximum(most - least, 1e-30), 0.0, 1.0)
        extra_s = part * (self.slower.max(axis=1) @ numbers)
        whole_s = (num_microbatches * (time_s + extra_s) + self.step @ numbers) / num_ranks + self.latency
        return np.where(least > num_ranks * room_bytes, np.inf, whole_s)

    def spread(self, numbers: Ints, num_microbatches: int, num_ranks: int, live: float, room_bytes: float) -> Floats:
        """Return what sets the choices apart, [n, 4], about in seconds of a step: work, its end, states, activations."""
        time_s = num_microbatches * ((self.forward + self.input_grad + self.weight_grad) @ numbers) / num_ranks
        byte_s = _FULL_RECOMPUTE * time_s.min() / (num_ranks * room_bytes)
        kept = np.minimum(live * (self.full_kept @ numbers), 2.0 * num_ranks * room_bytes)
        return np.stack(
            (time_s, self.step @ numbers / num_ranks + self.latency, byte_s * (self.state @ numbers), byte_s * kept),
            axis=1,
        )


def _ratio(bytes_saved: Floats, seconds: Floats) -> Floats:
    """Return bytes a second where both are positive, else 0."""
    return np.divide(bytes_saved, seconds, out=np.zeros_like(bytes_saved), where=(seconds > 0) & (bytes_saved > 0))


def halves(values: Floats) -> tuple[Longs, Longs]:
    """Return rows of [n, k] in two sets that are not empty, cut in the middle of the column of widest range."""
    low, high = values.min(axis=0), values.max(axis=0)
    column = int(np.argmax(high - low))
    below = values[:, column] <= 0.5 * (low[column] + high[column])
    if below.all():
        below = np.arange(len(values)) < len(values) // 2
    return np.flatnonzero(below), np.flatnonzero(~below)


def stage_tables(
    sets: Sequence[ChoiceTables],
    num_ranks: Sequence[int],
    rooms: Sequence[float],
    layout: Layout,
    classes: LayerClasses,
) -> StageTables:
    """Return what stages cost at least when each pool takes any choice of its set.

    Parameters
    ----------
    num_ranks, rooms : stages of each pool, and bytes of one of its devices.
    """
    live = np.array([vectors[np.argmax(vectors[:, :, 0].sum(axis=1)), :, 0] for vectors in layout.live])
    shares = np.divide(live[:, 0], live.sum(axis=1), out=np.ones(len(live)), where=live.sum(axis=1) > 0)
    pool_of = np.repeat(np.arange(len(sets)), num_ranks)

    # Prefix sums over layers, [pools, names, L + 1].
    least = np.stack([[getattr(each, name).min(axis=0) for name in _SUMMED] for each in sets])[..., classes.of_layer]
    before = np.concatenate((np.zeros((*least.shape[:2], 1)), np.cumsum(least, axis=2)), axis=2)[pool_of]
    sums = {name: np.ascontiguousarray(before[:, place]) for place, name in enumerate(_SUMMED)}
    price = np.zeros((len(live), NUM_PRICES))
    gain = np.zeros((len(live), NUM_PRICES, len(classes.of_layer) + 1))
    for pool, each in enumerate(sets):
        stages = np.flatnonzero(pool_of == pool)
        different, where = np.unique(shares[stages], return_inverse=True)
        prices, gains = each.prices(different, classes.counts)
        price[stages] = prices[where]
        gain[stages, :, 1:] = np.cumsum(gains[..., classes.of_layer], axis=-1)[where]
    time = sums["forward"] + sums["input_grad"] + sums["weight_grad"]
    return StageTables(
        **sums,
        workspace=np.stack([each.workspace.min(axis=0)[classes.of_layer] for each in sets])[pool_of],
        price=price,
        gain=gain,
        latency=np.array([each.latency.min() for each in sets])[pool_of],
        live=np.ascontiguousarray(live[:, 0]),
        late_live=np.ascontiguousarray(live[:, 1]),
        room=np.repeat(np.array(rooms, dtype=np.float64), num_ranks),
        head=_least_before(time),
        head_forward=_least_before(sums["forward"]),
        rest=_least_behind(time),
    )


def _least_before(prefix: Floats) -> Floats:
    """Return for each stage the seconds of the layers before a start, each at its least over the stages before."""
    each = np.diff(prefix, axis=1)
    least = np.minimum.accumulate(each, axis=0)
    before = np.vstack((least[:1], least[:-1]))
    return np.concatenate((np.zeros((len(each), 1)), np.cumsum(before, axis=1)), axis=1)


def _least_behind(prefix: Floats) -> Floats:
    """Return for each stage the seconds of the layers from an end on, each at its least over the stages behind."""
    each = np.diff(prefix, axis=1)
    least = np.minimum.accumulate(each[::-1], axis=0)[::-1]
    behind = np.vstack((least[1:], least[-1:]))
    total = np.cumsum(behind[:, ::-1], axis=1)[:, ::-1]
    return np.concatenate((total, np.zeros((len(each), 1))), axis=1)
