"""Real models, as folders that `make test-real` has written."""

from pathlib import Path

import pytest

MODELS = Path(__file__).parents[2] / ".venv" / "real-models"


@pytest.hookimpl(tryfirst=True)  # before `-m` selects tests by their markers
def pytest_collection_modifyitems(items):
    """Mark the tests of this folder, which `make test` leaves out."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker("real")


def folder_of(name: str) -> str:
    folder = MODELS / name
    if not folder.is_dir():
        pytest.fail(f"{folder} does not exist; run `make test-real`, which fetches the models")
    return str(folder)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct: 30 layers, byte-level BPE, a chat template."""
    return folder_of("smollm2")


@pytest.fixture(scope="session")
def gemma3():
    """Gemma 3 270M base: another tokenizer (SentencePiece), sliding attention, no chat template."""
    return folder_of("gemma3")
