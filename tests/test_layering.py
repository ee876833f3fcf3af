"""Imports point one way (ARCHITECTURE.md), what is installed is complete, and what is light stays light."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import tts_brain

ROOT = Path(__file__).parents[1]
CORE = ROOT / "tts_brain"

# A module imports only what stands on a lower line, or its own package.
RANKS = (
    ("types",),
    ("config", "journal", "statefile", "corpus", "arguments"),
    ("context", "attention", "losses"),
    ("feedback",),
    ("agents",),
    ("learning",),
    ("coordination",),
    ("manager",),
    ("report",),
    ("pytorch",),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
# The hosts' frameworks, and our own adapters to them.
FOREIGN = {"TTS", "trainer", "espnet", "espnet2", "tts_brain_coqui", "tts_brain_espnet"}


def modules() -> list[str]:
    """Dotted names of all modules under tts_brain, itself left out: it is the door to all."""
    paths = sorted(CORE.rglob("*.py"))
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in paths]
    return [name for name in names if name != "tts_brain"]


def imports(module: str) -> Iterator[str]:
    """Absolute names that a module imports, also within functions and for type checking."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module: str) -> None:
    own = module.split(".")[1]
    assert own in RANK, f"{own} has no rank; give it a line in RANKS and in ARCHITECTURE.md"
    for name in imports(module):
        parts = name.split(".")
        if parts[0] == "tts_brain":
            other = parts[1] if len(parts) > 1 else ""
            assert other == own or RANK.get(other, 99) < RANK[own], f"{module} (rank {RANK[own]}) imports {name}"


@pytest.mark.parametrize("module", [*modules(), "tts_brain"])
def test_the_core_imports_no_host(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(module)} & FOREIGN


def test_every_package_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in CORE.rglob("__init__.py")}
    folders = project["package-dir"]
    for init in (ROOT / "integrations").rglob("__init__.py"):
        folder = init.parent.relative_to(ROOT)
        host = "/".join(folder.parts[:2])
        package = next((name for name, where in folders.items() if where == host), f"{host} (no package-dir)")
        found.add(".".join([package, *folder.parts[2:]]))
    assert set(project["packages"]) == found


def test_every_public_name_can_be_had_and_is_listed() -> None:
    assert list(tts_brain.__all__) == sorted(tts_brain.__all__)
    for name in tts_brain.__all__:
        assert getattr(tts_brain, name).__name__ == name
        assert name in dir(tts_brain)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        tts_brain.Nothing  # noqa: B018


def test_what_the_type_checker_is_told_is_what_is_loaded() -> None:
    told = {name.rpartition(".")[2]: name for name in imports("tts_brain.__init__") if name.startswith("tts_brain.")}
    assert set(told) == set(tts_brain.__all__)
    for name, where in told.items():
        assert getattr(import_module(where.rpartition(".")[0]), name) is getattr(tts_brain, name)


@pytest.mark.parametrize("light", ["tts_brain.report.terminal", "tts_brain.cli", "tts_brain.journal"])
def test_telling_a_runs_story_needs_neither_torch_nor_sklearn(light: str) -> None:
    code = f"import {light}, sys; print(*[m for m in ('torch', 'sklearn', 'pywt') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == ""
