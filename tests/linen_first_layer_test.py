"""Gradients of learned input grids where the input has none: those of the plain way, at less."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend import core
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import quantjax as qj
from quantjax import linen as qnn
from quantjax.methods.srq.relaxed import rq_input
from tests.linen_toys import BOTH, Scanned, data, init

pytestmark = pytest.mark.usefixtures("quick_compilation")

IMAGES = (4, 6, 6, 3)
LEARNED = {
    "lsq": qj.lsq_input(3),
    "srq": qj.srq_input(3),
    "srq mode": qj.srq_input(3, estimator="mode"),
    "pact": qj.pact_input(3, decay=0.1),
}
OTHERS = {
    "uniform": qj.uniform_input(3),
    "dorefa": qj.dorefa_input(3),
    "multi-bit": qj.multi_bit_input(2),
    "rq": rq_input(3),
}
LAYERS = {
    "Conv": nn.Conv(5, (3, 3)),
    "strided Conv": nn.Conv(6, (3, 3), strides=2, feature_group_count=3, padding="VALID"),
    "circular Conv": nn.Conv(5, (3, 3), padding="CIRCULAR", use_bias=False),
    "ConvTranspose": nn.ConvTranspose(5, (3, 3), strides=(2, 2)),
    "Dense": nn.Dense(5),
    "DenseGeneral": nn.DenseGeneral((2, 3), axis=(-2, -1)),
}
CASES = [(name, "Conv") for name in (*LEARNED, *OTHERS)]
CASES += [("lsq", layer) for layer in LAYERS if layer != "Conv"]
CASES += [pytest.param("srq", layer, marks=pytest.mark.slow) for layer in LAYERS if layer != "Conv"]


class Net(nn.Module):
    """Two layers, the first with images for its input."""

    first: nn.Module = LAYERS["Conv"]

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(self.first(x))
        return nn.Dense(2, name="last")(x)


def prepared(quantizer, model, x):
    """Returns variables, and apply as it is and without `scalars`: the plain way."""
    plain = {".*": quantizer._replace(scalars=None)}
    ways = [qnn.quantize_inputs(model.apply, q) for q in (quantizer, plain)]
    return qnn.calibrate(ways[0], init(model, x), x), *ways


def loss_of(apply, rest=None):
    """Returns the loss of (variables that are trained, x), and what it changes."""

    def loss(trained, x):
        y, moved = apply({**(rest or {}), **trained}, x, mutable=["quant_stats"])
        return jnp.sum(jnp.sin(y)), moved

    return loss


def split(variables):
    """Returns what is trained, and the rest."""
    trained = {name: variables[name] for name in ("params", "quant") if name in variables}
    return trained, {name: part for name, part in variables.items() if name not in trained}


def agree(found, expected, rtol=1e-5):
    """Leaves agree beside the largest number of each."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)

    def check(a, b):
        largest = float(jnp.max(jnp.abs(b), initial=0))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * largest)

    jax.tree.map(check, found, expected)


def convolutions(fn, *args, shape):
    """Returns how many convolutions of a program give arrays of these sizes, in any order."""

    def count(jaxpr):
        found = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "conv_general_dilated":
                found += sorted(equation.outvars[0].aval.shape) == sorted(shape)
            found += sum(map(count, core.jaxprs_in_params(equation.params)))
        return found

    return count(jax.make_jaxpr(fn)(*args).jaxpr)


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_gradients_are_those_of_the_plain_way(name, layer):
    x, quantizer = data(*IMAGES), {**LEARNED, **OTHERS}[name]
    variables, *ways = prepared(quantizer, Net(LAYERS[layer]), x)
    trained, rest = split(variables)
    other = data(*IMAGES, seed=1)

    def run(apply, *args):
        return jax.jit(jax.value_and_grad(loss_of(apply, args[0]), has_aux=True))(*args[1:])

    (out, grads), (expected, plain) = (run(apply, rest, trained, other) for apply in ways)
    agree(out, expected, 0)
    agree(grads, plain, 1e-4)  # sums whose terms cancel: rounding errors of both ways
    if name in LEARNED:
        assert all(jnp.all(leaf != 0) for leaf in jax.tree.leaves(grads["quant"]))
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (rest, trained, other))
            agree(*(run(apply, *wide)[1] for apply in ways), 1e-10)


def test_the_image_has_no_gradient_of_its_own():
    x = data(*IMAGES)
    variables, apply, plain = prepared(LEARNED["srq"], Net(), x)
    trained, rest = split(variables)

    def by(way, argnums):
        return jax.jit(jax.grad(loss_of(way, rest), argnums, has_aux=True))

    def of_images(fn):
        return convolutions(fn, trained, x, shape=IMAGES)

    assert [of_images(by(way, 0)) for way in (apply, plain)] == [0, 1]
    assert [of_images(by(way, (0, 1))) for way in (apply, plain)] == [1, 1]
    assert [convolutions(by(apply, both), trained, x, shape=(4, 6, 6, 5)) for both in (0, 1)] == [
        3,
        1,
    ]
    agree(*(by(way, (0, 1))(trained, x)[0] for way in (apply, plain)))
    agree(*(by(way, 1)(trained, x)[0] for way in (apply, plain)))


def checkpointed(loss):
    return jax.grad(jax.checkpoint(loss))


def by_vmapped(loss):
    return jax.grad(lambda v, x: jax.vmap(lambda one: loss(v, one))(x.reshape(2, 2, 6, 6, 3)).sum())


def vmapped(loss):
    grad = jax.vmap(jax.grad(loss), in_axes=(None, 0))
    return lambda v, x: grad(v, x.reshape(2, 2, 6, 6, 3))


def over_models(loss):
    grad = jax.vmap(jax.grad(loss), in_axes=(0, None))
    return lambda v, x: grad(jax.tree.map(lambda leaf: jnp.stack([leaf, 1.1 * leaf]), v), x)


def scanned(loss):
    def total(v, x):
        return jax.lax.scan(lambda sum, one: (sum + loss(v, one), None), 0.0, x[:, None])[0]

    return jax.grad(total)


def hessian(loss):
    def by_step(v, x):
        def of(quant):
            return jax.grad(loss)({**v, "quant": quant}, x)

        return jax.jvp(of, (v["quant"],), (jax.tree.map(jnp.ones_like, v["quant"]),))[1]

    return by_step


def by_data_of_gradient(loss):
    return jax.grad(lambda v, x: jnp.sum(jax.tree.leaves(jax.grad(loss)(v, x)["quant"])[0]), 1)


TRANSFORMATIONS = {
    "grad": jax.grad,
    "grad of jit": lambda loss: jax.grad(jax.jit(loss)),
    "checkpoint": checkpointed,
    "grad of vmap": by_vmapped,
    "vmap of grad": vmapped,
    "vmap over models": over_models,
    "scan": scanned,
    "hessian": hessian,
    "gradient of a gradient": by_data_of_gradient,
}
SECOND_ORDER = ("hessian", "gradient of a gradient")


# SRQ has gradients of reverse mode alone, and its loop over codes has none.
UNDER = [(each, name) for each in TRANSFORMATIONS for name in ("lsq", "srq")]
UNDER = [case for case in UNDER if case not in [(each, "srq") for each in SECOND_ORDER]]
UNDER += [pytest.param(each, "pact", marks=pytest.mark.slow) for each in TRANSFORMATIONS]


@pytest.mark.parametrize(("transformation", "name"), UNDER)
def test_under_transformations(transformation, name):
    x, jitted = data(*IMAGES), name != "pact"
    variables, *ways = prepared(LEARNED[name], Net(), x)
    trained, rest = split(variables)
    found = []
    for apply in ways:
        loss = loss_of(apply, rest)
        fn = TRANSFORMATIONS[transformation](lambda v, x, loss=loss: loss(v, x)[0])
        found.append((jax.jit(fn) if jitted else fn)(trained, x))
    agree(*found)


def test_forward_mode():
    x = data(*IMAGES)
    variables, *ways = prepared(LEARNED["lsq"], Net(), x)
    trained, rest = split(variables)
    ones = jax.tree.map(jnp.ones_like, trained)
    for tangents in ((ones, None), (ones, x)):
        found = []
        for apply in ways:
            loss = loss_of(apply, rest)
            if tangents[1] is None:
                run = jax.jvp(lambda v, loss=loss: loss(v, x)[0], (trained,), (ones,))
            else:
                run = jax.jvp(lambda *a, loss=loss: loss(*a)[0], (trained, x), tangents)
            found.append(run)
        agree(*found)


@pytest.mark.parametrize("name", LEARNED)
def test_layers_in_a_scan_and_under_remat(name):
    x = data(6, 4)

    class Rematted(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.remat(Scanned)()(x)
            return nn.remat(nn.Dense)(2)(x)

    for model in (Scanned(), Rematted(), nn.remat(Net)(nn.Dense(5))):
        variables, *ways = prepared(LEARNED[name], model, x)
        trained, rest = split(variables)
        agree(
            *(
                jax.jit(jax.value_and_grad(loss_of(apply, rest), has_aux=True))(trained, x)
                for apply in ways
            )
        )


def test_a_layer_whose_input_becomes_differentiated_in_a_loop():
    x = data(6, 4)
    variables, *ways = prepared(LEARNED["lsq"], nn.Dense(4), x)
    trained, rest = split(variables)

    def loss(v, x, apply):
        step = functools.partial(apply, {**rest, **v})
        return jnp.sum(jnp.sin(jax.lax.scan(lambda x, _: (step(x), None), x, length=3)[0]))

    agree(*(jax.jit(jax.grad(functools.partial(loss, apply=way)))(trained, x) for way in ways))


def test_other_layers_and_functions_stay_as_they_are():
    class Own(nn.Conv):
        pass

    def rounding(x, kernel, *args, **kwargs):
        return jax.lax.conv_general_dilated(jnp.round(x), kernel, *args, **kwargs)

    x = data(*IMAGES)
    masked = nn.Conv(5, (3, 3), mask=jnp.ones((3, 3, 3, 5)))
    for layer in (Own(5, (3, 3)), nn.Conv(5, (3, 3), conv_general_dilated=rounding), masked):
        variables, *ways = prepared(LEARNED["lsq"], Net(layer), x)
        trained, rest = split(variables)
        grads = [jax.grad(loss_of(apply, rest), has_aux=True) for apply in ways]
        agree(*(grad(trained, x) for grad in grads), rtol=1e-6)


def test_other_interceptors():
    """Inside of ours, one may make the output; outside, all is as it was."""
    x = data(*IMAGES)
    variables, *ways = prepared(LEARNED["lsq"], Net(), x)
    trained, rest = split(variables)

    def doubled(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        return 2 * y if context.module.path == ("first",) else y

    def under(apply_fn):
        def run(*args, **kwargs):
            with nn.intercept_methods(doubled):
                return apply_fn(*args, **kwargs)

        return run

    quantizers = LEARNED["lsq"], LEARNED["lsq"]._replace(scalars=None)
    inside = [qnn.quantize_inputs(under(Net().apply), quantizer) for quantizer in quantizers]
    outside = [under(apply) for apply in ways]
    first, *others = (
        jax.grad(loss_of(apply, rest), has_aux=True)(trained, x) for apply in (*inside, *outside)
    )
    for found in others:
        agree(found, first)


def test_boxed_kernels_and_half_precision():
    x = data(*IMAGES)
    start = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None, None, "model"))
    boxed = Net(nn.Conv(5, (3, 3), kernel_init=start))
    half = Net(nn.Conv(5, (3, 3), dtype=jnp.bfloat16))
    for model, dtype, rtol in ((boxed, x.dtype, 1e-5), (half, jnp.bfloat16, 0.05)):
        x = x.astype(dtype)
        variables, *ways = prepared(LEARNED["srq"], model, x)
        trained, rest = split(variables)
        grads = [jax.jit(jax.grad(loss_of(apply, rest), has_aux=True)) for apply in ways]
        found, expected = (grad(trained, x)[0] for grad in grads)
        agree(found, expected, rtol)
        assert convolutions(grads[0], trained, x, shape=IMAGES) == 0


def test_integer_images():
    x = jax.random.randint(jax.random.key(0), IMAGES, 0, 256).astype(jnp.uint8)
    variables, *ways = prepared(LEARNED["lsq"], Net(), x)
    trained, rest = split(variables)
    grads = [jax.jit(jax.grad(loss_of(apply, rest), has_aux=True)) for apply in ways]
    agree(*(grad(trained, x) for grad in grads))
    assert convolutions(grads[0], trained, x, shape=IMAGES) == 0


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit, None], ids=str)
def test_on_devices(kind, name):
    x = data(8, 4)
    variables, *ways = prepared(LEARNED[name], Net(nn.Dense(5)), x)
    trained, rest = split(variables)
    whole, parts = PartitionSpec(), PartitionSpec("data")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind or AxisType.Auto,))
    found = []
    for apply in ways:

        def loss(v, x, apply=apply):
            return jnp.sum(jnp.sin(apply({**rest, **v}, x)))

        expected = jax.jit(jax.grad(loss))(trained, x)
        if kind is None:

            def mapped(v, x, loss=loss):
                run = jax.shard_map(
                    lambda v, x: jax.lax.psum(loss(v, x), "data"),
                    mesh=mesh,
                    in_specs=(whole, parts),
                    out_specs=whole,
                )
                return run(v, x)

            found.append(jax.jit(jax.grad(mapped))(trained, x))
        else:
            with jax.set_mesh(mesh):
                place = NamedSharding(mesh, parts)
                everywhere = jax.device_put(trained, NamedSharding(mesh, whole))
                found.append(jax.jit(jax.grad(loss))(everywhere, jax.device_put(x, place)))
    agree(*found)
    if not (kind is None and name == "pact"):  # every device adds PACT's decay
        agree(found[0], expected)


def test_states_are_as_before_and_updated_once():
    x, calls = data(*IMAGES), []
    variables, apply, plain = prepared(LEARNED["lsq"], Net(), x)
    params = {"params": variables["params"]}
    for start, mutable in ((params, BOTH), (variables, BOTH), (variables, ["quant_stats"])):
        agree(*(way(start, 2 * x, mutable=mutable) for way in (apply, plain)), 0)

    def counted(x, state, *, key=None, update=False):
        calls.append(update)
        return LEARNED["lsq"].apply(x, state, key=key, update=update)

    apply = qnn.quantize_inputs(Net().apply, LEARNED["lsq"]._replace(apply=counted))
    trained, rest = split(variables)
    jax.grad(loss_of(apply, rest), has_aux=True)(trained, x)
    assert calls == [True, True]
