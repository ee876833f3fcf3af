"""Off and observe are bit-identical to each host: the tests that show it, as a benchmark's rows."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

_ROOT = Path(__file__).resolve().parents[2]


def identity() -> list[dict[str, str | bool]]:
    """Run the identity tests of both hosts; one row per comparison."""
    tests = sorted((_ROOT / "tests" / "integrations").glob("test_*_identity.py"))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *map(str, tests)]
        subprocess.run(command, cwd=_ROOT, capture_output=True, check=False)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return [
            {
                "host": "coqui" if "coqui" in case.get("classname", "") else "espnet",
                "comparison": case.get("name", ""),
                "identical": all(child.tag == "properties" for child in case),  # a failure or a skip is a child
            }
            for case in cases
        ]
