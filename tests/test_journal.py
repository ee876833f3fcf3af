import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tts_brain.journal import FORMAT_VERSION, JOURNAL_NAME, Journal, NoJournal, find_journal, read_journal, to_plain
from tts_brain.types import Decision, Observation, TrainingPhase, Verdict


def write(folder: Path, *records: dict) -> Path:
    journal = Journal(folder)
    for record in records:
        journal.write(record["kind"], {k: v for k, v in record.items() if k != "kind"})
    journal.close()
    return journal.path


def start(step: int) -> dict:
    return {"kind": "start", "step": step}


def seen(*steps: int) -> list[dict]:
    return [{"kind": "observation", "step": step} for step in steps]


def test_records_come_back_as_written(tmp_path: Path) -> None:
    records = [start(0), *seen(1, 2), {"kind": "event", "step": 2, "message": "ä – \u2028 line"}]
    write(tmp_path, *records)
    assert list(read_journal(tmp_path)) == records


def test_floats_that_json_cannot_say_come_back_as_words(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    losses = {"total": math.nan, "mel": math.inf, "gate": -math.inf, "guided": 0.5}
    journal.write("observation", Observation(step=1, losses=losses))
    (record,) = read_journal(tmp_path)
    assert record["losses"] == {"total": "nan", "mel": "inf", "gate": "-inf", "guided": 0.5}
    assert {n: repr(float(v)) for n, v in record["losses"].items()} == {n: repr(v) for n, v in losses.items()}


any_record = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(any_record)
def test_every_plain_value_can_be_written_as_strict_json_on_one_line(record: object) -> None:
    line = json.dumps(to_plain(record), allow_nan=False)
    assert len(line.splitlines()) <= 1
    assert to_plain(json.loads(line)) == json.loads(line)


def test_decisions_are_written_by_their_names() -> None:
    decision = Decision(5, Verdict.ROLL_BACK, TrainingPhase.REFINEMENT, {"a": 1.0}, {"a": 1.0}, "why")
    record = to_plain(decision)
    assert (record["verdict"], record["phase"], record["proposals"]) == ("roll_back", "refinement", [])


@pytest.mark.parametrize("torn", ['{"kind": "obs', "{", '{"kind": "event", "step": 3}'])
def test_a_torn_last_line_is_left_out_on_read_and_dropped_on_reopen(tmp_path: Path, torn: str) -> None:
    path = write(tmp_path, start(0), *seen(1, 2))
    with path.open("a") as file:
        file.write(torn)
    assert list(read_journal(path)) == [start(0), *seen(1, 2)]
    write(tmp_path, *seen(3))
    assert list(read_journal(path)) == [start(0), *seen(1, 2, 3)]


def test_a_journal_of_one_torn_line_begins_anew(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).write_text('{"kind": "sta')
    write(tmp_path, start(0))
    assert list(read_journal(tmp_path)) == [start(0)]


def test_a_resume_from_an_earlier_step_drops_what_came_after_it(tmp_path: Path) -> None:
    write(tmp_path, start(0), *seen(10, 20, 30))
    write(tmp_path, start(20), *seen(25, 30))
    assert list(read_journal(tmp_path)) == [start(0), *seen(10, 20), start(20), *seen(25, 30)]
    write(tmp_path, start(15), *seen(20))
    assert list(read_journal(tmp_path)) == [start(0), *seen(10), start(15), *seen(20)]


def test_a_run_begun_anew_in_the_folder_is_told_without_the_one_before_it(tmp_path: Path) -> None:
    write(tmp_path, start(0), *seen(10, 20))
    write(tmp_path, start(0), *seen(5))
    assert list(read_journal(tmp_path)) == [start(0), *seen(5)]


KILLED = """
import os, sys
from pathlib import Path
from typing import Any
from tts_brain.journal import Journal
journal = Journal(Path(sys.argv[1]))
for step in range(1, 201):
    journal.write("observation", {"step": step, "losses": {"total": 1 / step}})
file = os.open(journal.path, os.O_WRONLY | os.O_APPEND)
os.write(file, b'{"kind": "observation", "step": 201, "los')
os._exit(9)
"""


def test_a_process_killed_in_mid_write_loses_only_that_line(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, timeout=60)
    assert killed.returncode == 9
    assert [r["step"] for r in read_journal(tmp_path)] == list(range(1, 201))
    write(tmp_path, *seen(201))
    assert [r["step"] for r in read_journal(tmp_path)] == list(range(1, 202))


@pytest.mark.parametrize("line", ["not json", "5", "[1]", '{"step": 1}'])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, start(0))
    with path.open("a") as file:
        file.write(f'{line}\n{{"kind": "end"}}\n')
    with pytest.raises(ValueError, match="line 2 is not a journal record"):
        list(read_journal(path))


DECISION = '{"kind": "decision", "step": 10, '


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"kind": "start", "step": null}', "its step is null, not a whole number"),
        ('{"kind": "start", "step": "x"}', 'its step is "x", not a whole number'),
        ('{"kind": "observation", "step": true}', "its step is true"),
        ('{"kind": "start", "step": 10, "format": "2"}', "its format is"),
        ('{"kind": "start", "step": 10, "config": [1]}', "its config is [1], not a mapping"),
        ('{"kind": ["start"]}', 'its kind is ["start"], not text'),
        ('{"kind": "observation", "step": 10, "losses": 3}', "its losses is 3, not a mapping"),
        (DECISION + '"after": [1, 2]}', "its after is [1, 2], not a mapping"),
        (DECISION + '"before": "x"}', "its before is"),
        (DECISION + '"evidence": 0.5}', "its evidence is"),
        (DECISION + '"phase": ["x"]}', "its phase is"),
        (DECISION + '"proposals": {"a": 1}}', "its proposals is"),
        (DECISION + '"proposals": ["more"]}', 'its proposal is "more", not a mapping'),
        (DECISION + '"proposals": [{"moves": [1]}]}', "its moves is"),
        ("[" * 9000, "recursion"),
        ('{"kind": "event", "message": "Gr\udcfc\udcdfe"}', "can't decode byte 0xfc"),
        ('{"kind": "event", "step": ' + "9" * 5000 + "}", "digits"),
    ],
)
def test_a_record_of_another_shape_is_named_and_never_reaches_the_story(tmp_path: Path, line: str, says: str) -> None:
    path = write(tmp_path, start(0))
    with path.open("ab") as file:
        file.write(f'{line}\n{{"kind": "end"}}\n'.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(says)) as refusal:
        list(read_journal(path))
    assert f"{path}, line 2 is not a journal record: " in str(refusal.value)
    assert len(str(refusal.value)) < len(str(path)) + 250


def test_fields_that_are_left_out_or_null_are_fine(tmp_path: Path) -> None:
    nothing = {"before": None, "after": None, "evidence": None, "proposals": None, "phase": None}
    records = [{"kind": "start"}, {"kind": "decision", **nothing}, {"kind": "event"}, {"kind": "new", "before": 3}]
    write(tmp_path, *records)
    assert list(read_journal(tmp_path)) == records


def test_a_journal_of_a_newer_tts_brain_is_refused(tmp_path: Path) -> None:
    write(tmp_path, start(0), {**start(10), "format": FORMAT_VERSION + 1})
    with pytest.raises(ValueError, match=rf"line 2 .*format {FORMAT_VERSION + 1}; .*pip install --upgrade tts-brain"):
        list(read_journal(tmp_path))


@pytest.mark.parametrize(
    "text", ['{\n  "model": "tacotron2"\n}\n', '{"model": "tacotron2"}', "PK\x03\x04", "epoch 1\n"]
)
def test_another_file_is_refused_with_what_to_give(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json.* give a run folder or a journal\.jsonl"):
        list(read_journal(tmp_path / "config.json"))


def test_a_journal_that_was_only_begun_is_empty(tmp_path: Path) -> None:
    for text in ("", "{", '{"kind": "sta'):
        (tmp_path / JOURNAL_NAME).write_text(text)
        assert list(read_journal(tmp_path)) == []


def test_the_journal_is_found_under_a_run_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "run" / "brain", start(0))
    assert find_journal(tmp_path) == path == find_journal(path)
    with pytest.raises(FileNotFoundError, match=r"no journal\.jsonl in .*nothing"):
        list(read_journal(tmp_path / "nothing"))


def test_writing_after_close_does_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.close()
    journal.write("end", {"step": 1})
    journal.close()
    assert list(read_journal(tmp_path)) == []


def test_no_journal_leaves_no_file_and_says_where_the_real_one_is(tmp_path: Path) -> None:
    """Ranks other than the first share the folder with the one that writes."""
    path = write(tmp_path, start(0))
    before = path.read_bytes()
    for folder in (tmp_path, tmp_path / "new"):
        none = NoJournal(folder)
        none.write("event", {"step": 1})
        none.close()
        none.write("end", {"step": 1, "message": object()})
        assert none.path == folder / JOURNAL_NAME
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [JOURNAL_NAME]


class FullDisk(io.FileIO):
    """Takes ``room`` bytes and no more."""

    room = 10

    def write(self, data: Any) -> int:
        return super().write(bytes(data)[: self.room])


def test_a_record_that_finds_no_room_leaves_nothing_behind(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write("event", {"step": 1})
    real, journal._file = journal._file, FullDisk(journal.path, "ab")
    with pytest.raises(OSError, match="No space left"):
        journal.write("event", {"step": 2})
    journal._file = real
    journal.write("event", {"step": 3})
    assert [r["step"] for r in read_journal(tmp_path)] == [1, 3]
