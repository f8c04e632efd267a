"""Tests import the module from the repository's root, and helpers from this folder; they share a toy world."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
CACHE = tempfile.TemporaryDirectory(prefix="alignfreeze-tests-")  # nobody's own cache is read or written
os.environ["XDG_CACHE_HOME"] = CACHE.name


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """The toy world: data/, and models/{distilbert,bert,xlmr,llama} with random weights. Not to be written to."""
    import toy_world

    folder = tmp_path_factory.mktemp("world")
    texts = toy_world.build_data(folder)
    for architecture in toy_world.ARCHITECTURES:
        toy_world.build_model(folder, architecture, texts, steps=0)
    return folder


@pytest.fixture
def data(world, tmp_path) -> Path:
    """A copy of a little of the toy world's data, English and qaa, to be broken."""
    folder = tmp_path / "data"
    for name in ("udpos/en/train.conllu", "udpos/en/test.conllu", "udpos/qaa/test.conllu", "parallel/en-qaa.tsv",
                 "dictionary/en-qaa.txt"):  # fmt: skip
        lines = (world / "data" / name).read_text("utf-8").splitlines(keepends=True)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(lines[: 30 if "parallel" in name else None]), "utf-8")
    return folder
