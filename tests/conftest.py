"""What several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short clips of espeak-ng; the runs take the shortest."""
    pytest.importorskip("espeakng_loader", reason="the speech for these tests is made by espeakng_loader")
    from tts_brain_coqui.espeak_corpus import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus") / "espeak", clips=40)
