"""A corpus in LJSpeech layout as normalised features in memory: made once, kept in a cache, the same for every arm."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import librosa
import numpy as np
import soundfile
import torch
from espnet2.text.cleaner import TextCleaner
from espnet2.tts.feats_extract.log_mel_fbank import LogMelFbank
from torch import Tensor

from tts_brain.corpus import CorpusError, load_ljspeech

N_MELS = 80
HOP_S = 256 / 22050
# Below the loudest by this much counts as edge silence.
_TRIM_DB = 40.0
_VERSION = 1

Batch = tuple[list[str], dict[str, Tensor]]


@dataclass(frozen=True)
class Clip:
    """One utterance: ``text`` token numbers (N,), ``mel`` normalised log-10 mel spectrogram (T, 80)."""

    name: str
    text: np.ndarray
    mel: np.ndarray


@dataclass(frozen=True)
class Corpus:
    """Clips to train on and held-out ones, with what turns features back into log mel.

    Args:
        tokens: the symbols, by number; the last is ESPnet's ``<sos/eos>``.
        mean, std: per mel band, of the training clips.
    """

    name: str
    train: list[Clip]
    held_out: list[Clip]
    tokens: list[str]
    mean: np.ndarray
    std: np.ndarray


def load(
    folder: Path,
    *,
    min_s: float,
    max_s: float,
    held_out: int,
    trim: bool = True,
    cache: Path | None = None,
) -> Corpus:
    """Read a corpus, wav or flac; clips outside ``min_s`` to ``max_s`` (after trimming) are left out.

    Held out are the clips whose ids have the lowest SHA-256: the order of the lines plays no part.

    Raises:
        CorpusError: the folder cannot be read, or holds too few clips of that length.
    """
    items = load_ljspeech(folder)
    made = _cached(folder, items, trim, cache)
    rate = float(made["rate"])
    cleaner = TextCleaner("tacotron")
    texts = {item["id"]: cleaner(item["text"]).lower() for item in items}
    frames = {name: made[name].shape[0] for name in texts}
    hop_s = 256 / rate
    chosen = sorted(name for name in texts if min_s <= frames[name] * hop_s <= max_s)
    if len(chosen) < 3 * held_out:
        raise CorpusError(
            f"{folder}: only {len(chosen)} clips last {min_s} to {max_s} s; give another folder, or --max-seconds"
        )
    chosen.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    symbols = sorted({letter for name in chosen for letter in texts[name]})
    tokens = ["<blank>", "<unk>", *symbols, "<sos/eos>"]
    number = {symbol: n for n, symbol in enumerate(tokens)}
    train_names = sorted(chosen[held_out:])
    everything = np.concatenate([made[name] for name in train_names])
    mean, std = everything.mean(0), everything.std(0).clip(1e-3)

    def clip(name: str) -> Clip:
        text = np.array([number[letter] for letter in texts[name]])
        return Clip(name, text, ((made[name] - mean) / std).astype(np.float32))

    held = [clip(name) for name in sorted(chosen[:held_out])]
    return Corpus(folder.resolve().name, [clip(n) for n in train_names], held, tokens, mean, std)


def batches(clips: list[Clip], size: int, seed: int) -> Iterator[Batch]:
    """For ever: clips of like length together, the batches in an order that hangs only on ``seed``."""
    generator = np.random.default_rng(seed)
    while True:
        # A little noise on the lengths, so that the same clips do not always meet.
        keys = [len(c.mel) * generator.uniform(0.9, 1.1) for c in clips]
        order = np.argsort(keys, kind="stable")
        groups = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        for number in generator.permutation(len(groups)):
            yield collate([clips[i] for i in groups[number]])


def collate(clips: list[Clip]) -> Batch:
    """As ESPnet's model takes it, features in place of speech; the longest text first, as its encoder wants."""
    clips = sorted(clips, key=lambda c: (-len(c.text), c.name))
    texts, mels = [len(c.text) for c in clips], [len(c.mel) for c in clips]
    text = torch.zeros(len(clips), max(texts), dtype=torch.long)
    speech = torch.zeros(len(clips), max(mels), N_MELS)
    for row, c in enumerate(clips):
        text[row, : len(c.text)] = torch.from_numpy(c.text)
        speech[row, : len(c.mel)] = torch.from_numpy(c.mel)
    lengths = {"text_lengths": torch.tensor(texts), "speech_lengths": torch.tensor(mels)}
    return [c.name for c in clips], {"text": text, "speech": speech, **lengths}


def _cached(folder: Path, items: list[dict[str, str]], trim: bool, cache: Path | None) -> dict[str, np.ndarray]:
    stamp = [f"{item['id']} {Path(item['audio_file']).stat().st_size}" for item in items]
    key = hashlib.sha256("\n".join([str(_VERSION), str(trim), *stamp]).encode()).hexdigest()[:16]
    place = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tts-brain" / "bench"
    file = place / f"{folder.resolve().name}-{key}.npz"
    if not file.exists():
        place.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, **_features(items, trim))
        partial.replace(file)
    return dict(np.load(file))


def _features(items: list[dict[str, str]], trim: bool) -> dict[str, np.ndarray]:
    rate = soundfile.info(items[0]["audio_file"]).samplerate
    extract = LogMelFbank(fs=rate, n_fft=1024, hop_length=256, n_mels=N_MELS, fmin=80, fmax=min(7600, rate // 2))
    made: dict[str, np.ndarray] = {"rate": np.array(rate)}
    for item in items:
        audio, own_rate = soundfile.read(item["audio_file"], dtype="float32")
        if own_rate != rate or audio.ndim != 1:
            raise CorpusError(f"{item['audio_file']}: {own_rate} Hz, {audio.ndim} channels; all must be {rate} Hz, one")
        if trim:
            audio, _ = librosa.effects.trim(audio, top_db=_TRIM_DB)
        speech = torch.from_numpy(np.ascontiguousarray(audio))[None]
        with torch.no_grad():
            mel, _ = extract(speech, torch.tensor([speech.shape[1]]))
        made[item["id"]] = mel[0].numpy()
    return made
