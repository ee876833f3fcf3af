"""An English speech corpus made offline with espeak-ng, for demos, tests and benchmarks (one voice, 22050 Hz).

Needs `espeakng_loader` (extra `demo`) to make a corpus, but not to reuse one. The same arguments and the same
espeak-ng give the same bytes. Only whole corpora ever stand under their final name: they are made in a
temporary folder beside it, marked with `corpus.json` and renamed.
"""

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tts_brain_coqui.espeak_sentences import sentences

SAMPLE_RATE_HZ = 22050
VOICE = "en-us"
MIN_S, MAX_S = 0.8, 2.3
EDGE_S = 0.03  # silence kept at each end; longer edges keep attention from forming
SILENCE = 0.005  # of the clip's peak; espeak-ng's pauses are exact zeros, its weakest final "f" is not
PEAK = 0.9  # of full scale
MAX_GAIN = 2.0
MAX_CLIPS = 20_000

FORMAT = 1  # raise it when the grammar, the voice or the audio processing changes
MARK = "corpus.json"
_OURS = re.compile(r"corpus\.json|metadata\.csv|wavs|wavs/espeak_\d{5}\.wav")
_STALE_S = 3600  # no corpus takes an hour to make: a temporary folder older than this was left by a kill

Speak = Callable[[str], bytes]


def _loader() -> Any:
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError(
            'Making the espeak corpus needs espeakng_loader. Run: pip install "tts-brain[demo]"'
        ) from error
    return espeakng_loader


@contextmanager
def _speaker(voice: str) -> Iterator[Speak]:
    """A fresh espeak-ng process as a function from a sentence to PCM bytes (see espeak_child for the why)."""
    loader = _loader()
    data = Path(loader.get_data_path())
    child_file = Path(__file__).with_name("espeak_child.py")
    with tempfile.TemporaryDirectory() as short, tempfile.TemporaryFile() as errors:
        if len(os.fsencode(data)) > 140:  # espeak-ng holds the path in 160 bytes and looks elsewhere if it is longer
            data = Path(shutil.copytree(data, Path(short) / "espeak-ng-data"))
        # -I -S: the child needs the standard library only, and no setting of the user's may change its output.
        command = [sys.executable, "-I", "-S", str(child_file), loader.get_library_path(), str(data), voice]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as child:
            assert child.stdin is not None and child.stdout is not None
            to_child, from_child = child.stdin, child.stdout

            def speak(sentence: str) -> bytes:
                try:
                    to_child.write(sentence.encode() + b"\n")
                    to_child.flush()
                    (size,) = struct.unpack("<I", from_child.read(4))
                    pcm = from_child.read(size)
                except (OSError, struct.error):
                    pcm = b""
                if not pcm:
                    child.kill()
                    code = child.wait()
                    errors.seek(0)
                    said = errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
                    raise RuntimeError(f"espeak-ng gave no speech for {sentence!r} (exit code {code}): {said[-1]}")
                return pcm

            try:
                yield speak
            finally:
                child.kill()  # it only waits for the next line; nothing is lost
                with suppress(OSError):  # a line that a dead child never read must not hide its error
                    to_child.close()


def _clip(pcm: bytes) -> NDArray[np.int16]:
    """Trim both edges to at most EDGE_S of silence and bring the peak to PEAK (by MAX_GAIN at most)."""
    samples = np.frombuffer(pcm, dtype="<i2").astype(np.float64)
    peak = float(np.abs(samples).max(initial=0.0))
    loud = np.flatnonzero(np.abs(samples) > SILENCE * peak)
    if loud.size == 0:
        return np.zeros(0, dtype="<i2")
    edge = round(EDGE_S * SAMPLE_RATE_HZ)
    trimmed = samples[max(0, loud[0] - edge) : loud[-1] + 1 + edge]
    gain = min(MAX_GAIN, PEAK * 32767 / peak)
    return np.rint(trimmed * gain).astype("<i2")


def _digest(folder: Path) -> str:
    """SHA-256 over names and contents of all files but the mark."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARK):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return total.hexdigest()


def _read_mark(folder: Path) -> dict[str, Any] | None:
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return mark if isinstance(mark, dict) else None


def _is_finished(folder: Path, wanted: dict[str, int]) -> bool:
    """True for an intact corpus of these arguments, False where one may be made.

    Raises FileExistsError where making one would delete something: another corpus, or files that are not ours.
    """
    if not folder.exists():
        return False
    # Two levels are all a corpus has; a deeper search could cross a whole disk.
    found = [*folder.iterdir(), *folder.glob("wavs/*")] if folder.is_dir() else [folder]
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    foreign = [name for name in names if not _OURS.fullmatch(name)]
    if foreign:
        raise FileExistsError(
            f"{folder} holds files that are not an espeak corpus ({', '.join(foreign[:3])}). "
            "Give a new or empty folder: make_corpus(folder)."
        )
    mark = _read_mark(folder)
    if mark is None or mark.get("digest") != _digest(folder):
        return False  # half-made or damaged, and only our own files: make it again
    other = {key: mark.get(key) for key in wanted}
    if other != wanted:
        raise FileExistsError(
            f"{folder} holds a finished corpus of {other}, but {wanted} was asked for. "
            "Give another folder (default_cache(clips, seed) names one for each), or delete this one."
        )
    return True


def write_clips(
    folder: Path,
    texts: Iterable[str],
    clips: int,
    *,
    name: str = "espeak",
    voice: str = VOICE,
    min_s: float = MIN_S,
    max_s: float = MAX_S,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Speak texts, leave out those that last less than `min_s` or more than `max_s` seconds, and write the first
    `clips` of the others into an empty folder, LJSpeech layout.

    Raises ImportError without espeakng_loader, RuntimeError where espeak-ng fails, also for a voice that it lacks.
    """
    (folder / "wavs").mkdir()
    lines: list[str] = []
    with _speaker(voice) as speak:
        for text in texts:
            samples = _clip(speak(text))
            if not min_s <= len(samples) / SAMPLE_RATE_HZ <= max_s:
                continue
            clip = f"{name}_{len(lines):05d}"
            with wave.open(str(folder / "wavs" / f"{clip}.wav"), "wb") as out:
                out.setparams((1, 2, SAMPLE_RATE_HZ, len(samples), "NONE", "not compressed"))
                out.writeframes(samples.tobytes())
            lines.append(f"{clip}|{text}|{text}\n")
            if progress is not None:
                progress(len(lines), clips)
            if len(lines) == clips:
                break
    (folder / "metadata.csv").write_text("".join(lines), encoding="utf-8", newline="\n")


def _write(folder: Path, wanted: dict[str, int], progress: Callable[[int, int], None] | None) -> None:
    write_clips(folder, sentences(wanted["seed"]), wanted["clips"], progress=progress)
    mark = wanted | {"espeakng_loader": version("espeakng-loader"), "digest": _digest(folder)}
    (folder / MARK).write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8", newline="\n")


def _check(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(
            f"{name}={value!r} is not a whole number from {low} to {high}. Write for example {name}={low}."
        )


def make_corpus(
    folder: Path, clips: int = 400, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Make, or reuse, an English corpus in LJSpeech layout: `metadata.csv` (`id|text|text`) and `wavs/id.wav`.

    Clips last 0.8 to 2.3 s (22050 Hz, 16 bit, mono), with at most 30 ms of silence at each end. The texts of a smaller
    corpus are the first texts of a larger one of the same seed. `progress(done, clips)` is called after each clip, and
    not at all where a finished corpus is reused. Returns the folder as an absolute path.

    Raises ValueError for clips outside 1..20000 or a negative seed, ImportError without espeakng_loader,
    FileExistsError if the folder holds other files or a corpus of other arguments, RuntimeError if espeak-ng fails.
    """
    _check("clips", clips, 1, MAX_CLIPS)
    _check("seed", seed, 0, 2**63 - 1)
    wanted = {"format": FORMAT, "clips": clips, "seed": seed}
    folder = Path(folder).expanduser().resolve()
    if _is_finished(folder, wanted):
        return folder
    _loader()
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}.half-"
    _remove_stale(folder.parent, prefix)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix, ignore_cleanup_errors=True) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        _write(new, wanted, progress)
        # Another process may have finished the same corpus meanwhile; its bytes are ours.
        if not _is_finished(folder, wanted):
            if folder.exists():
                folder.rename(Path(temporary) / "old")
            try:
                new.rename(folder)
            except OSError:  # refused where that process was faster by a moment
                if not _is_finished(folder, wanted):
                    raise
    return folder


def _remove_stale(parent: Path, prefix: str) -> None:
    for path in parent.iterdir():
        with suppress(OSError):  # another process may be clearing up too
            if path.name.startswith(prefix) and time.time() - path.stat().st_mtime > _STALE_S:
                shutil.rmtree(path, ignore_errors=True)


def default_cache(clips: int = 400, seed: int = 0) -> Path:
    """The folder in the user's cache for a corpus of these arguments: $XDG_CACHE_HOME or ~/.cache, then tts-brain.

    The name holds the version of espeakng_loader, since another version speaks with other samples; raises ImportError
    without it. Creates nothing.
    """
    _loader()
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = f"espeak-corpus-v{FORMAT}-{version('espeakng-loader')}-{clips}-{seed}"
    return base / "tts-brain" / name
