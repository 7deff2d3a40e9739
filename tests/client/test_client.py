"""The client against a service of canned answers, and against a real one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from stagewright.client import Client
from stagewright.planner.documents import TrainingJob
from stagewright.planner.documents.outcome import Progress
from stagewright.planner.documents.request import PlanRequest
from stagewright.planner.errors import InvalidArgument, InvalidDocument, NoIncumbent, RemoteError
from tests.api.conftest import Server, serve_fakes

Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve_fakes(tmp_path_factory.mktemp("client"), workers=1) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def question(fake: str = "quick", **extra: object) -> PlanRequest:
    # A batch of its own for each behaviour: the answer to one question is not another's from the cache.
    job = TrainingJob(global_batch={"quick": 8, "slow": 16, "empty": 32, "deaf": 64}[fake], sequence_length=128)
    return PlanRequest.from_object({"model": "gpt2", "cluster": "mocked", "job": job, "labels": {"fake": fake}} | extra)


def canned(handler: Handler) -> Client:
    return Client("http://service", transport=httpx.MockTransport(handler))


def test_plan_returns_the_outcome_of_the_service(client: Client) -> None:
    outcome = client.plan(question())
    assert outcome.status == "optimal"
    assert outcome.plan is not None and outcome.plan.planner == "fake"


def test_plan_reports_progress_and_stops_when_told(client: Client) -> None:
    seen: list[Progress] = []
    outcome = client.plan(question("slow"), progress=seen.append, should_stop=lambda: len(seen) > 1, poll_s=0.3)
    assert outcome.status == "feasible"
    assert seen[-1].incumbent_s == 0.04


def test_a_deadline_without_a_plan_is_the_outcome_of_a_solver_that_says_so(client: Client) -> None:
    assert client.plan(question("empty", deadline_s=0.3)).status == "no_solution"


def test_a_deadline_without_an_answer_raises(client: Client) -> None:
    with pytest.raises(NoIncumbent, match="deadline"):
        client.plan(question("deaf", deadline_s=0.3))


def test_a_refused_field_is_named(client: Client) -> None:
    with pytest.raises(InvalidArgument, match="gpt9") as caught:
        client.plan(question(model="gpt9"))
    assert (caught.value.field, caught.value.hint) == ("model", "did you mean gpt2?")


def test_a_plan_is_listed_read_and_cancelled(client: Client) -> None:
    made = client.submit(question("slow", labels={"fake": "slow", "who": "me"}))
    page = client.list(labels={"who": "me"}, limit=1)
    assert [plan.id for plan in page.data] == [made.id]
    client.cancel(made.id, "discard")
    assert client.get(made.id, wait_s=10).state == "cancelled"


def test_a_plan_is_simulated_and_traced(client: Client) -> None:
    made = client.submit(question(), wait_s=10)
    assert made.result is not None and made.result.plan is not None
    report = client.simulate(made.result.plan, "gpt2", timeline=True)
    assert report.prediction.step_time_s == 0.03
    assert report.timeline is not None
    assert client.validate(made.result.plan, "gpt2").valid
    assert "traceEvents" in json.loads(client.trace(made.id))
    assert client.catalog("models")[0]["name"] == "gpt2"


def test_a_service_that_is_not_there_is_a_remote_error() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(RemoteError, match="did not answer"):
        client.get("plan_1")


def test_a_text_that_is_no_url_is_refused() -> None:
    with pytest.raises((InvalidArgument, RemoteError)):
        Client("nonsense://").get("plan_1")


def test_a_full_queue_is_asked_again() -> None:
    answers = iter([429, 429, 200])

    def handler(_: httpx.Request) -> httpx.Response:
        status = next(answers)
        if status == 429:
            return httpx.Response(429, headers={"Retry-After": "0"}, json={"type": "/problems/queue-full"})
        return httpx.Response(200, json={"data": [], "has_more": False})

    assert canned(handler).list().data == ()


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (401, {"type": "/problems/unauthorized", "detail": "this server needs a key"}, RemoteError),
        (
            422,
            {"type": "/problems/invalid-document", "detail": "x", "errors": [{"pointer": "/job/a"}]},
            InvalidDocument,
        ),
        (502, "<html>bad gateway</html>", RemoteError),
        (200, {"unexpected": True}, RemoteError),
        (200, "no json", RemoteError),
    ],
)
def test_answers_that_are_errors_become_this_packages_own(status: int, body: object, kind: type[Exception]) -> None:
    def handler(_: httpx.Request) -> httpx.Response:
        return httpx.Response(status, text=body if isinstance(body, str) else json.dumps(body))

    with pytest.raises(kind):
        canned(handler).list()


def test_a_key_is_sent_as_a_bearer() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer pk_secret"
        return httpx.Response(200, json={"data": [], "has_more": False})

    Client("http://service", key="pk_secret", transport=httpx.MockTransport(handler)).list()


def test_the_client_needs_no_server_package() -> None:
    import subprocess
    import sys

    program = "import sys, stagewright.client; print({'fastapi', 'sqlalchemy', 'torch', 'numba'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", Path(sys.executable).name
