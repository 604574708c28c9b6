import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from experiments.psg import table_a1
from quantjax.lab import models
from quantjax.lab.deploy import deploy, reestimated
from tests.lab.train import toy_task


def network():
    """Two layers whose errors at 3 bits are counted by hand: their steps are 1 and 2."""
    return {
        "params": {
            "Dense_0": {
                "kernel": jnp.asarray([[3.0, 1.25, -2.0], [0.0, -0.25, 1.5]]),
                "bias": jnp.asarray([0.3, 0.1, 0.2]),
            },
            "Dense_1": {"kernel": jnp.asarray([[-6.0, 2.5]])},
        },
        "batch_stats": {"mean": jnp.ones(3)},
    }


def test_what_ships_at_three_bits():
    variables = network()
    shipped = deploy(variables, qj.uniform(3))
    kernels = [layer["kernel"] for layer in shipped.variables["params"].values()]
    # 1.5 lies half-way and goes to the even code, 2.
    np.testing.assert_allclose(kernels[0], [[3, 1, -2], [0, 0, 2]], atol=1e-6)
    np.testing.assert_allclose(kernels[1], [[-6, 2]], atol=1e-6)
    assert shipped.variables["params"]["Dense_0"]["bias"] is variables["params"]["Dense_0"]["bias"]
    assert shipped.variables["batch_stats"] is variables["batch_stats"]
    assert shipped.encoded["Dense_1"]["kernel"].bits == 3
    assert [row.path for row in shipped.layers] == ["Dense_0/kernel", "Dense_1/kernel"]
    # Squared errors 1/16 + 1/16 + 1/4 and 1/4, over two layers.
    assert shipped.weight_error == pytest.approx((0.375 + 0.25) / 2)
    assert shipped.bits == 3
    # 18 and 6 bits of codes are 3 bytes and 1, two steps 8, the bias 12.
    assert shipped.summary.nbytes == 3 + 1 + 8 + 12


def test_the_error_of_a_bias_is_its_layers():
    shipped = deploy(network(), qj.uniform(3, biases=True))
    assert [row.path for row in shipped.layers if row.path.endswith("bias")] == ["Dense_0/bias"]
    # The bias lies on multiples of 0.1 already.
    assert shipped.weight_error == pytest.approx((0.375 + 0.25) / 2)
    variables = network()
    variables["params"]["Dense_0"]["bias"] = jnp.asarray([0.3, 0.14, 0.2])
    shipped = deploy(variables, qj.uniform(3, biases=True))
    assert shipped.weight_error == pytest.approx((0.375 + 0.04**2 + 0.25) / 2)


@pytest.mark.usefixtures("quick_programs")
def test_resnet32_has_the_34_layers_of_table_a1():
    """31 convolutions of 3x3, two of 1x1 in the shortcuts, a dense layer."""
    model = models.build("resnet32", 100)
    image = jnp.zeros((1, 32, 32, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    # Thirds and ones at two bits: a squared error of 1/9 for every third.
    params = jax.tree.map(lambda leaf: np.resize(np.float32([1, 1 / 3]), leaf.shape), params)
    shipped = deploy({"params": params}, table_a1.target(2))
    kernels = [row for row in shipped.layers if row.path.endswith("kernel")]
    assert len(kernels) == 34
    assert len(shipped.layers) == 35  # the dense bias
    total = sum(row.squared_error for row in shipped.layers)
    assert total > 1000
    assert shipped.weight_error == pytest.approx(total / 34)


def test_average_bits_are_weighted_by_size():
    quantizer = qj.partition({"Dense_0": qj.uniform(2), "Dense_1": qj.uniform(8)})
    assert deploy(network(), quantizer).bits == pytest.approx((6 * 2 + 2 * 8) / 8)


def test_a_trained_state_is_used_and_without_one_the_final_weights_are_fitted():
    variables, quantizer = network(), qj.uniform(3)
    state = quantizer.init(jax.tree.map(lambda leaf: leaf / 2, variables["params"]))
    trained = deploy(variables, quantizer, state)
    assert trained.variables["params"]["Dense_0"]["kernel"].max() == 1.5  # the trained range
    fitted = deploy(variables, quantizer)
    expected = deploy(variables, quantizer, quantizer.init(variables["params"]))
    jax.tree.map(np.testing.assert_array_equal, fitted.encoded, expected.encoded)


def test_weights_that_are_not_finite_do_not_ship():
    variables = network()
    variables["params"]["Dense_1"]["kernel"] = jnp.full((1, 2), jnp.nan)
    with pytest.raises(ValueError, match="Dense_1/kernel: 2 of 2 values are NaN"):
        deploy(variables, qj.uniform(3))


def test_a_quantizer_without_a_grid_ships_floats():
    shipped = deploy(network(), qj.zero())
    assert shipped.bits == 32
    assert shipped.weight_error == pytest.approx((9 + 1.5625 + 4 + 0.0625 + 2.25 + 42.25) / 2)


def test_batch_norms_are_reestimated_on_training_images():
    task = toy_task.make(train=64)
    variables = task.init(0)
    other = {**variables, "params": jax.tree.map(lambda x: 2 * x, variables["params"])}
    found = reestimated(task, other)
    x = task.inputs(task.dataset.train.images).reshape(64, -1)
    y = x @ other["params"]["Dense_0"]["kernel"] + other["params"]["Dense_0"]["bias"][None]
    stats = found["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], y.mean(0), atol=1e-4)
    np.testing.assert_allclose(stats["var"], y.var(0), rtol=1e-4)
    assert found["params"] is other["params"]
    plain = toy_task.make(batch_norm=False)
    assert reestimated(plain, plain.init(0)).keys() == {"params"}
