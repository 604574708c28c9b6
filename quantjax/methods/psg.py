"""Position-based scaled gradients: training that pulls weights to where they will be quantized.

PSG descends in a warped space x -> f(x) whose metric grows towards the targets. In the original
space that is plain descent with every gradient multiplied by s(x) = |x - target| + eps: weights
at a target hardly move, those between two targets do. Two networks come out of one training: the
weights as they are, and the weights at their targets.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from quantjax.core import checks, paths, rounding
from quantjax.core.quantizer import Quantizer, QuantState, owned_paths


def warp(x, target, step, eps):
    """Returns f(x) = 2 sign(x - t) (sqrt(|x - t| + eps) - sqrt(eps)) + c(t), eq. A1.

    The offset c(t) = 4 t / step (sqrt(step / 2 + eps) - sqrt(eps)) of eq. A5 makes f continuous
    across the borders between the cells of a grid with this step; it holds for targets on it.

    Args:
      x, target, step: arrays that broadcast; target is x's nearest multiple of step.
      eps: positive.
    """
    root = jnp.sqrt(eps)
    offset = 4 * target / step * (jnp.sqrt(0.5 * step + eps) - root)
    return 2 * jnp.sign(x - target) * (jnp.sqrt(jnp.abs(x - target) + eps) - root) + offset


def position_scale(x, target, *, strength=1.0, eps=1e-8, directional: bool = False):
    """Returns the factor of the gradient, strength * s(x), of x's shape.

    Args:
      x, target: arrays of one shape.
      strength: the paper's lambda_s.
      eps: added to distances; 0 is allowed.
      directional: s = (|x - t| + eps) / (max|x - t| + eps), eq. A8, in (0, 1]; with every weight
        at its target it is 1. Otherwise s = |x - t| + eps, eq. 6 of the paper.
    """
    distance = jnp.abs(x - target) + eps
    if directional:
        largest = jnp.max(distance, initial=0)
        distance = jnp.where(largest > 0, distance / jnp.where(largest > 0, largest, 1), 1)
    return strength * distance


class ScaleByPositionState(NamedTuple):
    """State of `scale_by_position`."""

    target: QuantState  # the target quantizer's own; one scalar where there are no params
    count: jax.Array  # scalar, int32: steps done


def scale_by_position(
    quantizer: Quantizer, *, strength, eps=1e-8, directional: bool = False
) -> optax.GradientTransformation:
    """Multiplies every gradient by the distance of its weight to its target (eq. 6, A8, A9).

    Belongs before weight decay and momentum, or before Adam's moments. The target of a weight is
    its value in `quantizer.apply`; leaves that the quantizer does not own pass unchanged. Each
    step first updates the target on the params it is given.

    Args:
      quantizer: any; `uniform(bits)` for low-bit weights, `zero()` for sparse ones.
      strength: lambda_s: a number, a schedule (step -> number), or {pattern: either} with the
        patterns of `partition`, which must match every owned leaf.
      eps: added to distances.
      directional: eq. A8, the maximum taken per leaf.

    Raises:
      ValueError: strength or eps negative or not finite; at `init`, a pattern of strength that
        matches no owned leaf, or an owned leaf without a strength; in `update`, params missing,
        or weights that the target's state does not know.
    """
    checks.quantizer(quantizer)
    strengths = dict(strength) if isinstance(strength, Mapping) else {".*": strength}
    paths.check_patterns(strengths)
    for pattern, value in strengths.items():
        _check_not_negative(f"strength of {pattern!r}" if len(strengths) > 1 else "strength", value)
    _check_not_negative("eps", eps)

    def init(params):
        if not jax.tree.leaves(params):  # optax.tree.map_params asks for the layout alone
            return ScaleByPositionState(jnp.zeros(()), jnp.zeros((), jnp.int32))
        state = quantizer.init(params)
        mine = owned_paths(state)
        taken = paths.assign(strengths, mine)
        left = set(mine).difference(*taken.values())
        if left:
            raise ValueError(f"no strength for {sorted(left)} among patterns {list(strengths)}")
        return ScaleByPositionState(state, jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("scale_by_position needs params: call update(grads, state, params)")
        grads, rebuild = paths.flatten(updates)
        weights, rebuild_params = paths.flatten(params)
        mine = owned_paths(state.target)
        grads_of = paths.restrict(grads, mine)
        # Distances before any cast: a bfloat16 target is no target.
        wide = {
            path: leaf.astype(rounding.work_dtype(leaf.dtype))
            for path, leaf in paths.restrict(weights, mine).items()
        }
        # The whole tree: the target says which weights its state does not know.
        whole = rebuild_params({**weights, **wide})
        target = quantizer.update(whole, state.target)
        goal, _ = paths.flatten(quantizer.apply(whole, target))
        values = {
            pattern: value(state.count) if callable(value) else value
            for pattern, value in strengths.items()
        }
        scaled = {}
        for path, grad in grads_of.items():
            value = values[paths.first_match(strengths, path)]
            scale = position_scale(
                wide[path], goal[path], strength=value, eps=eps, directional=directional
            )
            scaled[path] = (grad * scale).astype(grad.dtype)
        count = optax.safe_increment(state.count)
        return rebuild({**grads, **scaled}), ScaleByPositionState(target, count)

    return optax.GradientTransformation(init, update)


def psg(
    learning_rate,
    quantizer: Quantizer,
    *,
    strength,
    momentum: float = 0.9,
    weight_decay=1e-4,
    eps=1e-8,
    directional: bool = False,
    mask=None,
) -> optax.GradientTransformation:
    """The paper's chain: position scaling, then weight decay, then SGD with momentum.

    Args:
      learning_rate: a number or a schedule.
      quantizer, strength, eps, directional: as in `scale_by_position`.
      momentum, weight_decay: appendix C; no weight decay at 2 bits.
      mask: which leaves decay, as in `optax.add_decayed_weights`; None: all, as in the paper.
    """
    return optax.chain(
        scale_by_position(quantizer, strength=strength, eps=eps, directional=directional),
        optax.add_decayed_weights(weight_decay, mask),
        optax.sgd(learning_rate, momentum=momentum),
    )


def _check_not_negative(name, value):
    checks.number(name, value, "finite and not negative", lambda v: np.isfinite(v) & (v >= 0))
