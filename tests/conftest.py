"""Shared fixtures. Tests import the script from the repository's root, and helpers from here."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
CACHE = tempfile.TemporaryDirectory(prefix="alignfreeze-tests-")  # instead of the user's own cache
os.environ["XDG_CACHE_HOME"] = CACHE.name
FILES = "udpos/en/train.conllu udpos/en/test.conllu udpos/qaa/test.conllu parallel/en-qaa.tsv"
FILES = (*FILES.split(), "dictionary/en-qaa.txt")


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """The toy world: data/, and models/{distilbert,bert,xlmr,llama} with random weights.

    All tests share it, so a test must not change it.
    """
    import toy_world

    folder = tmp_path_factory.mktemp("world")
    texts = toy_world.build_data(folder)
    for architecture in toy_world.ARCHITECTURES:
        toy_world.build_model(folder, architecture, texts, steps=0)
    return folder


@pytest.fixture
def data(world, tmp_path) -> Path:
    """A copy of a part of the toy world's data, in English and qaa, which a test may change."""
    folder = tmp_path / "data"
    for name in FILES:
        lines = (world / "data" / name).read_text("utf-8").splitlines(keepends=True)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(lines[: 30 if "parallel" in name else None]), "utf-8")
    return folder
