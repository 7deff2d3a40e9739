"""Documents: one canonical text, one digest, strict fields, and errors that name the field."""

from __future__ import annotations

import copy
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewright.planner.documents import Cluster, ModelProfile, Plan, TrainingJob
from stagewright.planner.documents.document import Document, read_json, write_text
from stagewright.planner.errors import InvalidDocument
from stagewright.testing import cluster_factory, profile_factory


def plan_object() -> dict[str, object]:
    """A plan of 4 layers on 2 ranks, as plain JSON."""
    profile = profile_factory(4)
    return {
        "model": "mocked",
        "profile_digest": profile.digest,
        "layer_digest": profile.layer_digest,
        "num_layers": 4,
        "cluster": cluster_factory(2).model_dump(mode="json"),
        "job": {"global_batch": 8, "sequence_length": 128, "precision": "fp32"},
        "planner": "exact",
        "stages": [{"layers": [0, 2]}, {"layers": [2, 4], "recompute": [{"level": "full", "count": 2}]}],
        "mapping": {"pipeline_ranks": [[0], [1]]},
        "schedule": {"name": "1f1b", "num_ranks": 2, "num_microbatches": 4, "microbatch": 2, "placement": [[0, 1]]},
        "prediction": {
            "step_time_s": 1.0,
            "tokens_per_s": 1024.0,
            "samples_per_s": 8.0,
            "bubble_over_total": 0.2,
            "peak_memory_bytes": [1.0, 2.0],
            "memory": [{"activations": 1.0}, {"activations": 2.0}],
            "source": "mocked",
        },
    }


DOCUMENTS: dict[type[Document], dict[str, object]] = {
    ModelProfile: profile_factory(5, edges=[(0, 1), (0, 2), (1, 3), (2, 3), (3, 4)], tied=[(0, 4)]).model_dump(
        mode="json"
    ),
    Cluster: cluster_factory(4, 2).model_dump(mode="json"),
    TrainingJob: {"global_batch": 8, "sequence_length": 128, "space": {"pins": {"tp": 2}, "forbids": [{"name": "cp"}]}},
    Plan: plan_object(),
}


@pytest.mark.parametrize("kind", DOCUMENTS, ids=lambda kind: kind.document_name)
def test_a_file_gives_back_the_same_document_and_digest(kind, tmp_path):
    document = kind.from_object(DOCUMENTS[kind])
    document.save(tmp_path / "document.json")
    again = kind.load(tmp_path / "document.json")
    assert again == document
    assert again.digest == document.digest
    assert json.loads(again.canonical_json()) == json.loads(document.canonical_json())


@pytest.mark.parametrize("kind", DOCUMENTS, ids=lambda kind: kind.document_name)
def test_key_order_does_not_change_the_digest(kind):
    value = DOCUMENTS[kind]
    assert kind.from_object(dict(reversed(value.items()))).digest == kind.from_object(value).digest


@pytest.mark.parametrize("kind", DOCUMENTS, ids=lambda kind: kind.document_name)
def test_an_unknown_field_is_refused_by_name(kind):
    with pytest.raises(InvalidDocument, match="no_such_field"):
        kind.from_object({**DOCUMENTS[kind], "no_such_field": 1})


@pytest.mark.parametrize("kind", DOCUMENTS, ids=lambda kind: kind.document_name)
def test_its_json_schema_accepts_nothing_unknown(kind):
    assert kind.model_json_schema()["additionalProperties"] is False


def refused(kind: type[Document], change) -> InvalidDocument:
    value = copy.deepcopy(DOCUMENTS[kind])
    change(value)
    with pytest.raises(InvalidDocument) as caught:
        kind.from_object(value)
    return caught.value


def test_a_negative_time_is_refused_with_its_path_and_value():
    name = next(iter(DOCUMENTS[ModelProfile]["classes"]))
    error = refused(ModelProfile, lambda value: value["classes"][name]["costs"][0].update(forward_s=-1.5))
    assert error.field == f"classes.{name}.costs[0].forward_s"
    assert "-1.5" in error.message


def test_a_missing_field_is_refused_with_its_path():
    error = refused(ModelProfile, lambda value: value["layers"][0].pop("layer_class"))
    assert error.field == "layers[0].layer_class"


def test_a_cycle_of_edges_is_refused_and_shown():
    error = refused(ModelProfile, lambda value: value["edges"].append({"source": "layer.4", "target": "layer.0"}))
    assert "cycle" in error.message
    assert "layer.4" in error.message


def test_a_class_nobody_declared_is_refused_with_the_known_ones():
    error = refused(ModelProfile, lambda value: value["layers"][0].update(layer_class="ghost"))
    assert "'ghost'" in error.message


def test_a_plan_whose_stages_miss_a_layer_is_refused_with_both_counts():
    error = refused(Plan, lambda value: value["stages"][1].update(layers=[3, 4], recompute=[]))
    assert "3 layers" in error.message
    assert "4" in error.message


def test_a_plan_whose_degrees_do_not_fill_its_ranks_is_refused_with_both_numbers():
    error = refused(Plan, lambda value: value["stages"][0].update(degrees={"dp": 3}))
    assert "dp * cp * tp = 3" in error.message
    assert "1 devices" in error.message


def test_a_plan_for_another_profile_is_refused_with_both_digests():
    plan = Plan.from_object(plan_object())
    other = profile_factory(4, parameters=[1, 2, 3, 4])
    with pytest.raises(InvalidDocument) as caught:
        plan.check_profile(layer_digest=other.layer_digest, num_layers=4)
    assert plan.layer_digest in caught.value.message
    assert other.layer_digest in caught.value.message
    with pytest.raises(InvalidDocument, match=r"4 layers, the profile has 5"):
        plan.check_profile(layer_digest=plan.layer_digest, num_layers=5)


def test_a_mixed_cluster_needs_the_link_between_its_groups():
    error = refused(Cluster, lambda value: value["groups"].append({**value["groups"][0], "name": "second"}))
    assert "between_groups" in error.message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1', "cut off"),
        ('{"a": NaN}', "NaN"),
        ('{"a": 1, "a": 2}', "twice"),
        ("[" * 100_000, "not JSON"),
    ],
    ids=["truncated", "nan", "repeated key", "too deep"],
)
def test_a_file_that_is_not_one_clean_json_document_is_refused(text, reason, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(InvalidDocument) as caught:
        read_json(path)
    assert reason in caught.value.message + (caught.value.hint or "")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InvalidDocument, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def paths_of(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    found = [path] if path else []
    if isinstance(value, dict):
        for key, item in value.items():
            found += paths_of(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found += paths_of(item, (*path, index))
    return found


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


@pytest.mark.parametrize("kind", DOCUMENTS, ids=lambda kind: kind.document_name)
@settings(max_examples=60)
@given(data=st.data())
def test_a_mutated_document_is_read_or_refused_with_a_message(kind, data):
    value = copy.deepcopy(DOCUMENTS[kind])
    path = data.draw(st.sampled_from(paths_of(value)))
    parent = value
    for step in path[:-1]:
        parent = parent[step]
    action = data.draw(st.sampled_from(["replace", "remove", "repeat"]))
    if action == "replace":
        parent[path[-1]] = data.draw(JUNK)
    elif action == "remove":
        del parent[path[-1]]
    elif isinstance(parent, list):
        parent.append(copy.deepcopy(parent[path[-1]]))
    else:
        parent[f"{path[-1]}_"] = parent[path[-1]]
    try:
        kind.from_object(value)
    except InvalidDocument as error:
        assert error.field
        assert len(error.message) > 20


def test_a_run_of_more_layers_than_memory_holds_is_refused_before_it_is_written_out():
    """Found by a mutated document: a count of 2^60 was expanded to that many names."""
    value = copy.deepcopy(DOCUMENTS[ModelProfile])
    value["layers"][0] |= {"name": "layer.{}", "count": 2**60}
    with pytest.raises(InvalidDocument, match="layers, a profile holds 100000 at most"):
        ModelProfile.from_object(value)
