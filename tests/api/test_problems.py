"""Whatever is wrong with a request, the answer is a problem document that says where and what to do."""

from __future__ import annotations

import json

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.api.conftest import Server, job

GOOD = {"model": "gpt2", "cluster": "mocked", "job": job()}


def problem(response: httpx.Response, status: int, kind: str) -> dict[str, object]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert document["type"] == f"/problems/{kind}"
    assert document["status"] == status
    assert document["title"] and document["detail"]
    assert document["request_id"] == response.headers["x-request-id"]
    return document


def post(server: Server, body: object) -> httpx.Response:
    return server.http.post("/v1/plans", json=body)


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"job": {"sequence_length": 128}}, "/job/global_batch"),
        ({"job": job(global_batch=0)}, "/job/global_batch"),
        ({"job": job(global_bach=1)}, "/job/global_bach"),
        ({"job": job(space={"pins": {"tp": -1}})}, "/job/space/pins/tp"),
        ({"dead_line": 3}, "/dead_line"),
        ({"deadline_s": 0}, "/deadline_s"),
        ({"deadline_s": 99999}, "/deadline_s"),
        ({"top": 1000}, "/top"),
        ({"model": {"layers": [], "classes": {}, "name": "x"}}, "/model/layers"),
        ({"cluster": {"name": "c", "groups": [{"name": "g"}]}}, "/cluster/groups/0/device"),
        ({"model": "gpt9"}, "/model"),
        ({"model": "package.module:factory"}, "/model"),
        ({"model": "model.py"}, "/model"),
        ({"model": "../../secret/config.json"}, "/model"),
    ],
)
def test_a_wrong_field_is_pointed_at(fakes: Server, change: dict[str, object], pointer: str) -> None:
    response = post(fakes, GOOD | change)
    assert response.status_code == 422, response.text
    assert pointer in [error["pointer"] for error in response.json()["errors"]]


def test_code_is_refused_by_name(fakes: Server) -> None:
    problem(post(fakes, GOOD | {"model": "os:system"}), 422, "model-code-refused")


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"model": NaN}',
        b'{"model": -Infinity}',
        b'{"job": 1e999}',
        b'{"model": "a", "model": "b"}',
        b"[" * 100_000,
        b'{"model": {"a":' + b"[" * 90 + b"]" * 90 + b"}}",
    ],
)
def test_a_body_that_is_no_json_object_is_malformed(fakes: Server, body: bytes) -> None:
    response = fakes.http.post("/v1/plans", content=body, headers={"Content-Type": "application/json"})
    problem(response, 400, "malformed-json")


def test_a_body_of_another_type_is_not_read(fakes: Server) -> None:
    response = fakes.http.post("/v1/plans", content=json.dumps(GOOD), headers={"Content-Type": "text/plain"})
    problem(response, 415, "unsupported-media-type")


def test_a_declared_body_that_is_too_large_is_refused_with_an_answer_not_a_reset(fakes: Server) -> None:
    for _ in range(20):
        response = fakes.http.post("/v1/plans", content=b" " * 200_001, headers={"Content-Type": "application/json"})
        assert "200001" in problem(response, 413, "too-large")["detail"]


def test_a_chunked_body_that_grows_too_large_is_refused(fakes: Server) -> None:
    chunks = (b" " * 10_000 for _ in range(30))
    response = fakes.http.post("/v1/plans", content=chunks, headers={"Content-Type": "application/json"})
    problem(response, 413, "too-large")


def test_what_is_not_there_is_not_found(fakes: Server) -> None:
    for path in ("/nope", "/v1/plans/plan_0", "/v1/plans/plan_0/events", "/static/nope.js", "/v1/catalog/nope"):
        problem(fakes.http.get(path), 404, "not-found")
    problem(fakes.http.post("/v1/plans/plan_0/cancel"), 404, "not-found")


def test_a_method_that_is_not_allowed_names_those_that_are(fakes: Server) -> None:
    response = fakes.http.patch("/v1/plans")
    problem(response, 405, "method-not-allowed")
    assert response.headers["allow"] == "GET, POST"


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "status=done", "after=%00", "after=zzz", "label=x"])
def test_a_wrong_query_is_an_invalid_argument(fakes: Server, query: str) -> None:
    problem(fakes.http.get(f"/v1/plans?{query}"), 422, "invalid-argument")


def test_a_page_under_another_name_cannot_reach_the_service(fakes: Server) -> None:
    problem(fakes.http.get("/v1/plans", headers={"Host": "evil.example"}), 421, "wrong-host")


def test_a_simulation_that_takes_too_long_is_cut_off_and_the_next_one_works(fakes: Server) -> None:
    plan = fakes.ask(headers={"Prefer": "wait=20"}).json()["result"]["plan"]
    problem(fakes.http.post("/v1/simulations", json={"plan": plan, "model": "sleepy"}), 503, "task-timeout")
    problem(fakes.http.post("/v1/simulations", json={"plan": plan, "model": "deadly"}), 500, "internal")
    again = fakes.http.post("/v1/simulations", json={"plan": plan, "model": "gpt2", "timeline": False})
    assert (again.status_code, again.json()["timeline"]) == (200, None)


def test_every_answer_forbids_other_origins(fakes: Server) -> None:
    for path in ("/", "/livez", "/nope"):
        assert "default-src 'self'" in fakes.http.get(path).headers["content-security-policy"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
FIELDS = ("model", "cluster", "job", "planner", "deadline_s", "top", "labels", "schema_version")


@settings(max_examples=80)
@given(field=st.sampled_from(FIELDS), value=json_values)
def test_no_body_is_a_defect(fakes: Server, field: str, value: object) -> None:
    check_body(fakes, field, value)


@pytest.mark.soak
@settings(max_examples=1000)
@given(field=st.sampled_from(FIELDS), value=json_values)
def test_no_body_is_a_defect_at_the_full_count(fakes: Server, field: str, value: object) -> None:
    check_body(fakes, field, value)


def check_body(fakes: Server, field: str, value: object) -> None:
    """Post a good body with one field replaced: it is taken, or refused as a problem."""
    body = json.dumps(GOOD | {"labels": {"fake": "quick"}} | {field: value})
    response = fakes.http.post("/v1/plans", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (201, 202, 400, 422, 429), response.text
    if response.status_code >= 400:
        assert response.headers["content-type"] == "application/problem+json"
