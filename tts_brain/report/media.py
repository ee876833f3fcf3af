"""Alignment matrices and sound as ``data:`` addresses, so that the page needs no other file."""

from __future__ import annotations

import base64
import io
import wave
from functools import cache
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_FRAMES, MAX_TOKENS = 260, 130


def alignment_png(matrix: NDArray[Any]) -> str | None:
    """The matrix (T, N) as a picture, frames to the right and tokens upward; None when it holds nothing.

    Brightness is the square root of the weight: one fixed scale for all pictures, that still shows the faint
    weights (1/N) from before the alignment. Each pixel is the largest weight that falls on it.
    """
    if matrix.ndim != 2 or 0 in matrix.shape:
        return None
    weights = np.nan_to_num(np.asarray(matrix, dtype=np.float64), nan=0.0, posinf=1.0, neginf=0.0).clip(0.0, 1.0)
    small = _pool(_pool(weights, MAX_FRAMES).T, MAX_TOKENS)[::-1]  # (tokens, frames), first token below
    image = Image.fromarray(np.round(255 * np.sqrt(small)).astype(np.uint8), mode="P")
    image.putpalette(_palette())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return _data_address("image/png", buffer.getvalue())


def sound_wav(samples: NDArray[np.float32], sample_rate: int) -> str | None:
    """16-bit mono WAV; None when there is nothing to hear. Samples that are not finite become silence."""
    if samples.size == 0 or sample_rate <= 0:
        return None
    finite = np.nan_to_num(np.asarray(samples, dtype=np.float64).reshape(-1), nan=0.0, posinf=0.0, neginf=0.0)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(int(sample_rate))
        file.writeframes(np.round(finite.clip(-1.0, 1.0) * 32767).astype("<i2").tobytes())
    return _data_address("audio/wav", buffer.getvalue())


def _pool(rows: NDArray[np.float64], limit: int) -> NDArray[np.float64]:
    if len(rows) <= limit:
        return rows
    starts = np.linspace(0, len(rows), limit, endpoint=False).astype(int)
    return np.maximum.reduceat(rows, starts, axis=0)


@cache
def _palette() -> list[int]:
    colours = matplotlib.colormaps["magma"](np.arange(256))[:, :3]
    return [int(v) for v in np.round(255 * colours).reshape(-1)]


def _data_address(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
