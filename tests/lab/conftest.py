"""What tests of the lab share."""

import pytest

from quantjax.lab import data, models
from quantjax.lab.train import engine


@pytest.fixture(scope="module")
def task():
    return engine.Task(models.build("small-cnn", 10), data.load("digits"))
