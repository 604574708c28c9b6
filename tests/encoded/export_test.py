"""Networks as StableHLO: the same logits with jax alone, and no more bytes than packed weights."""

import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.core import qarray
from quantjax.encoded.export import KNOWN

FLOAT32 = np.dtype("float32")

ALONE = """
import sys
import numpy as np
import jax

for name in sys.argv[1:]:
    with open(name + ".stablehlo", "rb") as file:
        program = jax.export.deserialize(bytearray(file.read()))
    given = np.load(name + ".npz")
    for rows in (len(given["x"]), 1):
        found = program.call(given["x"][:rows])
        assert found.shape == given["logits"][:rows].shape
        print(name, np.abs(found - given["logits"][:rows]).max(), found.std())
assert not {"quantjax", "flax", "optax", "safetensors"} & set(sys.modules)
"""


def grid(bits, levels=None, shape=(8, 6), step=(1, 1), dtype="float32"):
    rng = np.random.default_rng(bits)
    levels = 2**bits if levels is None else levels
    codes = (rng.integers(0, levels, shape) - levels // 2).astype(qarray.code_dtype(bits))
    step = rng.uniform(0.5, 2, step).astype(np.float32)
    return qj.Grid(codes, step, bits, jnp.dtype(dtype), levels)


def table(bits, shape=(8, 6), group=(1, 1)):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, shape).astype(qarray.code_dtype(bits, signed=False))
    return qj.Table(codes, rng.normal(size=(*group, 2**bits)).astype(np.float32), bits, FLOAT32)


def bases(keep, view=(8, 6), group=(1, 6), slots=3, blocks=1):
    rng = np.random.default_rng(slots)
    mask = rng.random((*group, slots)) < keep
    coords = np.where(mask, rng.uniform(0, 1, mask.shape), 0).astype(np.float32)
    basis = rng.choice([-1, 1], (*view, slots)).astype(np.int8)
    return qj.MultiBit(basis, coords, mask, FLOAT32, blocks, -2 if blocks > 1 else -1)


LEAVES = {
    "one bit": grid(1),
    "ternary": grid(2, 3, shape=(7, 3), step=(7, 1)),
    "2 bits": grid(2, step=(1, 6)),
    "3 bits": grid(3),
    "narrow 4 bits": grid(4, 15, step=(8, 6)),
    "11 bits": grid(11, dtype="bfloat16"),
    "table": table(3),
    "tables": table(4, group=(8, 1)),
    "table of 9 bits": table(9),
    "bases": bases(1.0),
    "pruned bases": bases(0.5, group=(8, 1)),
    "bases in blocks": bases(0.5, view=(2, 4, 6), group=(2, 1, 6), blocks=2),
    "no bases": bases(0.0),
    "plain": np.arange(6.0, dtype=np.float32),
    "half": jnp.ones((2, 2), jnp.bfloat16),
    "count": np.int32(3),
}


def run(data, *args):
    return jax.export.deserialize(bytearray(data)).call(*args)


@pytest.fixture(scope="module")
def leaves_program():
    return qj.export(lambda tree, x: (tree, 2 * x), LEAVES, np.ones((4, 2), np.float32))


def test_every_kind_of_leaf_bit_for_bit(leaves_program):
    found, x = run(leaves_program, np.ones((5, 2), np.float32))
    expected = qj.decode(LEAVES)
    for name, leaf in found.items():
        assert leaf.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
    assert x.shape == (5, 2)


def test_it_says_its_platforms_and_no_paths_of_sources(leaves_program):
    assert jax.export.deserialize(bytearray(leaves_program)).platforms == ("cpu", "cuda", "tpu")
    assert b".py" not in leaves_program
    assert jax.config.jax_traceback_in_locations_limit > 0


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), strides=2)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def network(quantizer, inputs, x):
    """Apply and variables of a network with batch norm and encoded weights."""
    model = Net()
    variables = jax.jit(model.init)(jax.random.key(0), x)
    stats = variables["batch_stats"]["BatchNorm_0"]
    stats |= {"mean": stats["mean"] + 0.3, "var": stats["var"] * 1.7}
    apply = model.apply
    if inputs is not None:
        apply = qj.linen.quantize_inputs(model.apply, inputs)
        variables = qj.linen.calibrate(apply, variables, x)
    params = variables["params"]
    return apply, {**variables, "params": quantizer.encode(params, quantizer.init(params))}


def test_logits_with_jax_alone(tmp_path):
    x = np.random.default_rng(0).normal(size=(9, 8, 8, 1)).astype(np.float32)
    pairs = {
        "uniform": (qj.uniform(4), qj.srq_input(4)),
        "alq": (qj.multi_bit(2, axes={"Conv.*": (-4, -3, -2), ".*": -2}), None),
    }
    for name, (quantizer, inputs) in pairs.items():
        apply, variables = network(quantizer, inputs, x)
        (tmp_path / f"{name}.stablehlo").write_bytes(qj.export(apply, variables, x))
        logits = jax.jit(apply)(qj.decode(variables), x)
        np.savez(tmp_path / f"{name}.npz", x=x, logits=logits)
    alone = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, *pairs],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    lines = alone.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        _, difference, deviation = line.split()
        assert float(difference) <= 1e-5
        assert float(deviation) > 0.01


SHAPE = (512, 512)
LARGE = {
    "ternary": grid(2, 3, SHAPE),
    "3 bits": grid(3, shape=SHAPE, step=(1, 512)),
    "table": table(4, SHAPE),
    "bases": bases(0.3, (16, 32, 512), (16, 1, 512), slots=4, blocks=16),
}


def layers(tree, x):
    for leaf in tree.values():
        x = jnp.tanh(x @ leaf / 64)
    return x


def test_packed_weights_once_and_never_as_floats():
    x = jax.ShapeDtypeStruct((1, 512), np.float32)
    data = qj.export(layers, LARGE, x)
    packed = sum(leaf.nbits for leaf in LARGE.values()) // 8
    assert packed < len(data) < packed + 15_000  # the bar is 10% and 200,000 more
    assert len(data) - len(qj.export(layers, LARGE, x, platforms=("cpu",))) < 3_000
    # Compiled, the bytes are still bytes: XLA has not folded their decoding.
    program = jax.jit(jax.export.deserialize(bytearray(data)).call).lower(x).compile()
    constants = re.findall(r"= (\w+)\[([\d,]*)\]\S* constant\(", program.as_text())
    sizes = [(kind, np.prod([int(n) for n in dims.split(",") if n])) for kind, dims in constants]
    assert max(size for kind, size in sizes if kind != "u8") <= LARGE["bases"].coords.size
    assert sum(size for kind, size in sizes if kind == "u8") < packed


def test_what_apply_does_not_use_stays_out():
    example = np.ones((1, 2), np.float32)
    used = {"w": np.ones((2, 2), np.float32)}
    rest = {"grid": grid(4, shape=SHAPE), "plain": np.arange(9000)}

    def apply(tree, x):
        jnp.sum(jnp.exp(tree["plain"]))
        return x @ tree["w"]

    data = qj.export(apply, used | rest, example)
    assert len(data) < 3_000


def test_trees_of_inputs_and_a_fixed_batch():
    def apply(tree, inputs):
        return {"sum": inputs["a"] @ tree["w"] + inputs["b"]}

    example = {"a": np.ones((3, 2), np.float32), "b": np.ones((3, 1), np.float32)}
    tree = {"w": np.ones((2, 1), np.float32)}
    assert run(qj.export(apply, tree, example), example)["sum"].shape == (3, 1)
    fixed = qj.export(apply, tree, example, batch=2, platforms=("cpu",))
    with pytest.raises(ValueError, match="3"):
        run(fixed, example)
    assert np.all(run(fixed, jax.tree.map(lambda a: a[:2], example))["sum"] == 3)


def test_networks_that_ask_for_the_number_of_rows():
    def apply(tree, x):
        return x @ tree["w"] if x.shape[0] > 2 else x

    tree, x = {"w": np.ones((2, 2), np.float32)}, np.ones((3, 2), np.float32)
    with pytest.raises(ValueError, match=r"asks how many rows .*batch=N"):
        qj.export(apply, tree, x)
    assert np.all(run(qj.export(apply, tree, x, batch=3), x) == 2)


def test_bad_arguments(monkeypatch):
    def export(tree, x=np.ones((1, 2), np.float32), **options):  # noqa: B008
        return qj.export(lambda tree, x: x, tree, x, **options)

    with pytest.raises(ValueError, match=r"platform must be one of .*'rocm'.*, got 'gpu'"):
        export({}, platforms=("cpu", "gpu"))
    with pytest.raises(ValueError, match=f"known are {', '.join(KNOWN)}"):
        export({}, platforms=())
    with pytest.raises(ValueError, match="batch must be a whole number from 1 on, got 0"):
        export({}, batch=0)
    with pytest.raises(ValueError, match=r"the input is a scalar: inputs have the batch"):
        export({}, np.float32(1))
    with pytest.raises(ValueError, match=r"\['b'\] is a scalar"):
        export({}, {"a": np.ones(2), "b": 1.0})
    with pytest.raises(ValueError, match="params/w: not all of its values are finite"):
        export({"params": {"w": np.array([np.nan], np.float32)}})
    broken = qj.Grid(np.full((1, 1), 9, np.int8), np.ones((1, 1), np.float32), 4, FLOAT32)
    with pytest.raises(ValueError, match=r"params/w: codes leave -8\.\.7"):
        export({"params": {"w": broken}})
    with pytest.raises(ValueError, match="rate: a float cannot be stored"):
        export({"rate": 0.1})
    monkeypatch.setattr("quantjax.encoded.export.LARGEST", 100)
    with pytest.raises(ValueError, match="ends at 2 GiB"):
        qj.export(lambda tree, x: x * tree["w"], {"w": np.ones((1, 26))}, np.ones((1, 1)))
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ImportError, match=r'pip install "quantjax\[export\]"'):
        export({})
