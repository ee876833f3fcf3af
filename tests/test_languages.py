"""Corpora in other languages for the benchmarks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("faker", reason="needs the extra bench")
pytest.importorskip("espeakng_loader", reason="needs the extra demo")

from tts_brain.corpus import load_ljspeech

LANGUAGES = Path(__file__).parents[1] / "benchmarks" / "languages.py"


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, LANGUAGES, *map(str, args)], capture_output=True, text=True)


def test_each_language_is_a_corpus_of_its_own_and_the_same_again(tmp_path: Path) -> None:
    for name in ("one", "two"):
        done = run(tmp_path / name, "--languages", "de,zh", "--clips", 3)
        assert done.returncode == 0, done.stderr
    for language in ("de", "zh"):
        one, two = (load_ljspeech(tmp_path / name / language) for name in ("one", "two"))
        assert len(one) == 3 and [item["text"] for item in one] == [item["text"] for item in two]
        for first, second in zip(one, two, strict=True):
            assert Path(first["audio_file"]).read_bytes() == Path(second["audio_file"]).read_bytes()
    assert (tmp_path / "one/zh/metadata.csv").read_text("utf-8") != (tmp_path / "one/de/metadata.csv").read_text(
        "utf-8"
    )


def test_what_is_there_is_left_alone_and_an_unknown_language_named(tmp_path: Path) -> None:
    (tmp_path / "de").mkdir()
    (tmp_path / "de" / "mine.txt").write_text("mine")
    done = run(tmp_path, "--languages", "de", "--clips", 3)
    assert done.returncode == 2 and "is there already" in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["de", "mine.txt"]
    done = run(tmp_path, "--languages", "xx")
    assert done.returncode == 2 and "xx" in done.stderr and "de, ru" in done.stderr
