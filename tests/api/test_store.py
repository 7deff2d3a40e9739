"""The store on SQLite and on PostgreSQL: of two that race for a plan exactly one wins."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from stagewright.api import database
from stagewright.api.lifecycle import Ending, Failure, State
from stagewright.api.store import NewPlan, PlanFilter, Store
from stagewright.planner.documents.outcome import PlanOutcome, Progress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path_factory.mktemp('store') / 'service.db'}"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def engine(url: str) -> Iterator[sa.Engine]:
    engine = database.open_engine(url)
    database.upgrade(engine)
    yield engine
    with engine.begin() as connection:
        for table in ("plan_labels", "plans", "outcomes", "keys"):
            connection.execute(sa.text(f"DELETE FROM {table}"))
    engine.dispose()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(engine: sa.Engine, clock: Clock) -> Store:
    return Store(engine, clock=clock)


def new(digest: str = "d", **labels: str) -> NewPlan:
    return NewPlan("{}", digest, "model", "cluster", labels, 60.0)


def answer(status: str = "optimal") -> PlanOutcome:
    fields = {"status": status, "plan": None, "objective_s": 1.0, "bound_s": 1.0, "gap": 0.0, "wall_s": 0.1}
    return PlanOutcome.from_object(fields | {"candidates": 1, "evaluated": 1, "simulated": 1})


def test_tables_are_made_once_and_then_at_this_version(engine: sa.Engine) -> None:
    assert database.pending(engine) is None
    database.upgrade(engine)
    with engine.connect() as connection:
        tables = set(sa.inspect(connection).get_table_names())
    assert {"plans", "outcomes", "plan_labels", "keys"} <= tables


def test_the_migrations_make_the_tables_that_the_code_declares(engine: sa.Engine) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    from stagewright.api.tables import METADATA

    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []


def test_a_plan_goes_through_its_states_once(store: Store, clock: Clock) -> None:
    accepted = store.accept(new(team="a"))
    assert (accepted.state, accepted.version, accepted.deadline_at) == (State.QUEUED, 1, 1060.0)
    clock.now = 1001.0
    claimed = store.claim("boot")
    assert claimed is not None
    assert (claimed.state, claimed.attempt, claimed.started_at) == (State.RUNNING, 1, 1001.0)
    assert store.claim("boot") is None
    reported = store.report(claimed, "boot", Progress("search", 1, 2, 0.5, 0.4))
    assert reported is not None and reported.progress == Progress("search", 1, 2, 0.5, 0.4)
    ending = Ending(State.SUCCEEDED, "optimal", answer())
    assert not store.finish(claimed, "another boot", ending)
    assert store.finish(claimed, "boot", ending)
    assert not store.finish(claimed, "boot", Ending(State.FAILED, None, None, Failure("internal", "twice")))
    final = store.get(accepted.id)
    assert final is not None and final.outcome_digest is not None
    assert (final.state, final.failure, final.finished_at) == (State.SUCCEEDED, None, 1001.0)
    assert store.outcome_json(final.outcome_digest) == answer().canonical_json()
    assert store.request_cancel(final, "discard") is None


def test_plans_are_claimed_in_the_order_of_their_acceptance(store: Store) -> None:
    accepted = [store.accept(new()).id for _ in range(3)]
    assert [row.id for row in (store.claim("boot") for _ in range(3)) if row] == accepted


def test_of_many_that_claim_each_plan_has_one_owner(store: Store) -> None:
    accepted = {store.accept(new()).id for _ in range(12)}
    claimed: list[str] = []

    def take() -> None:
        while store.num_queued():
            row = store.claim("boot")
            if row is not None:
                claimed.append(row.id)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(accepted)


def test_an_attempt_that_was_taken_over_cannot_finish(store: Store, clock: Clock) -> None:
    store.accept(new())
    lost = store.claim("dead boot")
    assert lost is not None
    clock.now += 20
    assert store.requeue_dead(lease_s=15) == 1
    again = store.claim("live boot")
    assert again is not None and again.id == lost.id and again.deadline_at == 1080.0
    assert not store.finish(lost, "dead boot", Ending(State.CANCELLED))
    assert store.report(lost, "dead boot", Progress("late", 1, 1)) is None
    assert store.finish(again, "live boot", Ending(State.CANCELLED))


def test_a_lease_that_is_renewed_is_not_lost(store: Store, clock: Clock) -> None:
    store.accept(new())
    row = store.claim("boot")
    assert row is not None
    clock.now += 10
    store.heartbeat("boot", [row.seq])
    clock.now += 10
    assert store.requeue_dead(lease_s=15) == 0


def test_a_discard_outweighs_an_earlier_wish_and_is_not_outweighed(store: Store) -> None:
    store.accept(new())
    row = store.claim("boot")
    assert row is not None
    modes = [store.request_cancel(row, mode) for mode in ("incumbent", "discard", "incumbent")]
    assert [changed.cancel_mode for changed in modes if changed] == ["incumbent", "discard", "discard"]


def test_only_proven_answers_are_known_again(store: Store) -> None:
    endings = {
        "optimal": Ending(State.SUCCEEDED, "optimal", answer()),
        "gap": Ending(State.SUCCEEDED, "gap", answer("within_gap")),
        "infeasible": Ending(State.INFEASIBLE, None, answer("infeasible")),
        "late": Ending(State.SUCCEEDED, "time_limit", answer("feasible")),
        "failed": Ending(State.FAILED, None, None, Failure("internal", "x")),
    }
    for digest, ending in endings.items():
        store.accept(new(digest))
        row = store.claim("boot")
        assert row is not None and store.finish(row, "boot", ending)
    known = {digest for digest in endings if store.accept(new(digest)).cached}
    assert known == {"optimal", "gap", "infeasible"}
    assert not store.accept(new("optimal"), use_cache=False).cached


def test_pages_go_down_from_the_newest_and_filters_hold_together(store: Store) -> None:
    ids = [store.accept(new(team="a" if index % 2 else "b", run=str(index))).id for index in range(5)]
    rows, more = store.page(PlanFilter(), limit=3)
    assert ([row.id for row in rows], more) == (ids[:1:-1], True)
    rows, more = store.page(PlanFilter(), limit=3, before_seq=rows[-1].seq)
    assert ([row.id for row in rows], more) == (ids[1::-1], False)
    both = PlanFilter(State.QUEUED, "model", "cluster", [("team", "a"), ("run", "3")])
    assert [row.id for row in store.page(both, limit=9)[0]] == [ids[3]]


def test_overdue_plans_are_those_that_wait_past_their_deadline(store: Store, clock: Clock) -> None:
    row = store.accept(new())
    assert store.overdue() == []
    clock.now += 60
    assert [late.id for late in store.overdue()] == [row.id]
    store.extend_queued()
    assert store.overdue() == []


def test_a_key_is_found_by_its_secret_until_it_is_revoked(store: Store) -> None:
    key, secret = store.create_key("name", ["read"])
    assert store.key_of(secret) == key
    assert store.key_of("pk_other") is None
    assert store.revoke_key(key.id)
    assert not store.revoke_key(key.id)
    assert store.key_of(secret) is None
    assert [stored.id for stored in store.list_keys()] == [key.id]
