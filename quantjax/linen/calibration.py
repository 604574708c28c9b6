"""Fitting input quantizers to batches."""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from quantjax import inputs
from quantjax.linen import layers
from quantjax.linen.layers import BUFFERS, COLLECTIONS, LEARNED, layer_of

BAD = "not_finite"


def calibrate(apply: Callable, variables: Mapping, batches: Iterable, **kwargs) -> dict:
    """Returns `variables` with the input quantizers fitted to the first batch, updated by others.

    Args:
      apply: what `quantize_inputs` returned.
      variables: of the model; state of input quantizers that it holds is dropped.
      batches: inputs of the model, arrays or trees of arrays; a single array is one batch.
      **kwargs: further arguments of apply, such as `train=False`.

    Raises:
      ValueError: no batches, or `apply` quantizes no inputs; a batch that gives a layer NaN or
        infinity (with its path; not under jit).
    """
    layers.check_apply(apply, "apply")
    variables = without_state(variables)

    @jax.jit
    def fit(variables, batch):
        with layers.around(_note_bad):
            return _without_notes(fit_state(apply, variables, batch, kwargs))

    state = {}
    for number, batch in enumerate([batches] if hasattr(batches, "shape") else batches):
        state, bad = fit({**variables, **state}, batch)
        if not any(isinstance(count, jax.core.Tracer) for count in bad.values()):
            inputs.refuse(number, {path: int(jnp.sum(count)) for path, count in bad.items()})
    if not state:
        raise ValueError("calibrate needs at least one batch")
    return {**variables, **state}


def without_state(variables: Mapping) -> dict:
    """Returns variables without what belongs to input quantizers."""
    return {name: values for name, values in variables.items() if name not in COLLECTIONS}


def fit_state(apply, variables, x, kwargs) -> dict:
    """Returns the collections after one call in which they are mutable.

    Raises:
      ValueError: there are none.
    """
    _, state = apply(variables, x, mutable=list(COLLECTIONS), **kwargs)
    if not state:
        raise ValueError("apply quantizes no inputs: pass what quantize_inputs returned")
    return dict(state)


def _note_bad(quantize, module, path, x):
    """Notes how many values are not finite, in the layer's own state: loops refuse callbacks."""
    del path
    scope = module.scope
    for collection in (BUFFERS, LEARNED):
        if scope.is_mutable_collection(collection):
            before = scope.get_variable(collection, BAD, 0)
            scope.put_variable(collection, BAD, before + jnp.sum(~jnp.isfinite(x)))
            break
    return quantize(x)


def _without_notes(state):
    """Returns the state without what `_note_bad` wrote, and {path: how many values}."""
    kept, bad = {}, {}
    for collection, tree in state.items():
        flat = flatten_dict(dict(tree))
        notes = {layer_of(key): count for key, count in flat.items() if key[-1] == BAD}
        bad |= {path or "the model itself": count for path, count in notes.items()}
        rest = {key: value for key, value in flat.items() if key[-1] != BAD}
        kept |= {collection: unflatten_dict(rest)} if rest else {}
    return kept, bad
