"""Nothing measured is lost, nothing damaged is believed."""

import json

import pytest

from stagewright.planner.errors import InvalidDocument
from stagewright.profiler.journal import EntryCache, Journal, Record

KEY = {"device": "d", "layer": "x"}


def record(value):
    return Record((1, 16, 1), "step", {"forward_s": [value]})


def test_a_journal_gives_back_what_was_added_before_a_kill(tmp_path):
    first = Journal(tmp_path, KEY, resume=False)
    for value in (1.0, 2.0):
        first.add(record(value))
    again = Journal(tmp_path, KEY, resume=True)
    assert again.records == [record(1.0), record(2.0)]
    assert (again.num_resumed, again.num_damaged) == (2, 0)


def test_a_torn_last_line_is_left_out_and_the_next_one_is_whole(tmp_path):
    first = Journal(tmp_path, KEY, resume=False)
    first.add(record(1.0))
    first.add(record(2.0))
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text()[:-20])
    again = Journal(tmp_path, KEY, resume=True)
    assert (again.records, again.num_damaged) == ([record(1.0)], 1)
    again.add(record(3.0))
    assert Journal(tmp_path, KEY, resume=True).records == [record(1.0), record(3.0)]


def test_an_altered_number_is_not_believed(tmp_path):
    Journal(tmp_path, KEY, resume=False).add(record(1.0))
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace("1.0", "9.0"))
    again = Journal(tmp_path, KEY, resume=True)
    assert (again.records, again.num_damaged) == ([], 1)


def test_without_resume_a_journal_begins_anew(tmp_path):
    Journal(tmp_path, KEY, resume=False).add(record(1.0))
    assert Journal(tmp_path, KEY, resume=False).records == []
    assert list(tmp_path.iterdir()) == []


def test_other_settings_have_another_journal(tmp_path):
    Journal(tmp_path, KEY, resume=False).add(record(1.0))
    assert Journal(tmp_path, {**KEY, "device": "e"}, resume=True).records == []


def test_a_closed_journal_leaves_nothing_behind(tmp_path):
    journal = Journal(tmp_path, KEY, resume=False)
    journal.add(record(1.0))
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_an_entry_is_found_under_its_key_only(tmp_path):
    cache = EntryCache(tmp_path)
    cache.put(KEY, {"forward_s": 1.0})
    assert cache.get(KEY) == {"forward_s": 1.0}
    assert cache.get({**KEY, "layer": "y"}) is None
    assert cache.damaged == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("1.0", "2.0"),
        lambda text: "",
        lambda text: "[]",
        lambda text: json.dumps({"digest": "sha256:0", "content": {"key": {}, "numbers": {}}}),
    ],
    ids=["cut off", "altered", "empty", "a list", "foreign"],
)
def test_a_damaged_entry_is_reported_and_counts_as_missing(tmp_path, damage):
    EntryCache(tmp_path).put(KEY, {"forward_s": 1.0})
    (path,) = tmp_path.iterdir()
    path.write_text(damage(path.read_text()))
    cache = EntryCache(tmp_path)
    assert cache.get(KEY) is None
    assert cache.damaged == [path.name]


def test_without_a_folder_nothing_is_kept():
    cache = EntryCache(None)
    cache.put(KEY, {"forward_s": 1.0})
    assert cache.get(KEY) is None


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidDocument, match="the cache cannot be written"):
        EntryCache(tmp_path / "file" / "cache").put(KEY, {})
