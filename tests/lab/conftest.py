"""What tests of the lab share."""

import pytest

from quantjax.lab import data, models
from quantjax.lab.train import tasks


@pytest.fixture(scope="module")
def task():
    return tasks.classification(models.build("small-cnn", 10), data.load("digits"))
