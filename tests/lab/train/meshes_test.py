"""Training on meshes of simulated devices, beside one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import quantjax as qj
from quantjax.lab.train import engine, evaluation, meshes, session
from tests.lab.train import toy_task

pytestmark = pytest.mark.usefixtures("quick_programs")


def alq():
    phases = [qj.Phase(kind, 7, 0.01) for kind in ("basis", "coordinate", "prune")]
    parts = {"alq": qj.alq(qj.multi_bit(2, axes=-2), phases), "rest": optax.sgd(0.1)}
    labels = {"kernel": "alq", "bias": "rest", "scale": "rest"}
    return optax.partition(
        parts, lambda params: {k: {n: labels[n] for n in v} for k, v in params.items()}
    )


# SGD: Adam divides what is zero but for rounding by its own size.
METHODS = {
    "float": lambda: engine.Method(optax.sgd(0.1, momentum=0.9)),
    "psg": lambda: engine.Method(qj.psg(0.01, qj.uniform(4, momentum=0.1), strength=10.0)),
    "uniform": lambda: engine.Method(optax.sgd(0.1), qj.uniform(4, axes="channel")),
    "lsq": lambda: engine.Method(optax.sgd(0.1), qj.lsq(3)),
    "srq": lambda: engine.Method(optax.sgd(0.1), qj.srq(3)),
    "dropbits": lambda: engine.Method(
        optax.sgd(0.1), qj.srq(3, dropbits=True, learn_bits=True, freeze_after=10)
    ),
    "multi-bit": lambda: engine.Method(optax.sgd(0.1), qj.multi_bit(2, axes=-2)),
    "focused": lambda: engine.Method(
        optax.sgd(0.1), qj.chain(qj.surgery(0.5, end=6), qj.focused(4, refit_every=3))
    ),
    "alq": lambda: engine.Method(alq()),
}
WITH_INPUTS = {
    "uniform W4A4": lambda: engine.Method(optax.sgd(0.1), qj.uniform(4), qj.uniform_input(4)),
    "lsq W4A4": lambda: engine.Method(optax.sgd(0.1), qj.lsq(4), qj.lsq_input(4)),
    "srq W4A4": lambda: engine.Method(optax.sgd(0.1), qj.srq(4), qj.srq_input(4)),
}
SLOW = pytest.mark.slow
MESHES = [
    ("data=8", AxisType.Auto),
    pytest.param("data=4,model=2", AxisType.Auto, marks=SLOW),
    pytest.param("data=8", AxisType.Explicit, marks=SLOW),
    ("data=4,model=2", AxisType.Explicit),
]
BASES = {}


def on(mesh, kind=AxisType.Auto):
    return session.use(session.Session(mesh=None if mesh is None else meshes.make(mesh, kind)))


def trained(make, total, task):
    """The losses of every step, the state after the first and the last, and the accuracy."""
    method = make()
    state = engine.init_state(task, toy_task.start(task), method, seed=0)
    steps = engine.make_steps(task, method)
    losses, first = [], None
    for report in engine.train(task, steps, state, total, batch_size=16, seed=0, every=1):
        first = jax.device_get(report.state.params) if first is None else first
        losses.append(report.loss)
    evaluate = evaluation.make_evaluate(task, method.input_quantizer)
    score = evaluate(report.state.variables, task.dataset.test)
    return np.array(losses), first, report.state, score


def base(name, make, total, task):
    if name not in BASES:
        BASES[name] = trained(make, total, task)
    return BASES[name]


@pytest.mark.parametrize(("mesh", "kind"), MESHES)
@pytest.mark.parametrize("name", METHODS)
def test_a_mesh_gives_the_losses_of_one_device(name, mesh, kind):
    task = toy_task.make(batch_norm=True)
    losses, _, state, score = base(name, METHODS[name], 20, task)
    before = len(toy_task.TRACES)
    with on(mesh, kind):
        found, _, placed, on_mesh = trained(METHODS[name], 20, task)
    np.testing.assert_allclose(found, losses, atol=1e-5)
    assert on_mesh.loss == pytest.approx(score.loss, abs=1e-4)
    assert on_mesh.accuracy == score.accuracy
    assert len(toy_task.TRACES) == before + 2  # one step and one evaluation: nothing twice
    spec = placed.params["Dense_0"]["kernel"].sharding.spec
    assert ("model" in spec) == ("model" in mesh)
    assert jax.tree.structure(placed) == jax.tree.structure(state)


@pytest.mark.parametrize(("mesh", "kind"), MESHES)
@pytest.mark.parametrize("name", WITH_INPUTS)
def test_quantized_inputs_on_a_mesh(name, mesh, kind):
    """Their ranges are of the whole batch: the first step is the same, the accuracy as good."""
    task = toy_task.make(test=400)
    losses, first, _, score = base(name, WITH_INPUTS[name], 20, task)
    with on(mesh, kind):
        found, params, _, on_mesh = trained(WITH_INPUTS[name], 20, task)
    assert found[0] == pytest.approx(losses[0], abs=1e-5)
    # SGD's first step is the gradient.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, first)
    assert abs(on_mesh.accuracy - score.accuracy) <= 0.5


def test_weights_in_parts_are_never_gathered():
    task = toy_task.make()
    for name, make in {**METHODS, **WITH_INPUTS}.items():
        if name in ("alq", "multi-bit"):  # their views have shapes of their own: copies
            continue
        method = make()
        with on("data=4,model=2"):
            state = engine.init_state(task, toy_task.start(task), method, seed=0)
            steps = engine.make_steps(task, method)
            batch = meshes.Feed(task.dataset.train, session.current().mesh).batch(np.arange(16))
            text = steps.one.lower(state, *batch).compile().as_text()
        assert state.params["Dense_0"]["kernel"].sharding.spec == PartitionSpec(None, "model")
        gathered = re.findall(r"= \(?(\w+\[[\d,]*\]).{0,40} all-gather", text)
        assert "f32[16,8]" not in gathered, name


def test_states_lie_as_their_params():
    params = {"Dense_0": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)},
              "Block_0": {"Dense_0": {"kernel": jnp.ones((6, 5))}}}  # fmt: skip
    mesh = meshes.make("data=4,model=2")
    tree = {
        "params": params,
        "mu": params,
        "buffers": {"Dense_0/kernel": {"step": jnp.ones((1, 4)), "all": jnp.ones((1, 1)),
                                       "codes": jnp.ones((6, 4), jnp.int8), "count": jnp.ones(())}},
        "step": jnp.ones(()),
    }  # fmt: skip
    found = jax.tree.map(lambda leaf: leaf.spec, meshes.shardings(tree, params, mesh))
    parts, copies = PartitionSpec(None, "model"), PartitionSpec()
    assert found["params"] == found["mu"]
    assert found["params"]["Dense_0"] == {"kernel": parts, "bias": copies}
    assert found["params"]["Block_0"]["Dense_0"]["kernel"] == copies  # 5 columns
    mine = found["buffers"]["Dense_0/kernel"]
    assert mine == {"step": parts, "all": copies, "codes": parts, "count": copies}
    rows = meshes.shardings(tree, params, mesh, {"Dense_0/kernel": {-2: "model"}})
    assert rows["params"]["Dense_0"]["kernel"].spec == PartitionSpec("model")
    assert rows["buffers"]["Dense_0/kernel"]["step"].spec == copies


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data=16", "needs 16 devices, found 8"),
        ("data=4,model=4", "needs 16 devices"),
        ("batch=8", r"the axes data and model, got \['batch'\]"),
        ("data", "is written as data=8"),
        ("data=0", "is written as data=8"),
        ("data=-2", "is written as"),
        ("data=2,data=4", "is written as"),
        ("", "is written as"),
    ],
)
def test_meshes_that_do_not_exist(text, told):
    with pytest.raises(ValueError, match=told):
        meshes.make(text)


def test_batches_and_rules_that_do_not_fit():
    task = toy_task.make()
    method = METHODS["float"]()
    with on("data=8"):
        state = engine.init_state(task, toy_task.start(task), method, seed=0)
        steps = engine.make_steps(task, method)
        with pytest.raises(ValueError, match="a batch of 12 does not divide over data=8"):
            next(engine.train(task, steps, state, 2, batch_size=12, seed=0))
    mesh = meshes.make("data=8")
    with pytest.raises(
        ValueError, match=r"names the axis 'rows', the mesh has \['data', 'model'\]"
    ):
        meshes.shardings({}, {}, mesh, {".*": {-1: "rows"}})
