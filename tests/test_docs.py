"""What README and docs say is what the code does."""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from tts_brain.cli import main
from tts_brain.config import BrainConfig
from tts_brain.types import KNOBS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SETTINGS = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")


def _rows(text: str) -> dict[str, list[str]]:
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith(("| `", "| knob `"))]
    return {cells[0].strip(): [c.strip() for c in cells[1:]] for cells in lines}


def test_every_setting_is_listed_with_its_default():
    rows = _rows(SETTINGS)
    for field in fields(BrainConfig):
        assert rows[f"`{field.name}`"][0].strip("`") == str(field.default), field.name


def test_every_knob_is_listed_with_its_ratio():
    text = {name: cells for key, cells in _rows(SETTINGS).items() for name in re.findall(r"`(\w+)`", key)}
    for knob in KNOBS.values():
        ratio = f"x{knob.max_ratio:g}"
        assert text[knob.name][-1] == (f"(value + {knob.scale:g}) {ratio}" if knob.scale else ratio), knob.name


def test_readme_has_exactly_two_set_up_commands():
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 2
    for block in blocks:
        assert block.count("\n") == 1
        assert shlex.split(block)[0] == "python3.11"


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, flags=re.S))
def test_python_in_the_readme_parses(block: str):
    assert ast.parse(block).body


def test_links_in_the_docs_lead_somewhere():
    for path in [ROOT / "README.md", *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


def test_links_to_headings_lead_to_one():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", path.read_text(encoding="utf-8")):
            page = path.parent / target if target else path
            assert anchor in headings(page), f"{path.name}: {target}#{anchor}"


def test_explain_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["explain", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "journal.jsonl" in message and str(tmp_path) in message


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    text = capsys.readouterr().out
    assert all(command in text for command in ("explain", "demo", "coqui-train"))
