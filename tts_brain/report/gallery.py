"""Alignment pictures over time and audio players, the arms beside each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tts_brain.report.data import AlignmentPicture, ArmData, AudioClip, ReportData
from tts_brain.report.media import alignment_png, sound_wav
from tts_brain.report.story import NOT_FINITE, number_text
from tts_brain.report.timeline import escape, missing

_MAX_COLUMNS = 6  # pictures beside each other


def alignments(data: ReportData) -> str:
    """Alignment pictures: for each utterance a row per arm and a column per step."""
    head = "<h2>Alignments over time</h2>"
    utterances = list(dict.fromkeys(p.utterance for arm in data.arms for p in arm.alignments))
    if not utterances:
        return head + missing("There are no alignment pictures: no arm saved an attention matrix.")
    head += (
        "<p class='note'>Frames run to the right, text upward; a good alignment is one bright line from the lower left "
        "to the upper right. Brightness is the square root of the weight, on the same scale in all pictures.</p>"
    )
    first, *others = [_utterance(data.arms, utterance) for utterance in utterances]
    more = f"<details><summary>{len(others)} more</summary>{''.join(others)}</details>" if others else ""
    return head + first + more


def _utterance(arms: Sequence[ArmData], utterance: str) -> str:
    of_arm = [[p for p in arm.alignments if p.utterance == utterance] for arm in arms]
    steps = evenly(sorted({p.step for pictures in of_arm for p in pictures}), _MAX_COLUMNS)
    text = next(p.text for pictures in of_arm for p in pictures)
    cells = ""
    for arm, pictures in zip(arms, of_arm, strict=True):
        cells += f"<div class='rowhead'>{escape(arm.label)}</div>"
        by_step = {p.step: p for p in pictures}
        cells += "".join(_picture(arm, step, by_step.get(step)) for step in steps)
    columns = f"grid-template-columns:repeat({len(steps)},minmax(8.5rem,{'1fr' if len(steps) > 3 else '18rem'}))"
    return (
        f"<h3>{escape(utterance)}</h3><p dir='auto'>“{escape(text)}”</p>"
        f"<div class='scroll' tabindex='0' role='region' aria-label='Alignments of {escape(utterance)}'>"
        f"<div class='pictures' style='{columns}'>{cells}</div></div>"
    )


def _picture(arm: ArmData, step: int, picture: AlignmentPicture | None) -> str:
    address = alignment_png(np.asarray(picture.matrix)) if picture else None
    if picture is None or address is None:
        return f"<div class='none'>no picture at step {step:,}</div>"
    matrix = np.asarray(picture.matrix)
    lost = "" if np.isfinite(matrix).all() else f", some weights {NOT_FINITE}"
    size = f"{matrix.shape[0]} frames by {matrix.shape[1]} tokens"
    focus = number_text(float(np.nan_to_num(matrix.max(axis=1)).mean()))
    alt = escape(f"{arm.label}, step {step}: {size}, mean largest weight {focus}{lost}")
    return f"<figure><img alt='{alt}' src='{address}'><figcaption>step {step:,}{lost}</figcaption></figure>"


def evenly(steps: Sequence[int], limit: int) -> list[int]:
    """At most ``limit`` of the steps, the first and the last among them."""
    if len(steps) <= limit:
        return list(steps)
    return [steps[i] for i in np.linspace(0, len(steps) - 1, limit).round().astype(int)]


def listen(data: ReportData) -> str:
    """Audio players, clips of one title beside each other."""
    head = "<h2>Listen</h2>"
    titles = list(dict.fromkeys(clip.title for arm in data.arms for clip in arm.audio))
    if not titles:
        return head + missing("There is nothing to hear: no arm synthesised speech.")
    text = ""
    for title in titles:
        clips = [(arm, clip) for arm in data.arms for clip in arm.audio if clip.title == title]
        players = "".join(_player(arm, clip) for arm, clip in clips)
        text += f"<h3>{escape(title)}</h3><p dir='auto'>“{escape(clips[0][1].text)}”</p>"
        text += f"<div class='clips'>{players}</div>"
    return head + text


def _player(arm: ArmData, clip: AudioClip) -> str:
    address = sound_wav(np.asarray(clip.samples), clip.sample_rate)
    if address is None:
        return f"<div>{escape(arm.label)}<p class='muted'>no sound came out</p></div>"
    seconds = np.asarray(clip.samples).size / clip.sample_rate
    name = escape(f"{clip.title}, {arm.label}")
    return (
        f"<div>{escape(arm.label)} <span class='muted'>{seconds:.1f} s</span>"
        f"<audio controls preload='metadata' aria-label='{name}' src='{address}'></audio></div>"
    )
