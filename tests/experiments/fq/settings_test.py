"""The settings of FQ's protocol and of the pruners: when masks move, what decays, how often."""

import types

import jax
import numpy as np
import pytest

from experiments.fq import pruners, sparse_networks
from experiments.psg import protocol
from tests.experiments.psg.protocol_test import make

pytestmark = pytest.mark.usefixtures("quick_compilation")


class EnoughError(Exception):
    """Ends at a training."""


@pytest.fixture
def parts(monkeypatch):
    """A protocol of nine steps per epoch and 36 late ones."""
    parts = make(batch_size=35)
    assert parts.task.dataset.train.labels.size // parts.batch_size == 9
    monkeypatch.setattr(sparse_networks.engine, "make_steps", lambda *args: None)
    return parts


@pytest.fixture
def fits(monkeypatch):
    fits = []

    def fit(task, method, variables, total, **kwargs):
        fits.append((method, total))
        raise EnoughError

    monkeypatch.setattr(sparse_networks.engine, "fit", fit)
    return fits


def test_surgery_ends_after_three_quarters(parts, fits):
    start = parts.task.init(0)
    with pytest.raises(EnoughError):
        sparse_networks.prune(
            parts, start, {"Conv_.*": 0.5, ".*": 0.1}, epochs=4, rate=0.02, seed=0
        )
    ((method, total),) = fits
    assert total == 36
    assert repr(method.quantizer).count("end=27") == 2
    buffers = method.quantizer.init(start["params"]).buffers
    assert {path: float(mine["density"]) for path, mine in buffers.items()} == {
        "Conv_0/kernel": 0.5,
        "Conv_1/kernel": 0.5,
        "Dense_0/kernel": pytest.approx(0.1),
    }


def test_components_are_fitted_anew_after_an_epoch_on_masks_that_stay(parts, fits):
    start = parts.task.init(0)
    kernel = start["params"]["Dense_0"]["kernel"]
    masks = {"Dense_0/kernel": np.arange(kernel.size).reshape(kernel.shape) % 2 == 0}
    pruned = sparse_networks.Pruned(start, masks)
    with pytest.raises(EnoughError):
        sparse_networks.focus(parts, pruned, 5, epochs=7, rate=0.01, seed=0)
    ((method, total),) = fits
    assert total == 63
    assert "focused(5, refit_every=9)" in repr(method.quantizer)
    assert pruned.density == pytest.approx(0.5)


def test_kernels_decay_and_the_rate_is_the_given_one():
    params = {"layer": {"kernel": np.ones((2, 2)), "bias": np.ones(2)}}
    chain = sparse_networks.optimizer(0.5)
    updates, _ = chain.update(jax.tree.map(np.zeros_like, params), chain.init(params), params)
    np.testing.assert_allclose(updates["layer"]["kernel"], -0.5 * 1e-4)
    np.testing.assert_array_equal(updates["layer"]["bias"], 0)


def test_pruners_stop_at_three_quarters_and_psg_decays_below_eighty_percent(parts, monkeypatch):
    found = pruners._pruners(parts, 0.2)
    assert "end=27" in repr(found["surgery"])
    assert "magnitude(0.2, across=True, end=27, every=1)" in repr(found["magnitude, gradual"])
    decays = []

    def psg(target, strength, *, weight_decay):
        decays.append((strength, weight_decay))
        return protocol.sgd

    stand_in = types.SimpleNamespace(variables=parts.task.init(0), state=None)
    monkeypatch.setattr(protocol.Protocol, "_train", lambda *args: stand_in.variables)
    monkeypatch.setattr(pruners, "l0", lambda strength: protocol.qj.magnitude(1.0))
    monkeypatch.setattr(
        pruners,
        "_train",
        lambda parts, name, pruner, variables, seed: types.SimpleNamespace(
            variables=variables, state=pruner.init(variables["params"])
        ),
    )
    monkeypatch.setattr(pruners, "_row", lambda name, *args: {"row": name})
    monkeypatch.setattr(protocol, "psg", psg)
    strengths = {70: 200.0, 80: 600.0, 90: 600.0}
    rows = list(pruners.table(parts, strengths, 1e-6, seed=0))
    assert len(rows) == 3 * 5
    assert decays == [(200.0, 1e-4), (600.0, 0.0)]  # equal ones are trained once
    assert [row["strength"] for row in rows if row["row"] == "PSG, cut"] == [200.0, 600.0, 600.0]
