"""Fixtures of the tests with real hosts. They skip as a whole where Coqui or espeak-ng is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order: bit-identical can be asked for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for runs that several tests look at; removed afterwards, as checkpoints are large."""
    import shutil

    folder = tmp_path_factory.mktemp("runs")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def espnet_data(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> object:
    """A dozen clips as ESPnet reads them."""
    from espnet_run import Data

    return Data.make(corpus, tmp_path_factory.mktemp("espnet") / "data")
