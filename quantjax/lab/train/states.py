"""What a training step moves, and how a phase begins."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from quantjax import linen
from quantjax.core.quantizer import InputQuantizer, Quantizer, QuantState
from quantjax.lab.train import meshes
from quantjax.lab.train import session as session_lib
from quantjax.lab.train.tasks import Task

FITTED_TO = 256  # training examples, by input quantizers


class Method(NamedTuple):
    """How a phase trains: what is quantized in the forward pass, and how it descends."""

    optimizer: optax.GradientTransformation
    quantizer: Quantizer | None = None  # weights; None: as they are
    input_quantizer: InputQuantizer | Mapping | None = None  # as `linen.quantize_inputs` takes it


class TrainState(NamedTuple):
    """Everything that a training step moves."""

    step: jax.Array  # scalar, int32: steps done in this phase
    key: jax.Array  # scalar key
    params: Any
    state: QuantState  # of the weights' quantizer
    quant: dict  # collection `quant`: what input quantizers learn
    quant_stats: dict  # collection `quant_stats`: their buffers
    batch_stats: dict
    opt_state: Any
    totals: dict  # since the last report: sums of loss and accuracy, batches, skipped; and stopped

    @property
    def variables(self) -> dict:
        """The collections that `model.apply` takes, with the float params."""
        collections = {
            "params": self.params,
            "batch_stats": self.batch_stats,
            "quant": self.quant,
            "quant_stats": self.quant_stats,
        }
        return {name: value for name, value in collections.items() if value}


def model_apply(model: nn.Module, input_quantizer) -> Callable:
    """Returns the model's apply, with quantized inputs where there is a quantizer."""
    model = session_lib.current().model(model)
    if input_quantizer is None:
        return model.apply
    return linen.quantize_inputs(model.apply, input_quantizer)


def copied(tree):
    """Returns a tree with buffers of its own, which no step can take."""
    return jax.tree.map(jnp.copy, tree)


def init_state(task: Task, variables: Mapping, method: Method, seed: int) -> TrainState:
    """Returns the state of a phase that starts from `variables`, which stay valid.

    Input quantizers fit themselves to the first 256 training examples. On a mesh the state lies as
    `meshes.shardings` says.
    """
    # Copies, since the step donates its state.
    variables = copied(dict(variables))
    params = variables["params"]
    key, init_key = jax.random.split(jax.random.key(seed))
    quant = {name: variables.get(name, {}) for name in ("quant", "quant_stats")}
    if method.input_quantizer is not None and not any(quant.values()):
        apply = model_apply(task.model, method.input_quantizer)
        x = task.inputs(task.dataset.train[0][:FITTED_TO])
        _, fitted = jax.jit(lambda v, x: apply(v, x, mutable=list(quant)))(variables, x)
        quant |= fitted
    if method.quantizer is None:
        state = QuantState({}, {})
    else:
        state = copied(method.quantizer.init(params, init_key))  # it may hold the params
    opt_state = method.optimizer.init(trainable_of(params, state.learned, quant["quant"]))
    return placed(
        TrainState(
            step=jnp.zeros((), jnp.int32),
            key=key,
            params=params,
            state=state,
            **quant,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=copied(opt_state),
            totals=_no_totals(),
        )
    )


def placed(state: TrainState) -> TrainState:
    """Returns a state that lies where the session's mesh and rules say."""
    session = session_lib.current()
    if session.mesh is None:
        return state
    where = meshes.shardings(state, state.params, session.mesh, session.rules)
    return meshes.place(state, where)


def beside(new, old):
    """Returns an array where another one lies; where that is nowhere in particular, so is this.

    An array that is bound to its device would have the step compiled again.
    """
    return meshes.place(new, old.sharding) if old.committed else new


def without_totals(state: TrainState) -> TrainState:
    """Returns a state whose sums begin anew, where they lay."""
    new = jax.tree.map(beside, _no_totals(), state.totals)
    return state._replace(totals=new)


def trainable_of(params, learned, quant):
    """Returns what an optimizer sees."""
    # The params alone where nothing else learns, so that the optimizer sees the params' own paths.
    return (params, learned, quant) if learned or quant else params


def parts_of(trainable, state: TrainState):
    """Returns (params, learned, quant) of what an optimizer sees."""
    if state.state.learned or state.quant:
        return trainable
    return trainable, state.state.learned, state.quant


def _no_totals() -> dict:
    sums = {name: jnp.zeros(()) for name in ("loss", "accuracy", "batches", "skipped")}
    return sums | {"stopped": jnp.zeros((), bool)}
