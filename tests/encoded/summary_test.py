import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.encoded.summary import size_text

FLOAT32 = np.dtype("float32")


def network():
    """Float params and an encoding of them, small enough to count by hand."""
    codes = jnp.asarray([[1, -1], [0, 1], [1, 1], [0, 0], [1, 0]], jnp.int8)
    params = {
        "Dense_0": {
            "kernel": 0.5 * codes + jnp.asarray([[0.1, 0.0]]),
            "bias": jnp.ones(2, jnp.bfloat16),
        },
        "Dense_1": {"kernel": jnp.zeros((2, 3))},
    }
    mask = jnp.asarray([[[True, False], [True, True], [False, False]]])
    bits = qj.MultiBit(jnp.ones((2, 3, 2), jnp.int8), 1.0 * mask, mask, FLOAT32)
    encoded = {
        "Dense_0": {
            "kernel": qj.Grid(codes, jnp.full((1, 1), 0.5), 2, FLOAT32),
            "bias": params["Dense_0"]["bias"],
        },
        "Dense_1": {"kernel": bits.validate()},
    }
    return params, encoded


def test_rows():
    params, encoded = network()
    rows = {row.path: row for row in qj.summary(encoded, params).rows}
    kernel = rows["Dense_0/kernel"]
    assert kernel[:5] == ("Dense_0/kernel", (5, 2), "Grid", 2, (24 + 32) // 8)
    assert kernel.squared_error == pytest.approx(5 * 0.1**2, rel=1e-5)
    norm = float(jnp.sum(params["Dense_0"]["kernel"] ** 2))
    assert kernel.relative_error == pytest.approx((0.05 / norm) ** 0.5, rel=1e-5)
    assert kernel.groups == 1
    assert kernel.coder == "packed"
    # A plain leaf has the bits of its dtype, and no error.
    assert rows["Dense_0/bias"][1:] == ((2,), "bfloat16", 16, 4, None, None, None, "")
    # 3 groups of 2 weights with 1, 2 and 0 bases: 6 + 3 * 2 bits, padded to 16, and 3 coordinates.
    sums = rows["Dense_1/kernel"]
    assert sums.groups == 3
    assert sums[1:5] == ((2, 3), "MultiBit", 1.0, 2 + 12)
    assert sums.squared_error == 2 * (1.0 + 4.0)
    assert sums.relative_error == 0.0  # of a leaf of norm zero


def test_totals():
    _, encoded = network()
    summary = qj.summary(encoded)
    assert [row.squared_error for row in summary.rows] == [None] * 3
    assert summary.nbytes == 7 + 4 + 14
    assert summary.compression == pytest.approx(4 * (10 + 2 + 6) / 25)
    assert qj.summary({}).compression == 0


def test_text_and_notebook_cell():
    params, encoded = network()
    text = str(qj.summary(encoded, params))
    for part in ("Dense_0/kernel", "5x2", "Grid", "7 B", "25 B", "2.9x smaller", "error"):
        assert part in text
    assert "error" not in str(qj.summary(encoded))
    assert max(map(len, text.splitlines())) <= 100
    html = qj.summary(encoded)._repr_html_()
    assert html.startswith("<pre>")
    assert "Dense_1/kernel" in html
    assert "scalar" in str(qj.summary({"scale": jnp.ones(())}))


def test_params_of_another_tree():
    params, encoded = network()
    del params["Dense_1"]
    with pytest.raises(ValueError, match=r"another tree.*Dense_1/kernel"):
        qj.summary(encoded, params)


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (56_320, "56.3 kB"), (2_340_000, "2.34 MB")],
)
def test_sizes_as_text(nbytes, expected):
    assert size_text(nbytes) == expected


@pytest.mark.parametrize(
    ("nbytes", "expected"), [(999_900, "1 MB"), (1_234_000_000, "1.23 GB"), (999_999_999, "1 GB")]
)
def test_sizes_without_an_exponent(nbytes, expected):
    assert size_text(nbytes) == expected


def test_groups_and_what_stays_float_are_seen():
    rng = np.random.default_rng(0)
    params = {
        "Blocks": {"kernel": jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32)},
        "Embed_0": {"embedding": jnp.asarray(rng.normal(size=(7, 4)), jnp.float32)},
        "pos": jnp.ones((2, 3)),
        "scale": jnp.ones(3),
    }

    def groups(quantizer):
        table = qj.summary(quantizer.encode(params, quantizer.init(params)))
        return [row.groups for row in table.rows], table.notes

    assert groups(qj.uniform(4))[0] == [1, 1, None, None]
    assert groups(qj.stacked(qj.uniform(4), {"Blocks": 1}))[0] == [3, 1, None, None]
    found, notes = groups(qj.stacked(qj.uniform(4, axes="channel"), {"Blocks": 1}))
    assert found == [3 * 6, 7, None, None]
    assert notes == ("not encoded, of two or more dimensions: pos",)
    assert "groups" in str(qj.summary(params))


def test_inputs_of_a_fitted_network():
    """What only the fitting pass needs has no elements afterwards."""
    model = nn.Dense(3)
    x = jnp.ones((4, 5))
    variables = model.init(jax.random.key(0), x)
    apply = qj.linen.quantize_inputs(model.apply, qj.srq_input(3, signed=True))
    _, quant = apply(variables, x, mutable=["quant", "quant_stats"])
    assert quant["quant_stats"]["cell_counts"].size == 0
    encoded = qj.uniform(4).encode(variables["params"], qj.uniform(4).init(variables["params"]))
    assert "half of a signed grid is idle" in str(qj.summary(encoded, inputs=quant))
