"""How far synthesis is from a recording, and how lively beside it."""

from __future__ import annotations

import math

import librosa
import numpy as np
from scipy.fft import dct

_COEFFICIENTS = 13
# dB per unit of Euclidean distance between natural-log cepstra (Kubichek 1993, eq. 1).
_TO_DB = 10.0 / math.log(10.0) * math.sqrt(2.0)


def distortion(spoken: np.ndarray, reference: np.ndarray) -> float:
    """Mel-cepstral distortion after dynamic time warping, in dB, mean over the path.

    Args:
        spoken, reference: log-10 mel spectrograms, (frames, mels). NaN when either is not finite.
    """
    if not (np.isfinite(spoken).all() and np.isfinite(reference).all()):
        return math.nan
    left, right = (_cepstrum(mel) for mel in (spoken, reference))
    cost, path = librosa.sequence.dtw(left.T, right.T, metric="euclidean")
    return float(_TO_DB * cost[-1, -1] / len(path))


def liveliness(spoken: np.ndarray, reference: np.ndarray) -> float:
    """Standard deviation over time of the cepstral coefficients, of ``spoken`` over ``reference``, geometric mean.

    1 is as lively as the recording, a blur is near 0: what distortion favours (after the global variance of Toda and
    Tokuda 2007, here as a ratio of deviations).

    Args:
        spoken, reference: log-10 mel spectrograms, (frames, mels). NaN when either is not finite.
    """
    if not (np.isfinite(spoken).all() and np.isfinite(reference).all()):
        return math.nan
    spread, usual = (np.log(_cepstrum(mel).std(axis=0) + 1e-12) for mel in (spoken, reference))
    return float(np.exp(np.mean(spread - usual)))


def _cepstrum(mel: np.ndarray) -> np.ndarray:
    """Cepstral coefficients 1 to 13 of each frame; the 0th, loudness, is left out."""
    natural = mel * math.log(10.0)
    # Orthonormal over all bands, scaled so that a cepstrum does not depend on how many there are.
    return dct(natural, axis=1, norm="ortho")[:, 1 : _COEFFICIENTS + 1] / math.sqrt(mel.shape[1] / 2.0)
