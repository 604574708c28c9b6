"""Oracle arrays beside the project; tests that need them skip where they are absent."""

from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2].parent / "shared" / "golden"


def load(name: str):
    path = FOLDER / name
    if not path.is_file():
        pytest.skip(f"the oracle arrays {name} lie beside the project, and are absent here")
    return np.load(path)
