"""Networks as ONNX: the logits of ONNX Runtime, and integers of few bits in the file."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.encoded.onnx import export_onnx
from tests.encoded.export_test import LARGE, LEAVES, layers, network


@pytest.fixture(scope="module")
def onnx():
    pytest.importorskip("jax2onnx", reason="the extra `onnx` is not installed")
    return pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def run(onnx):
    runtime = pytest.importorskip("onnxruntime")

    def run(model, x):
        session = runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
        return session.run(None, {"x": x})

    return run


def test_every_kind_of_leaf(run):
    leaves = {name: leaf for name, leaf in LEAVES.items() if leaf.dtype == np.float32}

    def apply(tree, x):
        return [x[0, 0] * leaf for leaf in tree.values()]

    x = np.ones((2, 1), np.float32)
    found = run(export_onnx(apply, leaves, x), x)
    for (name, leaf), values in zip(qj.decode(leaves).items(), found, strict=True):
        np.testing.assert_allclose(values, leaf, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    "inputs", [None, qj.uniform_input(8), qj.srq_input(4), qj.multi_bit_input(2)], ids=str
)
def test_logits_with_batch_norm_and_quantized_inputs(run, inputs):
    x = np.random.default_rng(0).normal(size=(9, 8, 8, 1)).astype(np.float32)
    apply, variables = network(qj.uniform(3, axes="channel"), inputs, x)
    model = export_onnx(apply, variables, x)
    logits = jax.jit(apply)(qj.decode(variables), x)
    np.testing.assert_allclose(run(model, x)[0], logits, atol=1e-5)
    np.testing.assert_allclose(run(model, x[:1])[0], logits[:1], atol=1e-5)


def test_weights_are_integers_of_few_bits(onnx, run):
    x = np.random.default_rng(0).normal(size=(2, 512)).astype(np.float32)
    data = export_onnx(layers, LARGE, x)
    model = onnx.load_from_string(data)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert kinds["ternary.codes"] == kinds["bases.basis0"] == onnx.TensorProto.INT2
    assert kinds["3 bits.codes"] == onnx.TensorProto.INT4
    assert kinds["table.codes"] == onnx.TensorProto.UINT4
    assert "DequantizeLinear" in {node.op_type for node in model.graph.node}
    slots = int(LARGE["bases"].mask.sum(axis=-1).max())
    weights = 512 * 512 * (2 + 4 + 4 + 2 * slots) // 8
    scales = 4 * (1 + 512 + 16 + 16 * 512 * slots)
    assert weights + scales < len(data) < weights + scales + 10_000
    np.testing.assert_allclose(run(data, x)[0], jax.jit(layers)(qj.decode(LARGE), x), atol=1e-5)


def test_what_apply_does_not_use_stays_out(onnx):
    leaves = {"w": np.ones((2, 2), np.float32), "rest": np.arange(9000.0)}
    data = export_onnx(lambda tree, x: x @ tree["w"], leaves, np.ones((1, 2), np.float32))
    names = {tensor.name for tensor in onnx.load_from_string(data).graph.initializer}
    assert "w" in names
    assert "rest" not in names


def test_bad_arguments(onnx):
    with pytest.raises(ValueError, match="w: not all of its values are finite"):
        export_onnx(lambda tree, x: x, {"w": jnp.full(2, jnp.nan)}, np.ones((1, 2)))
    with pytest.raises(ValueError, match="batch must be a whole number"):
        export_onnx(lambda tree, x: x, {}, np.ones((1, 2)), batch=0)


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ImportError, match=r'pip install "quantjax\[onnx\]"'):
        export_onnx(lambda tree, x: x, {}, np.ones((1, 2)))
