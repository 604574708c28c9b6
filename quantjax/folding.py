"""Batch norms folded into the layer before: what `linen` and `nnx` have in common.

Both trace the model with names (`mark`) at the variables and outputs of its layers and batch
norms; what may be folded is read off the traced program, which shows every use of a value.
"""

from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from quantjax import batch_norms
from quantjax.core import meshes

PREFIX = "quantjax fold|"
INPUT, OUTPUT = "input", "output"
LAYER_VARIABLES = ("kernel", "bias")
NORM_VARIABLES = ("mean", "var", "scale", "bias")


def mark(x, path: str, what: str):
    """Returns x with a name in the traced program: it is `what` of the module at `path`."""
    return checkpoint_name(x, f"{PREFIX}{path}|{what}|{jnp.ndim(x)}")


def with_input_marked(path: str, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Returns the arguments of a batch norm's call with its input marked."""
    if args:
        return (mark(args[0], path, INPUT), *args[1:]), kwargs
    return args, {k: mark(x, path, INPUT) if k == "x" else x for k, x in kwargs.items()}


def shapes(tree):
    """Returns a tree with shapes and dtypes in place of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def pairs(program: core.ClosedJaxpr, leaves: Mapping, variables: Mapping, why: Mapping):
    """Returns which batch norm can be folded into which layer, and why the others can not.

    A batch norm's input must be the output of a layer, which goes nowhere else; the variables of
    both must be read by them alone, in one call. Both may be stacked for a scan.

    Args:
      program: the model, traced with marks.
      leaves: {path of a leaf: its place among the inputs of the program}.
      variables: {path of a layer or batch norm: {name: path of the leaf}}.
      why: {path of a layer or batch norm that is none of those known: the reason}.

    Returns:
      {path of a batch norm: path of its layer}, {path of a batch norm: the reason}.
    """
    marks = _marks(program.jaxpr)

    def layer_of(norm):
        if norm in why:
            raise ValueError(why[norm])
        jaxpr, place, _ = marks[norm, INPUT][0]
        x = jaxpr.eqns[place].invars[0]
        layer = next((p for p, what in marks if what == OUTPUT and _made(marks[p, what], x)), None)
        if layer is None:
            raise ValueError("its input is not what a Conv, ConvTranspose or Dense layer gives")
        if layer in why:
            raise ValueError(f"{layer}: {why[layer]}")
        uses = [var for eqn in jaxpr.eqns for var in eqn.invars] + jaxpr.outvars
        if sum(var is x for var in uses) > 1:
            raise ValueError(f"what {layer} gives goes elsewhere, too")
        for path in (layer, norm):
            for name, leaf in variables[path].items():
                _check_own(program.jaxpr, leaves, marks, path, name, leaf)
        return layer

    found, reasons = {}, {}
    for norm in [path for path, what in marks if what == INPUT]:
        try:
            found[norm] = layer_of(norm)
        except ValueError as error:
            reasons[norm] = str(error)
    return found, reasons


def changed(pairs: Mapping, values: Callable, epsilons: Mapping) -> dict:
    """Returns {path of a layer or batch norm: {name: array after folding}}, on the old devices.

    Args:
      pairs: {path of a batch norm: path of its layer}.
      values: path -> {name: array}.
      epsilons: {path of a batch norm: its epsilon}.
    """
    old = {norm: (values(layer), values(norm)) for norm, layer in pairs.items()}
    new = folded({norm: (*both, epsilons[norm]) for norm, both in old.items()})
    new = batch_norms.as_before(new, old)
    return {
        path: part
        for norm, layer in pairs.items()
        for path, part in zip((layer, norm), new[norm], strict=True)
    }


@jax.jit
def folded(items: Mapping) -> dict:
    """Returns the variables of layers and batch norms after folding; equal outputs.

    s = scale / sqrt(var + epsilon), kernel' = kernel s and bias' = bias s of the layer. What it
    gives now has mean' = mean s and var' = var s^2, and with scale' = sqrt(var' + epsilon) the
    batch norm only adds bias - mean'. Without a scale its divisor is 1: var' = 1 - epsilon.

    Args:
      items: {path of a batch norm: (layer, norm, epsilon)} with layer {"kernel": [..., channels],
        "bias": ...} and norm {"mean": [channels], "var": ..., "scale": ..., "bias": ...}; biases
        and scale may be missing; all may have the same leading axes.

    Returns:
      {path of a batch norm: (layer, norm)}.
    """
    return {
        path: meshes.typed_as((layer, norm), _folded, layer, norm, epsilon)
        for path, (layer, norm, epsilon) in items.items()
    }


def refuse(reasons: Mapping):
    """Raises ValueError where nothing can be folded."""
    told = "; ".join(f"{path or 'the model itself'}: {reason}" for path, reason in reasons.items())
    raise ValueError(
        f"no batch norm can be folded into a layer. {told or 'The model runs no BatchNorm'}"
    )


def _folded(layer, norm, epsilon):
    mean, var = _wide(norm["mean"]), _wide(norm["var"])
    factor, divisor = lax.rsqrt(var + epsilon), jnp.ones_like(var)
    if "scale" in norm:
        factor = factor * _wide(norm["scale"])
        # Rounded first, so that scale and divisor are equal in any dtype.
        divisor = _wide(jnp.sqrt(var * factor**2 + epsilon).astype(norm["scale"].dtype))
    kernel = _wide(layer["kernel"])
    inner = tuple(range(factor.ndim - 1, kernel.ndim - 1))
    new_layer = {"kernel": kernel * jnp.expand_dims(factor, inner)}
    if "bias" in layer:
        new_layer["bias"] = _wide(layer["bias"]) * factor
    new_norm = {**norm, "mean": mean * factor, "var": divisor**2 - epsilon}
    if "scale" in norm:
        new_norm["scale"] = divisor
    old, new = (dict(layer), dict(norm)), (new_layer, new_norm)
    return jax.tree.map(lambda x, like: x.astype(like.dtype), new, old)


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _marks(jaxpr) -> dict:
    """Returns {(path, what): [(program, place of the mark in it, rank of the value)]}."""
    marks = {}
    for program in _programs(jaxpr):
        for place, eqn in enumerate(program.eqns):
            name = eqn.params.get("name") if eqn.primitive.name == "name" else None
            if name is not None and name.startswith(PREFIX):
                path, what, rank = name.removeprefix(PREFIX).rsplit("|", 2)
                marks.setdefault((path, what), []).append((program, place, int(rank)))
    return marks


def _made(places, x):
    return any(program.eqns[place].outvars[0] is x for program, place, _ in places)


def _check_own(top, leaves, marks, path, name, leaf):
    """Raises ValueError unless a variable is a leaf that the one call of its module alone reads."""
    if leaf not in leaves:
        raise ValueError(f"there is no {leaf} among the variables")
    mine, ends = marks.get((path, name), []), marks[path, OUTPUT]
    if len(mine) != 1 or len(ends) != 1:
        raise ValueError(f"{path} is called more than once")
    ((program, start, rank),), ((_, end, _),) = mine, ends
    value = top.invars[leaves[leaf]]
    reads = list(_reads(top, value, program))
    # The equations of one call lie between its first mark and its last.
    own = all(read is not None and start <= read <= end for read in reads)
    if start not in reads or not own:
        raise ValueError(f"{leaf} is read elsewhere, too, or changed on its way to {path}")
    if program.eqns[start].invars[0].aval.ndim != rank:
        raise ValueError(f"{path} is under vmap")


def _reads(jaxpr, var, target) -> Iterator[int | None]:
    """Yields the places in the program `target` where a variable is read; None for any elsewhere.

    It is followed into what is called with it, and out again.
    """
    for place, eqn in enumerate(jaxpr.eqns):
        for position, operand in enumerate(eqn.invars):
            if operand is not var:
                continue
            inner = _called(eqn, position)
            if jaxpr is target or inner is None:
                yield place if jaxpr is target else None
                continue
            mine = inner.invars[position]
            yield from _reads(inner, mine, target)
            for out, result in zip(inner.outvars, eqn.outvars, strict=True):
                if out is mine and result.aval.ndim < operand.aval.ndim:
                    yield None  # a slice that goes round the loop
                elif out is mine:
                    yield from _reads(jaxpr, result, target)


def _called(eqn, position) -> core.Jaxpr | None:
    """Returns the program that takes the operand at `position` as it is, or a scan's slices of it.

    What goes round a loop, or lies around it, is not followed.
    """
    programs = _run_by(eqn)
    if len(programs) != 1:
        return None
    (inner,) = programs
    if (len(inner.invars), len(inner.outvars)) != (len(eqn.invars), len(eqn.outvars)):
        return None
    sliced = inner.invars[position].aval.ndim < eqn.invars[position].aval.ndim
    return inner if sliced or eqn.primitive.name != "scan" else None


def _run_by(eqn) -> list[core.Jaxpr]:
    found = []
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, core.ClosedJaxpr | core.Jaxpr):
                found.append(part.jaxpr if isinstance(part, core.ClosedJaxpr) else part)
    return found


def _programs(jaxpr) -> Iterator[core.Jaxpr]:
    """Yields a program and all that it runs; one that is run twice, twice."""
    yield jaxpr
    for eqn in jaxpr.eqns:
        for inner in _run_by(eqn):
            yield from _programs(inner)
