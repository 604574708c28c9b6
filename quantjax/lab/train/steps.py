"""The compiled training step: one for every method, on one device or on a mesh."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType

from quantjax.lab.train import guards, meshes
from quantjax.lab.train import session as session_lib
from quantjax.lab.train.states import Method, TrainState, model_apply, parts_of, trainable_of
from quantjax.lab.train.tasks import Task


class Steps(NamedTuple):
    """Compiled training steps; both donate their state.

    Where indices are None, the arrays are the batches themselves.
    """

    one: Callable  # (state, (x, y), indices [batch]) -> (state, loss: NaN where it was refused)
    many: Callable  # the same over indices [steps, batch], in one `lax.scan`; losses [steps]
    explain: Callable  # (state, (x, y), indices) -> {"the output": ..., ...} of the next step


def make_steps(task: Task, method: Method) -> Steps:
    """Returns the jitted steps of a method, by the session's mesh, precision and `on_nan`.

    A step whose loss or weights are not finite changes nothing; with "stop" those after it neither.
    The states of another member of the same family, such as the same quantizer at another width,
    fit too and compile nothing.
    """
    session = session_lib.current()
    apply = model_apply(task.model, method.input_quantizer)
    quantizer = method.quantizer

    def loss_fn(trainable, state: TrainState, x, y, key, watched=()):
        params, learned, quant = parts_of(trainable, state)
        current = state.state._replace(learned=learned)
        weights = params if quantizer is None else quantizer.apply(params, current, key=key)
        variables = state._replace(params=weights, quant=quant).variables
        outputs, moved = apply(
            variables,
            task.inputs(x),
            train=True,
            mutable=["batch_stats", "quant_stats", *watched],
            rngs={"quant": jax.random.fold_in(key, 1), "dropout": jax.random.fold_in(key, 2)},
            **({"capture_intermediates": True} if watched else {}),
        )
        losses, hits = task.measure(outputs, y)
        loss, penalty = jnp.mean(losses), 0.0
        if quantizer is not None:
            penalty = quantizer.penalty(current, key=key)
        return loss + penalty, (loss, jnp.mean(hits.astype(jnp.float32)), moved)

    def drawn(state, arrays, indices):
        """Returns the key of the step and its batch."""
        key = jax.random.fold_in(state.key, state.step)
        x, y = arrays if indices is None else (part[indices] for part in arrays)
        if task.augment is not None:
            x, y = task.augment(jax.random.fold_in(key, 3), x, y)
        return key, x, y

    def next_state(state: TrainState, grads, moved, key):
        trainable = trainable_of(state.params, state.state.learned, state.quant)
        updates, opt_state = method.optimizer.update(grads, state.opt_state, trainable)
        params, learned, quant = parts_of(optax.apply_updates(trainable, updates), state)
        quant_state = state.state._replace(learned=learned)
        if quantizer is not None:
            quant_state = quantizer.update(params, quant_state, key=key)
        return state._replace(
            step=state.step + 1,
            params=params,
            state=quant_state,
            quant=quant,
            quant_stats=moved.get("quant_stats", state.quant_stats),
            batch_stats=moved.get("batch_stats", state.batch_stats),
            opt_state=opt_state,
        )

    def one(state: TrainState, arrays, indices):
        key, x, y = drawn(state, arrays, indices)
        trainable = trainable_of(state.params, state.state.learned, state.quant)
        grads, (loss, hits, moved) = jax.grad(loss_fn, has_aux=True)(trainable, state, x, y, key)
        new = next_state(state, grads, moved, key)
        good = guards.all_finite(loss, (new.params, new.state.learned, new.quant))
        totals = state.totals
        if session.on_nan == "stop":
            good &= ~totals["stopped"]
        added = {"loss": loss, "accuracy": 100 * hits, "batches": 1.0, "skipped": 0.0}
        skipped = {"loss": 0.0, "accuracy": 0.0, "batches": 0.0, "skipped": 1.0}
        new = guards.where(good, new, state)
        if session.on_nan == "skip":
            new = new._replace(step=state.step + 1)
        totals = {
            name: totals[name] + jnp.where(good, added[name], skipped[name]) for name in added
        } | {"stopped": totals["stopped"] | ~good & (session.on_nan == "stop")}
        return new._replace(totals=totals), jnp.where(good, loss, jnp.nan)

    def on_mesh(state, arrays, indices):
        """The same, with a state that lies as it did."""
        if session.mesh is None:
            return one(state, arrays, indices)
        where = meshes.shardings(state, state.params, session.mesh, session.rules)
        if AxisType.Explicit in session.mesh.axis_types:
            everywhere = jax.sharding.NamedSharding(session.mesh, jax.sharding.PartitionSpec())
            run = jax.sharding.auto_axes(one, out_sharding=(where, everywhere))
            return run(state, arrays, indices)
        state, loss = one(state, arrays, indices)
        return jax.lax.with_sharding_constraint(state, where), loss

    def many(state, arrays, indices):
        def body(state, now):
            rows, now = (now, None) if indices is None else (arrays, now)
            return on_mesh(state, rows, now)

        return jax.lax.scan(body, state, arrays if indices is None else indices)

    layers = []  # names, in the order of the computation, which a dict out of jit has lost

    @jax.jit
    def numbers(state: TrainState, arrays, indices):
        key, x, y = drawn(state, arrays, indices)
        trainable = trainable_of(state.params, state.state.learned, state.quant)
        loss, (_, _, moved) = loss_fn(trainable, state, x, y, key, ("intermediates",))
        layers[:], outputs = guards.in_order(moved.pop("intermediates", {}))
        grads, (_, _, moved) = jax.grad(loss_fn, has_aux=True)(trainable, state, x, y, key)
        return outputs, loss, grads, next_state(state, grads, moved, key).variables

    def explain(state, arrays, indices):
        outputs, loss, grads, new = numbers(state, arrays, indices)
        return {
            "the output": list(zip(layers, outputs, strict=True)),
            "the loss": loss,
            "the gradient": grads,
            "the next value": new,
        }

    return Steps(jax.jit(on_mesh, donate_argnums=0), jax.jit(many, donate_argnums=0), explain)


def shared_steps(compiled: dict, name: str, task: Task, method: Method) -> Steps:
    """Returns the steps kept as `name`, made at its first use; methods differ in states alone."""
    if name not in compiled:
        compiled[name] = make_steps(task, method)
    return compiled[name]
