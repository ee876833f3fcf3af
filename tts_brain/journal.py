"""The run's diary: one JSON object a line, each flushed, so that a killed run keeps all but the last line.

Records have a ``kind``: ``start`` (configuration, host, versions), ``observation``, ``decision``, ``event`` and
``end``. A float that JSON cannot say is written as the string ``"nan"``, ``"inf"`` or ``"-inf"``.
"""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import shorten
from typing import Any, BinaryIO

JOURNAL_NAME = "journal.jsonl"
FORMAT_VERSION = 1
_BEGINS = b'{"kind"'
_GIVE = f"; give a run folder or a {JOURNAL_NAME}"
_FIELDS: dict[str, dict[str, type]] = {
    "start": {"config": dict, "versions": dict},
    "observation": {"losses": dict, "attention": dict},
    "decision": {"verdict": str, "phase": str, "before": dict, "after": dict, "evidence": dict, "proposals": list},
    "proposal": {"moves": dict, "evidence": dict},
}
_IN_WORDS = {str: "text", int: "a whole number", dict: "a mapping", list: "a list"}
_VERSIONS_OF = ("tts-brain", "torch", "coqui-tts", "coqui-tts-trainer", "espnet")


class Journal:
    """Appends records to ``folder / journal.jsonl``; a torn last line from a killed run is dropped first.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / JOURNAL_NAME
        _drop_torn_tail(self.path)
        self._file: BinaryIO | None = self.path.open("ab", buffering=0)

    def write(self, kind: str, record: Any) -> None:
        """Append one record, whole or not at all; ``record`` is a dataclass or a mapping.

        Raises:
            OSError: it cannot be written, for want of room, say.
        """
        if self._file is None:
            return
        line = (json.dumps({"kind": kind, **to_plain(record)}, allow_nan=False) + "\n").encode()
        written = self._file.write(line)
        if written != len(line):
            # A part of a line in the middle of a journal would make all of it unreadable.
            self._file.truncate(os.fstat(self._file.fileno()).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def close(self) -> None:
        """Close the file; later writes do nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None


class NoJournal:
    """Stands in where another process of the run keeps the journal."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL_NAME

    def write(self, kind: str, record: Any) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def _drop_torn_tail(path: Path) -> None:
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


def to_plain(value: Any) -> Any:
    """Dataclasses, enums, mappings and floats as JSON can hold them."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: to_plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Enum):
        return value.name.lower()
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def read_journal(path: str | Path) -> Iterator[dict[str, Any]]:
    """Records of a journal file or of a run folder that holds one, oldest first; a torn last line is left out.

    After a resume from an earlier checkpoint the records past it are dropped, so that each step stands once; those of
    an earlier run in the same folder are, too, where one began anew.

    Raises:
        FileNotFoundError: no journal there; the message says where it was looked for.
        ValueError: a line that is no record, or one of a newer tts-brain; the message names file and line.
    """
    file = find_journal(path)
    records: list[dict[str, Any]] = []
    *lines, torn = file.read_bytes().split(b"\n")
    if not lines and not torn.startswith(_BEGINS[: len(torn)]):
        raise ValueError(f"{file} is not a journal{_GIVE}")
    for number, line in enumerate(lines, start=1):
        try:
            record = _read_record(line)
        except (ValueError, RecursionError) as error:
            hint = _GIVE if number == 1 else ""
            raise ValueError(f"{file}, line {number} is not a journal record: {error}{hint}") from error
        if record["kind"] == "start":
            if record.get("format", FORMAT_VERSION) > FORMAT_VERSION:
                raise ValueError(
                    f"{file}, line {number} was written by a newer tts-brain, in format {record['format']}; this one "
                    f"reads up to format {FORMAT_VERSION}. Update it: pip install --upgrade tts-brain"
                )
            begins_at = record.get("step", 0)
            records = [r for r in records if r.get("step", 0) <= begins_at] if begins_at else []
        records.append(record)
    yield from records


def _read_record(line: bytes) -> dict[str, Any]:
    """One line's record, its fields of the types that whoever tells it relies on; ValueError where they are not."""
    record = json.loads(line.decode("utf-8"))
    if not isinstance(record, dict) or "kind" not in record:
        raise ValueError("it has no 'kind'")
    _check("kind", record["kind"], str)
    for name in ("step", "format"):
        if name in record:
            _check(name, record[name], int)
    _check_fields(record, _FIELDS.get(record["kind"], {}))
    for proposal in record.get("proposals") or () if record["kind"] == "decision" else ():
        _check("proposal", proposal, dict)
        _check_fields(proposal, _FIELDS["proposal"])
    return record


def _check_fields(record: Mapping[str, Any], types: Mapping[str, type]) -> None:
    """A field that is left out, or null, is fine."""
    for name, kind in types.items():
        if record.get(name) is not None:
            _check(name, record[name], kind)


def _check(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"its {name} is {shorten(json.dumps(value), 60)}, not {_IN_WORDS[kind]}")


def find_journal(path: str | Path) -> Path:
    """The newest journal at or under ``path``.

    Raises:
        FileNotFoundError: none found.
    """
    root = Path(path)
    if root.is_file():
        return root
    places = sorted(root.rglob(JOURNAL_NAME), key=lambda p: p.stat().st_mtime) if root.is_dir() else []
    if not places:
        raise FileNotFoundError(
            f"no {JOURNAL_NAME} in {root}; give the run folder that the trainer printed at its start "
            "(the brain writes RUN_FOLDER/brain/journal.jsonl)"
        )
    return places[-1]


def versions() -> dict[str, str]:
    """What the run is made with, for the start record; packages that are not installed are left out."""
    found = {"python": platform.python_version(), "platform": sys.platform}
    for name in _VERSIONS_OF:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
