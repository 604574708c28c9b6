"""Training by proximal maps: an optimizer moves latent weights, a pull takes them to a grid.

The gradient is taken at the pulled weights, and moves the latent ones. Three parts multiply: any
optax optimizer, any quantizer without learned leaves, and a pull: `hard` is straight-through
training (BinaryConnect; Courbariaux et al. 2015), `binary_relax` the average of BinaryRelax (Yin et
al. 2018), `parq` the piecewise-affine map of PARQ (Jin et al. 2025).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from quantjax.core import checks, meshes, optimizer_states, paths, rounding
from quantjax.core.quantizer import Quantizer, QuantState, at, owned_paths


class ProximalState(NamedTuple):
    """State of `proximal`; scalars in place of dicts where there are no params."""

    latent: dict  # {path: [*shape]}: the weights that the optimizer moves, float32 or wider
    pulled: dict  # {path: [*shape]}: the model's, in the dtype of the params
    quant: QuantState  # of the quantizer, fitted to them
    base: optax.OptState  # of the optimizer
    count: jax.Array  # scalar, int32: steps done


def hard() -> Callable:
    """Returns the pull that puts weights on the nearest level from the first step on."""

    def pull(latent, nearest, state, count):
        del latent, state, count
        return nearest

    return pull


def binary_relax(hardness) -> Callable:
    """Returns the pull of BinaryRelax: (lambda nearest + latent) / (lambda + 1).

    Args:
      hardness: lambda / (lambda + 1) in [0, 1], a number or a schedule step -> number: 0 leaves
        weights alone, 1 puts them on the grid.

    Raises:
      ValueError: a number out of its range.
    """
    _check_hardness(hardness)

    def pull(latent, nearest, state, count):
        del state
        share = _at_step(hardness, count, latent)
        # At 1 exactly the level, which latent + (nearest - latent) may miss by rounding.
        return jnp.where(share < 1, latent + share * (nearest - latent), nearest)

    return pull


def parq(hardness) -> Callable:
    """Returns PARQ's pull: steeper and steeper steps from level to level.

    Between the nearest level q and the next one on the other side, with c half-way, a weight u goes
    to c + slope (u - c), cut to [q, next], where slope = 1 / (1 - hardness): the proximal map of a
    piecewise-affine regularizer, flat at the levels. Beyond the outermost level it goes to that.

    Args:
      hardness: in [0, 1], a number or a schedule step -> number: 0 leaves weights inside of the
        grid alone, 1 puts them on the nearest level.

    Raises:
      ValueError: a number out of its range; where the optimizer starts, with the leaf, a quantizer
        whose state has no `step` and `limit`, which say where the next level is, as `uniform` has.
    """
    _check_hardness(hardness)

    def pull(latent, nearest, state, count):
        if not {"step", "limit"} <= set(state):
            raise ValueError(
                "parq needs a uniform grid, whose state has a step and a limit, such as "
                f"uniform(bits); this one has {sorted(state)}"
            )
        share = _at_step(hardness, count, latent)
        step, end = state["step"], state["limit"] * state["step"]
        away = jnp.clip(latent, -end, end) - nearest  # at most half a step
        # Distances from q: c lies at step / 2, so q + step / 2 + (|away| - step / 2) * slope.
        flat = 1 - share
        rest = jnp.abs(away) - share * step / 2  # c + slope (u - c) = q + rest / flat
        moved = jnp.where(flat > 0, jnp.maximum(rest, 0) / jnp.where(flat > 0, flat, 1), 0)
        return nearest + jnp.sign(away) * moved

    return pull


def annealed(steps: int, steepness: float = 10.0) -> Callable:
    """Returns a schedule of hardness from 0 to 1 in `steps` steps, slow at both ends (a sigmoid).

    Raises:
      ValueError: steps below 1, or steepness not positive.
    """
    steps = checks.whole("steps", steps, 1)
    checks.number("steepness", steepness, "positive", lambda s: s > 0)

    def schedule(step):
        ends = jax.nn.sigmoid(steepness / 2)
        raw = jax.nn.sigmoid(steepness * (step / steps - 0.5))
        hardness = jnp.clip((raw - (1 - ends)) / (2 * ends - 1), 0, 1)
        return jnp.where(step < steps, hardness, 1)

    return schedule


def proximal(
    base_optimizer: optax.GradientTransformation, quantizer: Quantizer, pull: Callable
) -> optax.GradientTransformation:
    """Moves latent weights by an optimizer, and the params to where `pull` takes them.

    Start from `proximal_params(state, params)`: gradients are to be taken there. Updates take
    params to the pulled weights to within one unit in the last place; `proximal_params` gives them
    bit for bit, `proximal_state` what `encode` takes beside them. Leaves that the quantizer does
    not own are trained by the optimizer as always. Weight decay decays the latent weights.

    Args:
      base_optimizer: any of optax's.
      quantizer: whose state has nothing learned; it is updated on the latent weights in every step.
      pull: `hard()`, `binary_relax(hardness)`, `parq(hardness)`, or a function (latent, nearest,
        buffers, count) -> weights of one leaf: latent weights, the quantizer's values for them, the
        leaf's buffers, steps done.

    Raises:
      ValueError: a pull that is no function; at `init`, a quantizer with learned leaves; in
        `update`, params missing.
    """
    checks.quantizer(quantizer)
    if not callable(pull):
        raise ValueError(
            f"pull must be hard(), binary_relax(...), parq(...) or alike, got {pull!r}"
        )

    def init(params):
        if not jax.tree.leaves(params):  # optax.tree.map_params asks for the layout alone
            none = jnp.zeros(())
            return ProximalState(none, none, none, base_optimizer.init(params), none)
        quant = quantizer.init(params)
        if quant.learned:
            raise ValueError(
                f"proximal trains weights alone, but the quantizer learns {list(quant.learned)}: "
                "train those beside the params, without proximal"
            )
        flat, rebuild = paths.flatten(params)
        latent = {
            path: jnp.array(flat[path], rounding.work_dtype(flat[path].dtype))
            for path in owned_paths(quant)
        }
        base = base_optimizer.init(rebuild({**flat, **latent}))
        count = jnp.zeros((), jnp.int32)
        pulled = pull_all(flat, rebuild, latent, quant, count)
        return ProximalState(latent, pulled, quant, base, count)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("proximal needs params: call update(grads, state, params)")
        flat, rebuild = paths.flatten(params)
        grads, rebuild_grads = paths.flatten(updates)
        for tree in (flat, grads):
            paths.restrict(tree, state.latent)
        wide = {path: grads[path].astype(x.dtype) for path, x in state.latent.items()}
        latent = rebuild({**flat, **state.latent})
        moves, base = base_optimizer.update(rebuild_grads({**grads, **wide}), state.base, latent)
        latent = optax.apply_updates(latent, moves)
        quant = quantizer.update(latent, state.quant)
        latent = paths.restrict(paths.flatten(latent)[0], state.latent)
        count = optax.safe_increment(state.count)
        pulled = pull_all(flat, rebuild, latent, quant, count)
        moves, rebuild_moves = paths.flatten(moves)
        for path, new in pulled.items():
            precise = latent[path].dtype
            difference = new.astype(precise) - flat[path].astype(precise)
            moves[path] = difference.astype(flat[path].dtype)
        return rebuild_moves(moves), ProximalState(latent, pulled, quant, base, count)

    def pull_all(flat, rebuild, latent, quant, count):
        nearest, _ = paths.flatten(quantizer.apply(rebuild({**flat, **latent}), quant))
        pulled = {}
        for path, mine in latent.items():
            with at(path):
                value = meshes.typed_as(mine, pull, mine, nearest[path], quant.buffers[path], count)
            pulled[path] = value.astype(flat[path].dtype)
        return pulled

    return optax.GradientTransformation(init, update)


def proximal_params(opt_state, params):
    """Returns the params with every leaf that `proximal` owns exactly where it was pulled.

    Args:
      opt_state: that of `proximal` or of a chain or partition with it.
      params: of that optimizer; other leaves are the same objects.

    Raises:
      ValueError: no state of `proximal`, or several; params that do not match it.
    """
    pulled = find_proximal(opt_state).pulled
    flat, rebuild = paths.flatten(params)
    paths.restrict(flat, pulled)
    return rebuild({**flat, **pulled})


def proximal_state(opt_state) -> QuantState:
    """Returns the quantizer's state: what `encode(proximal_params(...), ...)` takes.

    Args:
      opt_state: that of `proximal` or of a chain or partition with it.

    Raises:
      ValueError: it holds no state of `proximal`, or several.
    """
    return find_proximal(opt_state).quant


def find_proximal(opt_state) -> ProximalState:
    """Returns the state of `proximal` anywhere in an optimizer's state."""
    return optimizer_states.only(opt_state, ProximalState, "proximal")


def _at_step(hardness, count, like):
    value = hardness(count) if callable(hardness) else hardness
    return jnp.asarray(value, like.dtype)


def _check_hardness(value):
    checks.number("hardness", value, "in [0, 1]", lambda v: (v >= 0) & (v <= 1))
