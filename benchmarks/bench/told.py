"""Was the user told what is wrong? What counts is what ``tts-brain explain`` prints of a run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tts_brain.journal import read_journal
from tts_brain.report.story import fold

_CLOSE = r"(?:[^.;:]|\.(?=\d)){0,40}"
_GUIDE = r"guid(ance|ed (attention|weight|loss)|e)"
_DATA_WORDS = r"(clip|batch|data|feature|audio|recording|spectrogram)"
_NOT_FINITE = r"(not finite|non-finite|NaN|infinit\w*)"


def _too(thing: str, how: str) -> str:
    return rf"\b{thing}\b{_CLOSE}(?<!not )\btoo ({how})\b"


# What a sentence must say to have named the cause: the thing, and that it is wrong. A symptom ("the loss rises"), a
# remedy alone ("lower the rate") and a figure without a verdict are no cause.
_PATTERNS = {
    "rate too high": _too("rate", "high|large|big|fast"),
    "rate too low": _too("rate", "low|small|slow"),
    "guidance off": rf"\b{_GUIDE}\b{_CLOSE}\b(is|was|turned) (off|0(?!\.)|zero|missing)\b|\b(no|without) {_GUIDE}\b",
    "guidance too weak": _too(_GUIDE, "weak|low|small"),
    "guidance too strong": _too(_GUIDE, "strong|high|large"),
    "batch too small": _too("batch(es| size)?", "small|few"),
    "edge silence": rf"\b(leading|trailing|edge) silence\b|\bsilence\b{_CLOSE}\b(start|end|ends|edges)\b",
    "wrong transcripts": rf"\b(is|are|seems?|look) mislabell?ed\b|\b(transcript|text)s?\b{_CLOSE}"
    r"\b(wrong|mismatch\w*|not (match|belong|fit)|not what is (said|spoken))\b",
    "non-finite data": rf"\b{_DATA_WORDS}(es|s)?\b{_CLOSE}\b{_NOT_FINITE}\b|\b{_NOT_FINITE} {_DATA_WORDS}",
    "exploding batch": rf"\b(clip|batch|recording)(es|s)?\b{_CLOSE}\b(explod\w*|outlier|far too loud|times the usual)\b"
    rf"|\bgradients?\b{_CLOSE}\bexplod\w*",
    "stop token": rf"\bstop[- ](token|label)s?\b{_CLOSE}\b(wrong\w*|inverted|misplaced|too (early|late))\b",
    "reduction factor": _too("(reduction factor|r)", "low|small"),
    "half precision": rf"\b(fp16|float16|half precision|loss scale)\b{_CLOSE}"
    r"\b(overflow\w*|underflow\w*|too (coarse|small|large|high|low)|use (fp32|float32|bf16))\b",
    "alignment lost": r"\b(alignment|attention) (was \S+ and has been under half|(was|is) lost|collapsed)",
}
CAUSES: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {cause: re.compile(pattern, re.IGNORECASE) for cause, pattern in _PATTERNS.items()}
)


def told(journal: Path | Iterable[Mapping[str, Any]], cause: str) -> bool:
    """Was the user told this cause?

    Raises:
        ValueError: a cause that is not in ``CAUSES``.
    """
    if cause not in CAUSES:
        raise ValueError(f"no cause {cause!r}; known are {', '.join(CAUSES)}")
    return cause in named(journal)


def named(journal: Path | Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """All the causes that the user was told; those that are not true are false alarms, to be counted too.

    Looks at what ``tts-brain explain`` prints of a run: reasons of decisions (of holds in a row the last), and events.
    A sentence that names two causes is a list of suspects, and names none.

    Args:
        journal: its records, or a run folder.
    """
    records = read_journal(journal) if isinstance(journal, Path) else journal
    found: set[str] = set()
    for entry in fold(records):
        text = str(entry.last.get("reason") or entry.last.get("message") or "")
        for sentence in re.split(r"(?<!\d)\.\s+|;\s+", text):
            causes = [cause for cause, pattern in CAUSES.items() if pattern.search(sentence)]
            if len(causes) == 1:
                found.add(causes[0])
    return frozenset(found)
