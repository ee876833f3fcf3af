"""The espeak corpus: the same bytes in any process, reused when whole, never half-made under its name."""

import os
import random
import shutil
import subprocess
import sys
import types
import wave
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from tts_brain_coqui import espeak_corpus
from tts_brain_coqui.espeak_corpus import SAMPLE_RATE_HZ, default_cache, make_corpus
from tts_brain_coqui.espeak_sentences import sentences

loader = pytest.importorskip("espeakng_loader", reason='needs espeakng_loader: pip install "tts-brain[demo]"')


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def samples(path: Path) -> np.ndarray:
    with wave.open(str(path)) as clip:
        assert (clip.getframerate(), clip.getsampwidth(), clip.getnchannels()) == (SAMPLE_RATE_HZ, 2, 1)
        return np.frombuffer(clip.readframes(clip.getnframes()), dtype="<i2").astype(int)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("espeak") / "corpus", clips=12, seed=3)


def stop_after(count: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == count:
            raise KeyboardInterrupt

    return progress


def refuse(done: int, total: int) -> None:
    raise AssertionError("a finished corpus was made again")


def test_layout_lengths_edges_and_peak(corpus: Path) -> None:
    rows = [line.split("|") for line in (corpus / "metadata.csv").read_text(encoding="utf-8").splitlines()]
    assert [row[0] for row in rows] == [f"espeak_{n:05d}" for n in range(12)]
    assert len({row[1] for row in rows}) == 12
    assert all(row[1] == row[2] for row in rows)
    assert sorted(p.stem for p in (corpus / "wavs").iterdir()) == [row[0] for row in rows]
    for row in rows:
        clip = np.abs(samples(corpus / "wavs" / f"{row[0]}.wav"))
        assert 0.8 <= len(clip) / SAMPLE_RATE_HZ <= 2.3
        loud = np.flatnonzero(clip > 0.01 * clip.max())
        assert max(loud[0], len(clip) - 1 - loud[-1]) <= 0.05 * SAMPLE_RATE_HZ
        assert 0.5 <= clip.max() / 32767 <= 0.91


@pytest.mark.parametrize("hash_seed", ["0", "77"])
def test_another_process_makes_the_same_bytes(corpus: Path, tmp_path: Path, hash_seed: str) -> None:
    code = "import sys; from tts_brain_coqui.espeak_corpus import make_corpus; make_corpus(sys.argv[1], 12, 3)"
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], check=True, env=environment)
    assert contents(tmp_path / "c") == contents(corpus)


def test_the_same_process_makes_the_same_bytes_again_and_smaller_is_a_prefix(corpus: Path, tmp_path: Path) -> None:
    assert contents(make_corpus(tmp_path / "again", 12, 3)) == contents(corpus)
    small, large = contents(make_corpus(tmp_path / "small", 5, 3)), contents(corpus)
    assert all(large[name] == small[name] for name in small if name.endswith(".wav"))
    assert large["metadata.csv"].startswith(small["metadata.csv"])
    assert contents(make_corpus(tmp_path / "seed", 5, 4))["metadata.csv"] != small["metadata.csv"]


def test_progress_is_told_of_each_clip_and_global_random_state_is_left_alone(tmp_path: Path) -> None:
    before, seen = random.getstate(), []
    make_corpus(tmp_path / "c", 3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert random.getstate() == before


def test_a_finished_corpus_is_reused_even_without_the_loader(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    assert make_corpus(corpus, 12, 3, progress=refuse) == corpus


def test_a_stopped_run_leaves_nothing_behind(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make_corpus(tmp_path / "c", 12, 3, progress=stop_after(4))
    assert list(tmp_path.iterdir()) == []
    assert contents(make_corpus(tmp_path / "c", 12, 3)) == contents(corpus)


def test_a_killed_run_never_looks_finished_and_its_rest_is_cleared(corpus: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys; from tts_brain_coqui.espeak_corpus import make_corpus\n"
        "make_corpus(sys.argv[1], 12, 3, progress=lambda done, total: os._exit(9) if done == 4 else None)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")]).returncode == 9
    (rest,) = tmp_path.iterdir()
    assert rest.name.startswith(".c.half-")
    os.utime(rest, (0, 0))  # as if the kill was long ago; a younger folder may be another process at work
    assert contents(make_corpus(tmp_path / "c", 12, 3)) == contents(corpus)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("damage", ["no mark", "broken mark", "wav gone", "wav cut", "text changed", "only wavs"])
def test_a_half_made_or_damaged_corpus_is_made_again(corpus: Path, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(corpus, tmp_path / "c"))
    wav = folder / "wavs" / "espeak_00007.wav"
    if damage in ("no mark", "only wavs"):
        (folder / "corpus.json").unlink()
    if damage == "only wavs":
        (folder / "metadata.csv").unlink()
    if damage == "broken mark":
        (folder / "corpus.json").write_text("[1, ")
    if damage == "wav gone":
        wav.unlink()
    if damage == "wav cut":
        wav.write_bytes(wav.read_bytes()[:500])
    if damage == "text changed":
        (folder / "metadata.csv").write_text("espeak_00000|No.|No.\n")
    assert contents(make_corpus(folder, 12, 3)) == contents(corpus)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_files_of_the_user_are_never_replaced(tmp_path: Path) -> None:
    own = tmp_path / "wavs" / "LJ001-0001.wav"
    own.parent.mkdir()
    own.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"LJ001-0001\.wav.*new or empty folder"):
        make_corpus(tmp_path, 2)
    with pytest.raises(FileExistsError, match="new or empty folder"):
        make_corpus(own, 2)
    assert own.read_bytes() == b"mine"


def test_a_finished_corpus_of_other_arguments_is_kept(corpus: Path) -> None:
    before = contents(corpus)
    with pytest.raises(FileExistsError, match=r"'clips': 12.*'clips': 13.*another folder"):
        make_corpus(corpus, 13, 3)
    assert contents(corpus) == before


@pytest.mark.parametrize("wrong", [{"clips": 0}, {"clips": 20_001}, {"clips": 2.0}, {"clips": True}, {"seed": -1}])
def test_arguments_out_of_range_are_named(tmp_path: Path, wrong: dict[str, object]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"{name}={value}.*Write for example {name}="):
        make_corpus(tmp_path / "c", **wrong)


def test_a_missing_loader_names_the_line_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    for call in (lambda: make_corpus(tmp_path / "c", 2), default_cache):
        with pytest.raises(ImportError, match=r'pip install "tts-brain\[demo\]"'):
            call()
    assert list(tmp_path.iterdir()) == []


def test_data_below_a_very_long_path_works(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / ("d" * 200) / "espeak-ng-data"
    data.parent.mkdir()
    data.symlink_to(loader.get_data_path())
    moved = types.SimpleNamespace(get_library_path=loader.get_library_path, get_data_path=lambda: str(data))
    monkeypatch.setitem(sys.modules, "espeakng_loader", moved)
    assert contents(make_corpus(tmp_path / "c", 12, 3)) == contents(corpus)


def test_a_failing_espeak_is_reported_with_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = types.SimpleNamespace(get_library_path=lambda: "/no/such/library.so", get_data_path=loader.get_data_path)
    monkeypatch.setitem(sys.modules, "espeakng_loader", broken)
    with pytest.raises(RuntimeError, match=r"no speech for .*\(exit code 1\): OSError: .*library\.so"):
        make_corpus(tmp_path / "c", 2)
    assert list(tmp_path.iterdir()) == []


def test_default_cache_follows_xdg_and_names_the_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache().parent == tmp_path / "tts-brain"
    assert default_cache().name.startswith(f"espeak-corpus-v{espeak_corpus.FORMAT}-")
    assert len({default_cache(), default_cache(clips=5), default_cache(seed=5)}) == 3
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "me")
    assert default_cache().parent == tmp_path / "me" / ".cache" / "tts-brain"
    assert list(tmp_path.iterdir()) == []


def test_sentences_differ_and_cover_the_alphabet() -> None:
    texts = list(islice(sentences(0), 5000))
    assert len(set(texts)) == 5000
    assert set("abcdefghijklmnopqrstuvwxyz") <= set("".join(texts[:400]).lower())
    assert not [text for text in texts if "|" in text or "  " in text or " a a" in text or " a e" in text]
