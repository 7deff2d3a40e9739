"""Processes die, servers die: every accepted plan still reaches one final state, and a finished one is left alone."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from tests.api.conftest import Server, serve_fakes


def test_a_killed_solver_process_has_its_plan_run_again(fakes: Server) -> None:
    plan_id = fakes.ask(fake="slow", name="killed", deadline_s=10).json()["id"]
    fakes.until(plan_id, lambda plan: plan["progress"] is not None)
    os.kill(fakes.solves("killed")[0], signal.SIGKILL)
    fakes.until(plan_id, lambda plan: plan["attempt"] == 2)
    fakes.http.post(f"/v1/plans/{plan_id}/cancel")
    assert fakes.final(plan_id)["state"] == "succeeded"
    assert len(set(fakes.solves("killed"))) == 2


def test_a_plan_that_kills_its_process_once_still_succeeds(fakes: Server) -> None:
    answer = fakes.ask(fake="die-once", headers={"Prefer": "wait=30"}).json()
    assert (answer["state"], answer["attempt"]) == ("succeeded", 2)


def test_a_plan_that_always_kills_its_process_fails_at_last(tmp_path: Path) -> None:
    with serve_fakes(tmp_path, workers=1, max_attempts=2) as server:
        answer = server.ask(fake="die", headers={"Prefer": "wait=30"}).json()
        assert (answer["state"], answer["error"]["type"]) == ("failed", "/problems/solver-died")
        assert server.ask(headers={"Prefer": "wait=30"}).json()["state"] == "succeeded"


def test_what_a_killed_server_ran_is_run_again_and_what_it_finished_is_not(tmp_path: Path) -> None:
    with serve_fakes(tmp_path, workers=1) as first:
        finished = first.ask(name="finished", headers={"Prefer": "wait=30"}).json()
        running = first.ask(fake="slow", name="running", deadline_s=60).json()["id"]
        waiting = first.ask(name="waiting").json()["id"]
        first.until(running, lambda plan: plan["progress"] is not None)
        solver = first.solves("running")[0]
        first.kill()
    end = time.monotonic() + 60
    while Path(f"/proc/{solver}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{solver}").exists(), "the solver outlived its server"
    with serve_fakes(tmp_path, workers=1) as second:
        assert second.http.get(f"/v1/plans/{finished['id']}").json() == finished
        second.until(running, lambda plan: plan["progress"] is not None)
        second.http.post(f"/v1/plans/{running}/cancel")
        assert second.final(running)["termination"] == "cancelled"
        assert second.final(waiting)["state"] == "succeeded"
        assert [len(second.solves(name)) for name in ("finished", "running", "waiting")] == [1, 2, 1]


def test_a_stopped_server_leaves_its_plans_waiting_for_the_next(tmp_path: Path) -> None:
    with serve_fakes(tmp_path, workers=1) as first:
        plan_id = first.ask(fake="slow", deadline_s=60).json()["id"]
        first.until(plan_id, lambda plan: plan["state"] == "running")
    with sqlite3.connect(tmp_path / "service.db") as connection:
        assert connection.execute("SELECT state, attempt FROM plans").fetchall() == [("queued", 0)]


def test_two_servers_on_one_store_share_the_work_and_one_takes_over_from_the_other(tmp_path: Path) -> None:
    with serve_fakes(tmp_path, workers=1, lease_s=1.5) as first:
        running = first.ask(fake="slow", name="running", deadline_s=60).json()["id"]
        first.until(running, lambda plan: plan["state"] == "running")
        with serve_fakes(tmp_path, workers=1, lease_s=1.5) as second:
            assert second.http.get(f"/v1/plans/{running}").json()["state"] == "running", "taken from a live server"
            assert first.ask(name="other", headers={"Prefer": "wait=20"}).json()["state"] == "succeeded"
            first.kill()
            deadline = time.monotonic() + 60
            while len(second.solves("running")) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            second.http.post(f"/v1/plans/{running}/cancel")
            final = second.final(running)
            assert (final["state"], final["attempt"]) == ("succeeded", 1)
            assert len(second.solves("running")) == 2


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_fifty_kills_of_solver_processes_lose_no_plan(tmp_path: Path) -> None:
    with serve_fakes(tmp_path, workers=2, max_attempts=100) as server:
        plans = [server.ask(fake="slow", name=f"plan{index}", deadline_s=1800).json()["id"] for index in range(2)]
        for _ in range(50):
            for plan_id in plans:
                server.until(plan_id, lambda plan: plan["progress"] is not None)
            for name in ("plan0", "plan1"):
                os.kill(server.solves(name)[-1], signal.SIGKILL)
            time.sleep(0.1)
        for plan_id in plans:
            server.until(plan_id, lambda plan: plan["progress"] is not None)
            server.http.post(f"/v1/plans/{plan_id}/cancel")
            assert server.final(plan_id)["state"] == "succeeded"
