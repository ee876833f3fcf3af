"""The report as one HTML file that needs nothing else: no network, no second file."""

from __future__ import annotations

import os
from pathlib import Path

from plotly.offline import get_plotlyjs

from tts_brain.report.data import ReportData
from tts_brain.report.page import body
from tts_brain.report.style import CONTENT_POLICY, CSS, SCRIPT
from tts_brain.report.timeline import escape


def write_report(data: ReportData, path: Path) -> Path:
    """Write the page to ``path``; a reader sees the old file or the whole new one, never half of it.

    Raises:
        OSError: the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(render(data), encoding="utf-8")
        part.replace(path)  # atomic
    finally:
        part.unlink(missing_ok=True)
    return path


def render(data: ReportData) -> str:
    """The page as text (about 5 MB, nearly all of it plotly)."""
    content = body(data)
    script = f"<script>{get_plotlyjs()}</script><script>{SCRIPT}</script>" if "class='chart'" in content else ""
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(data.title)}</title><style>{CSS}</style></head>\n<body>{content}\n"
        "<noscript><p>The curves need JavaScript; everything else is on the page.</p></noscript>"
        f"{script}</body></html>\n"
    )
