"""Plans over HTTP: accepted, waited for, cancelled, listed, followed; each with exactly one final state."""

from __future__ import annotations

import json
import time

import pytest

from tests.api.conftest import Server, job


def test_a_plan_is_accepted_at_once_and_answered_later(fakes: Server) -> None:
    response = fakes.ask(fake="slow", deadline_s=1)
    assert response.status_code == 202
    assert response.headers["location"] == f"/v1/plans/{response.json()['id']}"
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["state"] in ("queued", "running")
    assert response.json()["result"] is None
    final = fakes.final(response.json()["id"])
    assert (final["state"], final["termination"]) == ("succeeded", "time_limit")
    assert final["result"]["plan"]["stages"]


def test_prefer_wait_holds_the_request_until_the_answer(fakes: Server) -> None:
    response = fakes.ask(headers={"Prefer": "respond-async, wait=20"})
    assert response.status_code == 201
    assert response.headers["preference-applied"] == "wait=20"
    assert response.json()["termination"] == "optimal"


def test_prefer_wait_that_is_too_short_answers_202(fakes: Server) -> None:
    response = fakes.ask(fake="slow", deadline_s=3, headers={"Prefer": "wait=0"})
    assert response.status_code == 202
    fakes.http.post(f"/v1/plans/{response.json()['id']}/cancel", json={"mode": "discard"})


def test_the_same_question_is_answered_from_the_cache_whoever_asks(fakes: Server) -> None:
    body = {"model": "gpt2", "cluster": "mocked", "job": job(global_batch=32)}
    first = fakes.http.post("/v1/plans", json=body, headers={"Prefer": "wait=20"}).json()
    again = fakes.http.post("/v1/plans", json=body | {"labels": {"team": "b"}, "deadline_s": 5})
    assert again.status_code == 201
    assert again.json()["cached"] is True
    assert again.json()["id"] != first["id"]
    assert again.json()["result"] == first["result"]
    assert again.json()["labels"] == {"team": "b"}
    other = fakes.http.post("/v1/plans", json=body | {"job": job(global_batch=64)}, headers={"Prefer": "wait=20"})
    assert other.json()["cached"] is False


def test_an_answer_that_a_clock_took_part_in_is_not_cached(fakes: Server) -> None:
    body = {
        "model": "gpt2",
        "cluster": "c",
        "job": job(global_batch=128),
        "labels": {"fake": "slow"},
        "deadline_s": 0.3,
    }
    first = fakes.http.post("/v1/plans", json=body, headers={"Prefer": "wait=20"}).json()
    assert first["termination"] == "time_limit"
    assert fakes.http.post("/v1/plans", json=body, headers={"Prefer": "wait=20"}).json()["cached"] is False


def test_an_infeasible_question_is_an_answer_with_a_diagnosis(fakes: Server) -> None:
    answer = fakes.ask(fake="infeasible", headers={"Prefer": "wait=20"})
    assert answer.status_code == 201
    assert (answer.json()["state"], answer.json()["error"]) == ("infeasible", None)
    assert answer.json()["result"]["diagnosis"]["binding"] == "memory"


def test_a_deadline_without_a_plan_fails_with_no_incumbent(fakes: Server) -> None:
    answer = fakes.ask(fake="empty", deadline_s=0.3, headers={"Prefer": "wait=20"}).json()
    assert (answer["state"], answer["termination"]) == ("failed", "time_limit")
    assert answer["error"]["type"] == "/problems/no-incumbent"
    assert answer["error"]["instance"] == f"/v1/plans/{answer['id']}"
    assert fakes.http.get(answer["error"]["type"]).status_code == 200


def test_a_solve_that_hears_no_stop_is_killed_after_the_grace(fakes: Server) -> None:
    started = time.monotonic()
    answer = fakes.ask(fake="deaf", deadline_s=0.5, headers={"Prefer": "wait=40"}).json()
    assert time.monotonic() - started < 50
    assert (answer["state"], answer["error"]["type"]) == ("failed", "/problems/no-incumbent")
    assert fakes.ask(headers={"Prefer": "wait=20"}).json()["state"] == "succeeded"


def test_a_defect_in_a_solve_is_a_failed_plan_without_a_traceback(fakes: Server) -> None:
    answer = fakes.ask(fake="crash", headers={"Prefer": "wait=20"}).json()
    assert (answer["state"], answer["error"]["type"]) == ("failed", "/problems/internal")
    assert "Traceback" not in json.dumps(answer)


def test_cancel_with_incumbent_keeps_the_best_so_far(fakes: Server) -> None:
    plan_id = fakes.ask(fake="slow").json()["id"]
    fakes.until(plan_id, lambda plan: plan["progress"] is not None)
    response = fakes.http.post(f"/v1/plans/{plan_id}/cancel")
    assert response.status_code == 202
    final = fakes.final(plan_id)
    assert (final["state"], final["termination"]) == ("succeeded", "cancelled")
    assert final["result"]["plan"] is not None


def test_cancel_with_incumbent_that_finds_none_ends_cancelled(fakes: Server) -> None:
    plan_id = fakes.ask(fake="empty").json()["id"]
    fakes.until(plan_id, lambda plan: plan["state"] == "running")
    fakes.http.post(f"/v1/plans/{plan_id}/cancel", json={"mode": "incumbent"})
    final = fakes.final(plan_id)
    assert (final["state"], final["termination"], final["result"]) == ("cancelled", "cancelled", None)


@pytest.mark.parametrize("fake", ["slow", "deaf"])
def test_cancel_with_discard_keeps_nothing(fakes: Server, fake: str) -> None:
    plan_id = fakes.ask(fake=fake).json()["id"]
    fakes.until(plan_id, lambda plan: plan["state"] == "running")
    assert fakes.http.post(f"/v1/plans/{plan_id}/cancel", json={"mode": "discard"}).status_code == 202
    final = fakes.final(plan_id)
    assert (final["state"], final["termination"], final["result"]) == ("cancelled", "cancelled", None)


def test_cancel_of_a_waiting_plan_ends_it_without_a_solve(fakes: Server) -> None:
    running = [fakes.ask(fake="slow").json()["id"] for _ in range(2)]
    for plan_id in running:
        fakes.until(plan_id, lambda plan: plan["state"] == "running")
    waiting = fakes.ask(name="waiting").json()["id"]
    assert fakes.http.post(f"/v1/plans/{waiting}/cancel").json()["state"] == "cancelled"
    for plan_id in running:
        fakes.http.post(f"/v1/plans/{plan_id}/cancel", json={"mode": "discard"})
        fakes.final(plan_id)
    assert fakes.solves("waiting") == []


def test_a_final_plan_cannot_be_cancelled(fakes: Server) -> None:
    plan_id = fakes.ask(headers={"Prefer": "wait=20"}).json()["id"]
    response = fakes.http.post(f"/v1/plans/{plan_id}/cancel")
    assert response.status_code == 409
    assert response.json()["type"] == "/problems/already-final"
    assert fakes.http.get(f"/v1/plans/{plan_id}").json()["state"] == "succeeded"


def test_a_waiting_plan_fails_when_its_deadline_passes(fakes: Server) -> None:
    running = [fakes.ask(fake="slow").json()["id"] for _ in range(2)]
    for plan_id in running:
        fakes.until(plan_id, lambda plan: plan["state"] == "running")
    answer = fakes.ask(name="late", deadline_s=0.3, headers={"Prefer": "wait=20"}).json()
    assert (answer["state"], answer["error"]["type"]) == ("failed", "/problems/no-incumbent")
    for plan_id in running:
        fakes.http.post(f"/v1/plans/{plan_id}/cancel", json={"mode": "discard"})
    assert fakes.solves("late") == []


def test_an_unchanged_plan_is_not_sent_twice(fakes: Server) -> None:
    plan_id = fakes.ask(headers={"Prefer": "wait=20"}).json()["id"]
    first = fakes.http.get(f"/v1/plans/{plan_id}")
    tag = first.headers["etag"]
    assert not tag.startswith("W/")
    again = fakes.http.get(f"/v1/plans/{plan_id}", headers={"If-None-Match": f'"other", {tag}'})
    assert (again.status_code, again.content) == (304, b"")
    assert fakes.http.get(f"/v1/plans/{plan_id}", headers={"If-None-Match": '"other"'}).status_code == 200


def test_the_list_is_walked_by_cursor_and_each_plan_stands_once(fakes: Server) -> None:
    made = [fakes.ask(labels={"walk": "a"}, headers={"Prefer": "wait=20"}).json()["id"] for _ in range(5)]
    seen: list[str] = []
    url = "/v1/plans?label=walk%3Da&limit=2"
    while url:
        response = fakes.http.get(url)
        page = response.json()
        seen += [plan["id"] for plan in page["data"]]
        assert page["has_more"] == (page["next_cursor"] is not None) == ("next" in response.links)
        url = response.links["next"]["url"] if page["has_more"] else ""
    assert seen == made[::-1]


def test_the_list_filters_by_state_model_and_cluster(fakes: Server) -> None:
    plan_id = fakes.ask(fake="infeasible", cluster="only-here", headers={"Prefer": "wait=20"}).json()["id"]
    query = {"status": "infeasible", "model": "gpt2", "cluster": "only-here"}
    assert [plan["id"] for plan in fakes.http.get("/v1/plans", params=query).json()["data"]] == [plan_id]
    assert fakes.http.get("/v1/plans", params=query | {"status": "failed"}).json()["data"] == []


def test_events_tell_states_and_progress_and_can_be_resumed(fakes: Server) -> None:
    plan_id = fakes.ask(fake="slow", deadline_s=1.5).json()["id"]
    events: list[tuple[int, str, dict[str, object]]] = []
    with fakes.http.stream("GET", f"/v1/plans/{plan_id}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        block: dict[str, str] = {}
        for line in stream.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                block[name] = value
            else:
                events.append((int(block["id"]), block["event"], json.loads(block["data"])))
    numbers = [number for number, _, _ in events]
    assert numbers == sorted(set(numbers))
    assert events[-1][2]["state"] == "succeeded"
    reported = [data["progress"] for _, event, data in events if event == "progress"]
    assert reported and reported[-1]["incumbent_s"] == 0.04
    assert reported[-1]["gap"] == pytest.approx(1 / 3)
    resumed = fakes.http.get(f"/v1/plans/{plan_id}/events", headers={"Last-Event-ID": str(numbers[-2])})
    assert resumed.text.count("event:") == 1
    done = fakes.http.get(f"/v1/plans/{plan_id}/events", headers={"Last-Event-ID": str(numbers[-1])})
    assert done.status_code == 204


def test_a_plan_keeps_its_question(fakes: Server) -> None:
    plan_id = fakes.ask(headers={"Prefer": "wait=20"}).json()["id"]
    assert fakes.http.get(f"/v1/plans/{plan_id}/request").json()["job"]["global_batch"] == 8


def test_a_trace_is_what_the_chrome_format_asks_for(fakes: Server) -> None:
    plan_id = fakes.ask(headers={"Prefer": "wait=20"}).json()["id"]
    trace = fakes.http.get(f"/v1/plans/{plan_id}/trace").json()
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [(span["name"], span["pid"], span["ts"], span["dur"]) for span in spans] == [
        ("0F0", 0, 0.0, 1e6),
        ("1B1", 1, 1e6, 1e6),
    ]
