"""Orders, layouts and schedules that searches of this process have made: they depend on the family and its sizes alone.

A later search over the same sizes, of whatever model and cluster, finds them made, those of forks too. What was not asked
for the longest time goes first where they take more than MOST_BYTES. Nothing of a search's answer depends on what is found
here, only its time.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields, replace
from functools import lru_cache
from threading import Lock
from typing import Any, cast

import numpy as np

from stagewright.planner.schedules.action import Kind
from stagewright.planner.schedules.costs import StageCosts
from stagewright.planner.schedules.family import ScheduleRequest
from stagewright.planner.schedules.registry import generate
from stagewright.planner.schedules.schedule import KIND, MICROBATCH, STAGE, Schedule
from stagewright.planner.search.order import Layout, Order, OrderKey, compile_search_order, layout_of, outline_of
from stagewright.planner.search.space import FamilyRule
from stagewright.planner.simulation.simulate import action_times

MOST_BYTES = 512 << 20
MOST_LEFT_BYTES = 128 << 20

_Place = tuple[str, OrderKey, FamilyRule]
Made = list[tuple[_Place, Layout | Schedule]]


class OrderStore:
    """What was made, the latest asked for last, in at most so many bytes."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self.num_bytes = 0
        self._made: OrderedDict[_Place, Layout | Schedule] = OrderedDict()
        self._lock = Lock()
        self._known_before: frozenset[_Place] = frozenset()  # in a fork

    def order(self, key: OrderKey, rule: FamilyRule) -> Order:
        """Return the compiled order of a family at some sizes; raises InvalidArgument when it refuses them.

        Where live vectors repeat, those of few microbatches are the order's own.
        """

        def make() -> Order:
            schedule = _generated(key, rule)
            return compile_search_order(schedule, key, self.layout(key, rule) if rule.repeats else None)

        return cast(Order, self._kept("order", key, rule, make))

    def exact_order(self, key: OrderKey, rule: FamilyRule) -> Order:
        """Return the compiled order with all live vectors of its own, for those who check a search."""
        made = self._kept("exact order", key, rule, lambda: compile_search_order(_generated(key, rule), key))
        return cast(Order, made)

    def layout(self, key: OrderKey, rule: FamilyRule) -> Layout:
        """Return who holds what and how much lives at once, at least; raises InvalidArgument when the family refuses the sizes.

        Where a family's live vectors repeat from 4 D microbatches on, an order of that many stands for longer ones; where
        they do not, what that order opens with does.
        """
        short = short_key(key)
        if short != key and not rule.steady:
            opens = self._kept("opening", short, rule, lambda: layout_of(opening_of(_generated(short, rule))))
            return cast(Layout, opens)
        return cast(Layout, self._kept("layout", short, rule, lambda: layout_of(_generated(short, rule))))

    def outline(self, key: OrderKey, rule: FamilyRule) -> Layout:
        """Return what is known of a layout before the order is made, for a rule that knows the placement."""
        placement_of, ranks = rule.placement, key.num_ranks
        assert placement_of is not None

        def make() -> Layout:
            return outline_of(placement_of(ranks), ranks, split=rule.split)

        return cast(Layout, self._kept("outline", key._replace(num_microbatches=0), rule, make))

    def schedule(self, key: OrderKey, rule: FamilyRule) -> Schedule:
        """Return the schedule of a family at some sizes."""
        return cast(Schedule, self._kept("schedule", key, rule, lambda: _generated(key, rule)))

    def _kept(
        self, kind: str, key: OrderKey, rule: FamilyRule, make: Callable[[], Layout | Schedule]
    ) -> Layout | Schedule:
        place = (kind, key, rule)
        with self._lock:
            found = self._made.get(place)
            if found is not None:
                self._made.move_to_end(place)
                return found
        made = make()
        self.take([(place, made)])
        return made

    def take(self, left: Made) -> None:
        """Keep what was made, here or in a fork, the latest asked for last."""
        with self._lock:
            for place, made in left:
                if place not in self._made:
                    self._made[place] = made
                    self.num_bytes += bytes_of(made)
            while self.num_bytes > self.most_bytes and len(self._made) > 1:
                self.num_bytes -= bytes_of(self._made.popitem(last=False)[1])

    def left(self) -> Made:
        """Return what this fork has made, the latest asked for last, at most MOST_LEFT_BYTES of it."""
        found: Made = []
        num_bytes = 0
        for place, made in reversed(self._made.items()):
            if place in self._known_before:
                continue
            num_bytes += bytes_of(made)
            if num_bytes > MOST_LEFT_BYTES:
                break
            found.append((place, made))
        return found[::-1]

    def begin_fork(self) -> None:
        """Let go of a lock that a thread of another process held when this one was forked from it; note what it had made."""
        self._lock = Lock()
        self._known_before = frozenset(self._made)


ORDERS = OrderStore()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=ORDERS.begin_fork)


def bytes_of(made: Layout | Schedule) -> int:
    """Return the bytes of the arrays of a record, those in its tuples too, and of a layout's slots."""
    values = [getattr(made, one.name) for one in fields(cast(Any, made))]
    if isinstance(made, Layout):
        values += [made.rank_slots.stage, made.rank_slots.live]
    parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    return sum(part.nbytes for part in parts if isinstance(part, np.ndarray))


def short_key(key: OrderKey) -> OrderKey:
    """Return the key of 4 D microbatches and a few more, of the same residue, in place of many more."""
    ranks, count = key.num_ranks, key.num_microbatches
    return key._replace(num_microbatches=4 * ranks + count % ranks) if count > 5 * ranks else key


def opening_of(schedule: Schedule) -> Schedule:
    """Return what starts before the last microbatch does at equal costs: a list scheduler begins more microbatches so too.

    Until then it cannot know how many there are. For live vectors only: the orders are cut.
    """
    costs = StageCosts.uniform(schedule.num_stages, num_chunks=schedule.num_stages // schedule.num_ranks)
    start_s, _ = action_times(schedule, costs)
    rows = np.concatenate(schedule.orders)
    enters = (rows[:, KIND] == Kind.F) & (rows[:, STAGE] == 0)
    is_last = enters & (rows[:, MICROBATCH] == schedule.num_microbatches - 1)
    opens = start_s < start_s[is_last].min()
    ends = np.cumsum([len(order) for order in schedule.orders])[:-1]
    orders = tuple(order[kept] for order, kept in zip(schedule.orders, np.split(opens, ends), strict=True))
    return replace(schedule, orders=orders)


@lru_cache(maxsize=8)  # a layout, an order and a judgement of one key come soon behind each other
def _generated(key: OrderKey, rule: FamilyRule) -> Schedule:
    request = ScheduleRequest(
        key.num_ranks, key.num_microbatches, num_chunks=key.num_chunks, parameters=dict(rule.parameters)
    )
    return generate(key.family, request)
