"""Where the real data sets lie: `$SIDRL_DATA`, or `shared/data` beside the checkout."""

import os
from pathlib import Path

import pytest


def shared_data(name: str) -> Path:
    """The folder of a real data set; skips the test where it is absent."""
    root = Path(os.environ.get("SIDRL_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    folder = root / name
    if not folder.is_dir():
        pytest.skip(f"real data {name} is not at {folder}; set SIDRL_DATA to the folder that holds it")
    return folder
