"""`stagewright serve` as a user starts it: the real planner behind every route, and no torch anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagewright.testing import cluster_factory, profile_factory
from tests.api.conftest import Server, job, serve_real

QUESTION = {"model": "gpt2", "cluster": "a100-sxm-80g:4x1", "job": job(global_batch=16, sequence_length=512)}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve_real(tmp_path_factory.mktemp("real"), "--workers", "1") as server:
        yield server


@pytest.fixture(scope="module")
def planned(real: Server) -> dict[str, object]:
    return solved(real, QUESTION)


def solved(server: Server, question: dict[str, object]) -> dict[str, object]:
    """The final plan; the deadline is long, because the first solve on a machine compiles the planner's kernels."""
    answer = server.http.post("/v1/plans", json=question | {"deadline_s": 400}, headers={"Prefer": "wait=60"}).json()
    while answer["state"] in ("queued", "running"):
        answer = server.http.get(f"/v1/plans/{answer['id']}", params={"wait": 60}).json()
    return answer


def test_a_plan_comes_back_with_what_was_proved(planned: dict[str, object]) -> None:
    assert planned["state"] == "succeeded", planned["error"]
    result = planned["result"]
    assert result["status"] in ("optimal", "within_gap", "feasible")
    assert result["bound_s"] <= result["objective_s"] * (1 + 1e-9)
    assert result["plan"]["prediction"]["step_time_s"] == pytest.approx(result["objective_s"])


def test_a_simulation_predicts_what_the_plan_says(real: Server, planned: dict[str, object]) -> None:
    plan = planned["result"]["plan"]
    report = real.http.post("/v1/simulations", json={"plan": plan, "model": "gpt2"}).json()
    assert report["prediction"]["step_time_s"] == pytest.approx(plan["prediction"]["step_time_s"])
    timeline = report["timeline"]
    assert len(timeline["start_s"]) == report["num_spans"] == len(timeline["kind"])
    order = list(zip(timeline["rank"], timeline["lane"], timeline["start_s"], strict=True))
    assert order == sorted(order)
    for peak, levels in zip(plan["prediction"]["peak_memory_bytes"], timeline["memory_bytes"], strict=True):
        assert max(levels) == pytest.approx(peak, rel=1e-6)
    assert len(report["memory_limit_bytes"]) == timeline["num_ranks"]


def test_a_simulation_for_another_model_is_refused(real: Server, planned: dict[str, object]) -> None:
    response = real.http.post("/v1/simulations", json={"plan": planned["result"]["plan"], "model": "llama2-7b"})
    assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, "/num_layers")


def test_the_trace_opens_with_all_ranks(real: Server, planned: dict[str, object]) -> None:
    trace = json.loads(real.http.get(f"/v1/plans/{planned['id']}/trace").text)
    ranks = {event["pid"] for event in trace["traceEvents"] if event["ph"] == "X"}
    assert ranks == set(range(planned["result"]["plan"]["schedule"]["num_ranks"]))


def test_profiles_and_clusters_can_be_sent_as_documents(real: Server) -> None:
    body = {
        "model": profile_factory(4, microbatches=(1, 2)).model_dump(mode="json"),
        "cluster": cluster_factory(2).model_dump(mode="json"),
        "job": job(precision="fp32"),
    }
    answer = solved(real, body)
    assert answer["state"] == "succeeded", answer
    assert answer["model"] == "mocked"


def test_a_model_that_cannot_fit_comes_back_with_a_diagnosis(real: Server) -> None:
    pins = {"tp": 4, "zero": 0, "microbatch": 1, "schedule": "1f1b"}
    question = {"model": "llama3.1-405b", "cluster": "a100-sxm-80g:4x1", "job": job(space={"pins": pins})}
    answer = solved(real, question)
    assert answer["state"] == "infeasible", answer
    assert answer["result"]["diagnosis"]["shortfalls"][0]["short_bytes"] > 0


@pytest.mark.parametrize(
    ("change", "pointer", "word"),
    [
        ({"model": "gpt-2"}, "/model", "gpt2"),
        ({"cluster": "a100-sxm-80g:8x0"}, "/cluster", "0"),
        ({"cluster": "b300-nope:8x1"}, "/cluster", "b300-nope"),
        ({"cluster": "pyproject.toml"}, "/cluster", "file"),
        ({"cluster": "/etc/cluster.json"}, "/cluster", "file"),
        ({"cluster": "h100-sxm:8x100000"}, "/cluster", "131072"),
        ({"devices": 5}, "/devices", "4"),
        ({"job": job(space={"pins": {"tp": 3, "pp": 4}})}, "/job/space/pins", "12"),
        ({"job": job(space={"pins": {"schedule": "1f2b"}})}, "/job/space/pins", "1f1b"),
        ({"model": {"model_type": "llama", "hidden_size": -1}}, "/model", "hidden_size"),
    ],
)
def test_what_does_not_fit_together_is_refused_at_once(
    real: Server, change: dict[str, object], pointer: str, word: str
) -> None:
    response = real.http.post("/v1/plans", json=QUESTION | change)
    assert response.status_code == 422, response.text
    document = response.json()
    assert any(error["pointer"].startswith(pointer) for error in document["errors"]), document
    assert word in json.dumps(document)
    report = real.http.post("/v1/validations", json={"request": QUESTION | change}).json()
    assert not report["valid"], report
    assert any((item["pointer"] or "").startswith(f"/request{pointer}") for item in report["violations"]), report


def test_a_validation_of_a_good_request_says_what_it_understood(real: Server) -> None:
    report = real.http.post("/v1/validations", json={"request": QUESTION}).json()
    assert (report["valid"], report["violations"]) == (True, [])
    assert report["summary"]["num_devices"] == 4


def test_a_validation_of_a_plan_names_the_rules_it_breaks(real: Server, planned: dict[str, object]) -> None:
    plan = planned["result"]["plan"]
    assert real.http.post("/v1/validations", json={"plan": plan, "model": "gpt2"}).json()["valid"]
    small = json.loads(json.dumps(plan))
    for group in small["cluster"]["groups"]:
        group["device"]["memory_bytes"] = 1e9
    cases = {
        "memory": small,
        "batch": plan | {"job": plan["job"] | {"global_batch": 17}},
        "invalid-document": plan | {"stages": []},
    }
    for code, broken in cases.items():
        report = real.http.post("/v1/validations", json={"plan": broken, "model": "gpt2"}).json()
        assert not report["valid"]
        assert code in [item["code"] for item in report["violations"]], report


def test_the_catalogue_offers_what_a_request_may_name(real: Server) -> None:
    for name, known in {"gpus": "h100-sxm", "models": "gpt3-175b", "schedules": "1f1b"}.items():
        entries = real.http.get(f"/v1/catalog/{name}").json()["data"]
        assert known in [entry["name"] for entry in entries]
    clusters = real.http.get("/v1/catalog/clusters").json()["data"]
    question = QUESTION | {"cluster": clusters[0]["name"]}
    assert real.http.post("/v1/validations", json={"request": question}).json()["summary"]["num_devices"] > 0


def test_the_openapi_document_describes_requests_and_answers(real: Server) -> None:
    document = real.http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert {"PlanRequest", "ModelProfile", "PlanResource", "ProblemDocument", "SimulationRequest"} <= set(schemas)
    references = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert references <= set(schemas)
    assert {"/v1/plans", "/v1/plans/{plan_id}/cancel", "/v1/simulations", "/livez"} <= set(document["paths"])


def test_the_routes_are_those_that_are_written_down(real: Server) -> None:
    paths = real.http.get("/openapi.json").json()["paths"]
    lines = []
    for path, methods in sorted(paths.items()):
        for method, operation in sorted(methods.items()):
            parameters = " ".join(sorted(item["name"] for item in operation.get("parameters", [])))
            lines.append(f"{method.upper()} {path} ({parameters}) {' '.join(sorted(operation['responses']))}")
    written = Path(__file__).with_name("routes.txt").read_text().splitlines()
    assert lines == written, "\n".join(lines)


def test_no_process_of_the_service_loads_torch(real: Server, planned: dict[str, object]) -> None:
    children = Path(f"/proc/{real.process.pid}/task").glob("*/children")
    pids = [real.process.pid, *(int(pid) for file in children for pid in file.read_text().split())]
    assert len(pids) >= 3, "server, solver and desk"
    for pid in pids:
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "libtorch" not in maps
    assert any("numba" in Path(f"/proc/{pid}/maps").read_text() for pid in pids[1:]), "the solver did work"


def test_the_service_imports_no_torch() -> None:
    import subprocess
    import sys

    program = """
import sys
from stagewright.api.app import create_app
from stagewright.api.composition import default_backend
from stagewright.api.settings import load_settings
backend = default_backend(max_devices=8)
create_app(load_settings(database_url='sqlite:////nowhere.db'), backend)
server = 'torch' in sys.modules
import stagewright.api.solver_worker
backend.prepare()
print(server, 'torch' in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False False", done.stdout + done.stderr
