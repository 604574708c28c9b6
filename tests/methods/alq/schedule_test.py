"""Algorithm 5 with appendix C's epochs and rates, as settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj


def test_every_phase_has_the_rate_of_appendix_c():
    phases = qj.alq_rounds(
        10, 2, 0.6, prune_epochs=1, basis_epochs=2, coordinate_epochs=2, start_epochs=2,
        post_epochs=6, finish_epochs=2, basis_rate=1e-3, coordinate_rate=1e-4,
    )  # fmt: skip
    once = [
        ("prune", 10, 1e-3),
        ("basis", 10, 1e-3),
        ("basis", 10, 1e-4),  # a tenth at half
        ("coordinate", 10, 1e-4),
        ("coordinate", 10, 1e-5),
    ]
    expected = [
        ("basis", 10, 1e-3),
        ("basis", 10, 1e-4),
        *once,
        *once,
        # After the last pruning all rates are a tenth; bases take a third of the epochs.
        ("basis", 10, 1e-4),
        ("basis", 10, 1e-5),
        ("coordinate", 20, 1e-5),
        ("coordinate", 20, 1e-6),
        ("ste-loss-aware", 10, 1e-4),
        ("ste-loss-aware", 10, 0.95e-4),
    ]
    assert [(phase.kind, phase.steps) for phase in phases] == [one[:2] for one in expected]
    np.testing.assert_allclose([phase.learning_rate for phase in phases], [e[2] for e in expected])
    assert [phase.keep for phase in phases if phase.kind == "prune"] == [0.6, 0.6]


@pytest.mark.parametrize("scale", [3.0, 1e3])
def test_rate_scale_leaves_pruning_alone(scale):
    """Eq. 13's metric has the rate of its own: another one ranks coordinates otherwise."""
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(16, 12)), jnp.float32)}
    grads = {"kernel": jnp.asarray(rng.normal(size=(16, 12)) * 30, jnp.float32)}
    phases = (qj.Phase("prune", 1, 1e-1, keep=0.5),)

    def masks(phases, **kwargs):
        tx = qj.alq(qj.multi_bit(3, axes=-2), phases, preselect=1.0, **kwargs)
        state = tx.init(params)
        _, state = jax.jit(tx.update)(grads, state, qj.alq_params(state, params))
        return np.asarray(qj.alq_state(state).buffers["kernel"]["mask"])

    np.testing.assert_array_equal(masks(phases), masks(phases, rate_scale=scale))
    # The test can fail: that rate in the phase itself cuts other coordinates.
    other = (phases[0]._replace(learning_rate=1e-1 * scale),)
    assert np.any(masks(phases) != masks(other))
