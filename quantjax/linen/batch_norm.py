"""Input ranges from batch norm's parameters (PSG, evaluation)."""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from quantjax.linen.calibration import fit_state, without_state
from quantjax.linen.layers import COLLECTIONS, check_apply, layer_of
from quantjax.linen.probes import axes_of, fed_by_one_batch_norm, is_batch_norm


def calibrate_batch_norm(apply: Callable, variables: Mapping, x, n=6, **kwargs) -> dict:
    """Returns `variables` with input ranges from batch norm's parameters (PSG, evaluation).

    Args:
      apply: what `quantize_inputs` returned; not jitted, but this function may be.
      variables: of the model; layers keep the state that it holds except as said below. Without
        any, all layers are fitted to x first.
      x: a batch of at least two examples.
      n: how many standard deviations the ranges cover; positive.
      **kwargs: further arguments of apply, such as `train=False`.

    In a fitting pass every nn.BatchNorm gives, instead of its output, constants per channel that
    walk along the batch from shift - n * |scale| to shift + n * |scale|. A layer whose input is
    made of one batch norm's output alone (through activations and pooling) is fitted anew to what
    arrives there: [0, max over channels of shift + n * |scale|] after a ReLU, and the low side as
    well after anything else. All other layers keep the range of calibration: an input that is a
    sum of branches, mixes channels, comes from another layer without batch norm between, or is x
    itself. What an input is made of is found by probes, see `fed_by_one_batch_norm`.

    Raises:
      ValueError: n is not positive, x has a single example, `apply` quantizes no inputs, or no
        layer's input comes from a batch norm alone.
    """
    check_apply(apply, "apply")
    if not isinstance(n, jax.core.Tracer) and not n > 0:
        raise ValueError(f"n must be positive, got {n!r}")
    return {**variables, **_batch_norm_fit(apply, variables, x, kwargs)(variables, x, n)}


def search_batch_norm_range(
    apply: Callable,
    variables: Mapping,
    x,
    score: Callable,
    candidates: Iterable[float] = (2, 3, 4, 5, 6, 8, 10, 12),
    **kwargs,
) -> tuple[dict, float]:
    """Returns `calibrate_batch_norm`'s variables for the best n, and that n.

    Args:
      score: score(variables) -> float, higher is better; measured on training data. NaN is worst.
      candidates: the values of n to try; of equals the first wins.

    The other arguments are those of `calibrate_batch_norm`, compiled once for all candidates.

    Raises:
      ValueError: no candidates, and as `calibrate_batch_norm`.
    """
    check_apply(apply, "apply")
    fit = _batch_norm_fit(apply, variables, x, kwargs)
    best = None
    for n in candidates:
        if not n > 0:
            raise ValueError(f"n must be positive, got {n!r}")
        fitted = {**variables, **fit(variables, x, float(n))}
        value = float(score(fitted))
        value = -np.inf if np.isnan(value) else value
        if best is None or value > best[0]:
            best = value, fitted, n
    if best is None:
        raise ValueError("search_batch_norm_range needs at least one candidate")
    return best[1:]


def _batch_norm_fit(apply, variables, x, kwargs):
    """Returns the compiled fit(variables, x, n) -> the state of the layers.

    Raises:
      ValueError: `apply` quantizes no inputs, or none comes from a batch norm alone.
    """
    alone = fed_by_one_batch_norm(apply, without_state(variables), x, kwargs)
    if not alone:
        raise ValueError(
            "no layer's input comes from one batch norm alone: there is nothing to fit to"
        )

    @jax.jit
    def fit(variables, x, n):
        params = without_state(variables)
        seen = {name: variables[name] for name in COLLECTIONS if name in variables}
        seen = seen or fit_state(apply, variables, x, kwargs)
        with nn.intercept_methods(_replace_batch_norms(n)):
            fresh = fit_state(apply, params, x, kwargs)

        def merge(seen, fresh):
            fresh = flatten_dict(fresh)
            return unflatten_dict(
                {
                    key: fresh[key] if layer_of(key) in alone else value
                    for key, value in flatten_dict(seen).items()
                }
            )

        return {name: merge(seen[name], fresh[name]) for name in seen}

    return fit


def _replace_batch_norms(n):
    """An interceptor: batch norms give shift + t * |scale|, t from -n to n along the batch."""

    def intercept(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        if not is_batch_norm(context):
            return y
        module = context.module
        axes, batch = axes_of(module, y)
        if y.shape[batch] < 2:
            raise ValueError(
                f"{'/'.join(module.path)}: the batch norm ranges need at least two examples"
            )

        def param(name, used, default):
            if not used:
                return jnp.full([1] * y.ndim, default, jnp.float32)
            value = nn.meta.unbox(module.scope.get_variable("params", name))
            shape = [size if axis in axes else 1 for axis, size in enumerate(y.shape)]
            return value.astype(jnp.float32).reshape(shape)

        t = n * jnp.linspace(-1, 1, y.shape[batch])
        t = t.reshape([-1 if axis == batch else 1 for axis in range(y.ndim)])
        scale, shift = param("scale", module.use_scale, 1), param("bias", module.use_bias, 0)
        return jnp.broadcast_to(shift + t * jnp.abs(scale), y.shape).astype(y.dtype)

    return intercept
