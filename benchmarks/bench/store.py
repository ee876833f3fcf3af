"""Finished cells as JSON lines: a killed benchmark goes on with those that are missing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One run of a benchmark.

    Args:
        benchmark: its name.
        arm: the way of training.
        seed: of initial weights, order of the data and dropout; the same in every arm.
        data: name of the corpus.
        setting: what ``Setting.to_dict`` says.
        start: a bad start (``rescue``), empty elsewhere.
    """

    benchmark: str
    arm: str
    seed: int
    data: str
    setting: Mapping[str, Any]
    start: str = ""

    @property
    def key(self) -> str:
        """Short and stable: the same cell has the same key in another process."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return " ".join(filter(None, [self.benchmark, self.data, self.start, self.arm, f"seed {self.seed}"]))


class Store:
    """Rows of finished cells in one file, each a line. A row that was cut off by a kill is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n"):
                    yield json.loads(line)

    def done(self) -> set[str]:
        return {row["key"] for row in self.rows()}

    def add(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """Append one row, whole or not at all: a single write of a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_torn_tail()
        line = json.dumps({"key": cell.key, **asdict(cell), **result}, allow_nan=True) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)

    def _drop_torn_tail(self) -> None:
        if not self.path.exists():
            return
        text = self.path.read_bytes()
        if text and not text.endswith(b"\n"):
            with self.path.open("r+b") as file:
                file.truncate(text.rfind(b"\n") + 1)
