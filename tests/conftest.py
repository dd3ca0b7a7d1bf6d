"""What every test may use: real input lying beside the project, when it is there."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def shared_real() -> Path:
    """The folder of real tokenizers, models and rows beside the project; the test is skipped without it."""
    folder = Path(__file__).parents[2] / "shared" / "real"
    if not folder.is_dir():
        pytest.skip("real input beside the project is missing")
    return folder
