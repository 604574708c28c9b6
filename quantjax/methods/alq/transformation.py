"""ALQ as one optax transformation: params that stay on sums of binary bases, phase after phase.

A schedule is a tuple of phases (`schedule`). The phase in force is chosen by
`lax.switch` on the count, so that a change of phase compiles nothing. The transformation owns what
its quantizer owns; join it with another optimizer for the rest by `optax.partition`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from quantjax.core import checks, meshes, optimizer_states, paths, qarray, rounding
from quantjax.core.quantizer import Quantizer, QuantState
from quantjax.methods import amsgrad
from quantjax.methods.alq import bases as bases_lib
from quantjax.methods.alq import steps
from quantjax.methods.alq.bases import Bases
from quantjax.methods.alq.multibit import from_multi_bit
from quantjax.methods.alq.schedule import (
    KINDS,
    PRESELECT,
    STRAIGHT_THROUGH,
    check_left,
    check_schedule,
    remaining,
)


class AlqState(NamedTuple):
    """State of `alq`; dicts keyed by path, one scalar in their place where there are no params."""

    count: jax.Array  # scalar, int32: steps done
    began_with: jax.Array  # scalar, int32: coordinates when the present phase began
    quant: QuantState  # of the quantizer, with the present coords and mask [*group, K]
    codes: dict  # [*view], uint8: bit k says where basis k is +1
    weights: dict  # Moments [*shape] of the weights
    coords: dict  # Moments [*group, K] of the coordinates
    floats: dict  # [*shape]: full-precision weights, in schedules with straight-through phases


def alq(
    quantizer: Quantizer,
    schedule,
    *,
    rate_scale=1.0,
    weight_decay=0.0,
    preselect: float | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Optimises bases and coordinates of multi-bit weights on the loss, and prunes coordinates.

    The updates take params to the decoded multi-bit weights, to within one unit in the last place
    of the larger of old and new; `alq_params` gives them bit for bit. Start from
    `alq_params(state, params)`: gradients are to be taken there.

    Args:
      quantizer: whose encoded leaves are all MultiBit, such as `multi_bit` or a partition of them;
        pruning ranks the coordinates of all leaves together.
      schedule: phases, as `alq_rounds` gives. The last one goes on when they are over.
      rate_scale: multiplies all learning rates but that of pruning; may be traced.
      weight_decay: L2 on the coordinates in coordinate phases (section 3.3).
      preselect: the share of a leaf's coordinates that is ranked first in pruning (appendix B.1);
        None: ten times what a step removes, the paper's 1% for 40% in an epoch of CIFAR-10.
      b1, b2, eps: of AMSGrad.

    Raises:
      ValueError: numbers out of range, an empty schedule or unknown kind; at `init`, leaves that
        the quantizer does not own or does not encode as MultiBit, or a schedule that would prune
        everything; in `update`, params or gradients of another tree.
    """
    checks.quantizer(quantizer)
    check_schedule(schedule)
    schedule = tuple(schedule)
    if preselect is not None:
        steps.check_preselect(preselect)
    for name, value in (("b1", b1), ("b2", b2)):
        amsgrad.check_decay(name, value)
    amsgrad.check_positive("eps", eps)
    if callable(rate_scale):
        raise ValueError("rate_scale must be a number; a schedule goes to optax.inject_hyperparams")
    for name, value in (("weight_decay", weight_decay), ("rate_scale", rate_scale)):
        amsgrad.check_not_negative(name, value)
    # Those that are arrays go into the step as arguments, as meshes want it.
    numbers = {
        "rate_scale": rate_scale,
        "weight_decay": weight_decay,
        "preselect": preselect,
        "b1": b1,
        "b2": b2,
        "eps": eps,
    }
    kinds = [kind for kind in KINDS if any(phase.kind == kind for phase in schedule)]
    with_floats = any(kind in STRAIGHT_THROUGH for kind in kinds)
    ends = np.cumsum([phase.steps for phase in schedule]).astype(np.int32)
    table = {
        "branch": np.array([kinds.index(phase.kind) for phase in schedule], np.int32),
        "start": ends - np.array([phase.steps for phase in schedule], np.int32),
        "steps": np.array([phase.steps for phase in schedule], np.float32),
        "rate": np.array([phase.learning_rate for phase in schedule], np.float32),
        "keep": np.array([phase.keep for phase in schedule], np.float32),
        "preselect": np.array(
            [min(1.0, PRESELECT * (1 - phase.keep) / phase.steps) for phase in schedule], np.float32
        ),
    }

    def init(params):
        flat, _ = paths.flatten(params)
        if not flat:  # optax.tree.map_params asks for the layout alone
            return AlqState(*(jnp.zeros((), jnp.int32) for _ in AlqState._fields))
        quant = quantizer.init(params)
        encoded = quantizer.encode(params, quant)
        encoded = jax.tree_util.tree_flatten_with_path(encoded, is_leaf=qarray.is_encoded)[0]
        encoded = {paths.path_name(key_path): leaf for key_path, leaf in encoded}
        strange = [path for path, leaf in encoded.items() if not isinstance(leaf, qarray.MultiBit)]
        if strange:
            raise ValueError(
                f"alq needs a quantizer that encodes every leaf as MultiBit; it leaves {strange}. "
                "Give other leaves to another optimizer by optax.partition"
            )
        lacking = [p for p in encoded if not {"coords", "mask"} <= set(quant.buffers.get(p, {}))]
        if lacking:
            raise ValueError(f"the quantizer keeps no coords and mask for {lacking}")
        check_left(schedule, [leaf.mask for leaf in encoded.values()])
        found = {path: from_multi_bit(leaf) for path, leaf in encoded.items()}
        # Moments of the weights lie as the weights do.
        wide = {path: jnp.zeros_like(flat[path], found[path].coords.dtype) for path in found}
        alive = sum(jnp.count_nonzero(bases.mask) for bases in found.values()).astype(jnp.int32)
        return AlqState(
            count=jnp.zeros_like(alive),
            began_with=alive,
            quant=_with_coords(quant, found),
            codes={path: bases.codes for path, bases in found.items()},
            weights={path: amsgrad.zero_moments(zeros) for path, zeros in wide.items()},
            coords={path: amsgrad.zero_moments(bases.coords) for path, bases in found.items()},
            floats=_floats(flat, found) if with_floats else {},
        )

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("alq needs params: call update(grads, state, params)")
        grads, rebuild = paths.flatten(updates)
        weights, _ = paths.flatten(params)
        for what, tree in (("gradients", grads), ("params", weights)):
            _check_tree(what, tree, state)
        # The quantizer's own checks of its state: shapes say how many slots it has.
        jax.eval_shape(quantizer.apply, params, state.quant)
        arrays = {name: x for name, x in numbers.items() if isinstance(x, jax.Array)}
        updates, state = meshes.typed_as((weights, state), advance, arrays, grads, state, weights)
        return rebuild(updates), state

    def advance(arrays, grads, state, weights):
        """Returns the updates and the next state, keyed by path."""
        mine = numbers | arrays
        b1, b2, eps = (mine[name] for name in ("b1", "b2", "eps"))
        phase = jnp.searchsorted(ends, state.count, side="right")
        phase = jnp.minimum(phase, len(schedule) - 1)
        now = {name: jnp.asarray(values)[phase] for name, values in table.items()}
        found = _bases(state)
        alive = sum(jnp.count_nonzero(bases.mask) for bases in found.values()).astype(jnp.int32)
        done = state.count - now["start"]
        began_with = jnp.where(done == 0, alive, state.began_with)
        descent = steps.Descent(now["rate"] * mine["rate_scale"], b1, b2, eps)

        def restart(found):
            """Straight-through phases start from the values that the phase before them left."""
            return _floats(_values(found, weights), found) if with_floats else {}

        def leafwise(step):
            def branch(found, moments, floats):
                out = {path: step(path, found[path], moments[path], floats) for path in found}
                bases = {path: one[0] for path, one in out.items()}
                moments = {path: one[1] for path, one in out.items()}
                return bases, moments, restart(bases)

            return branch

        def basis(path, bases, moments, floats):
            del floats
            return steps.move_bases(bases, grads[path], moments, descent)

        def coordinate(path, bases, moments, floats):
            del floats
            return steps.move_coords(bases, grads[path], moments, descent, mine["weight_decay"])

        def prune(found, moments, floats):
            del floats
            step = jnp.minimum(done + 1, now["steps"])
            count = alive - remaining(began_with, now["keep"], step, now["steps"])
            order = list(found)
            new, moved = steps.prune(
                [found[path] for path in order],
                [grads[path] for path in order],
                [moments[path] for path in order],
                descent._replace(learning_rate=now["rate"]),
                count,
                now["preselect"] if mine["preselect"] is None else mine["preselect"],
            )
            new = dict(zip(order, new, strict=True))
            return new, dict(zip(order, moved, strict=True)), restart(new)

        def straight_through(loss_aware):
            def branch(found, moments, floats):
                new, moved, moved_floats = {}, {}, {}
                for path, bases in found.items():
                    new[path], moved_floats[path], moved[path] = steps.straight_through(
                        bases,
                        floats[path],
                        grads[path],
                        moments[path],
                        descent,
                        loss_aware=loss_aware,
                    )
                return new, moved, moved_floats

            return branch

        branches = {
            "basis": leafwise(basis),
            "coordinate": leafwise(coordinate),
            "prune": prune,
            "ste-reconstruction": straight_through(False),
            "ste-loss-aware": straight_through(True),
        }
        moments = {
            path: steps.AlqMoments(state.count, state.weights[path], state.coords[path])
            for path in found
        }
        chosen = [branches[kind] for kind in kinds]
        found, moments, floats = jax.lax.switch(now["branch"], chosen, found, moments, state.floats)
        updates = {}
        for path, value in _values(found, weights).items():
            dtype = weights[path].dtype
            wide = rounding.work_dtype(dtype)
            updates[path] = (value.astype(wide) - weights[path].astype(wide)).astype(dtype)
        return updates, AlqState(
            count=optax.safe_increment(state.count),
            began_with=began_with,
            quant=_with_coords(state.quant, found),
            codes={path: bases.codes for path, bases in found.items()},
            weights={path: mine.weights for path, mine in moments.items()},
            coords={path: mine.coords for path, mine in moments.items()},
            floats=floats,
        )

    return optax.GradientTransformation(init, update)


def find_alq(opt_state) -> AlqState:
    """Returns the state of `alq` anywhere in an optimizer's state."""
    return optimizer_states.only(opt_state, AlqState, "alq")


def alq_state(opt_state) -> QuantState:
    """Returns the quantizer's state: what `encode(alq_params(...), ...)` takes.

    Args:
      opt_state: that of `alq` or of a chain or partition with it.

    Raises:
      ValueError: it holds no state of `alq`, or several.
    """
    return find_alq(opt_state).quant


def alq_params(opt_state, params):
    """Returns the params with every leaf that `alq` owns at its exact multi-bit value.

    Args:
      opt_state: that of `alq` or of a chain or partition with it.
      params: of that optimizer; leaves of others are the same objects.

    Raises:
      ValueError: no state of `alq`, or several; params that do not match it.
    """
    state = find_alq(opt_state)
    flat, rebuild = paths.flatten(params)
    mine = {path: leaf for path, leaf in flat.items() if path in state.codes}
    _check_tree("params", mine, state)
    return rebuild({**flat, **meshes.typed_as(mine, _values, _bases(state), mine)})


def _check_tree(what, flat, state):
    """Raises ValueError unless the leaves are those of the state."""
    lacking = [path for path in state.codes if path not in flat]
    strange = [path for path in flat if path not in state.codes]
    if lacking or strange:
        raise ValueError(
            f"the state of alq was made for another tree: the {what} lack {lacking}, and {strange} "
            "are not owned"
        )
    for path, leaf in flat.items():
        expected = state.weights[path].mean.shape
        if leaf.shape != expected:
            raise ValueError(f"{path}: {what} {leaf.shape}, but the state is for {expected}")


def _bases(state: AlqState) -> dict:
    buffers = state.quant.buffers
    return {
        path: Bases(codes, buffers[path]["coords"], buffers[path]["mask"])
        for path, codes in state.codes.items()
    }


def _with_coords(quant: QuantState, found: dict) -> QuantState:
    buffers = {
        path: {**quant.buffers[path], "coords": bases.coords, "mask": bases.mask}
        for path, bases in found.items()
    }
    return quant._replace(buffers=buffers)


def _values(found: dict, like: dict) -> dict:
    return {
        path: bases_lib.values(found[path]).reshape(leaf.shape).astype(leaf.dtype)
        for path, leaf in like.items()
    }


def _floats(leaves: dict, found: dict) -> dict:
    """The leaves in the precision of the coordinates, as arrays of their own."""
    return {path: jnp.array(leaf, found[path].coords.dtype) for path, leaf in leaves.items()}
