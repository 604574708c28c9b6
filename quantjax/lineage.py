"""What the values of a traced program are made of, read off its jaxpr.

`mark` names a value on its way. `trace` follows the program and tells, for every marked value,
which marks it reaches without passing another mark: how `linen.calibrate_batch_norm` finds the
layers that are fed by one batch norm alone.
"""

from collections.abc import Sequence

from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

DATA = "data"  # the source of everything that is not a function of marked values alone

_CUT, _LOOK = "quantjax.cut:", "quantjax.look:"
_MIXERS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


def mark(x, name: str):
    """Returns x; what follows is made of `name`, no longer of what x is made of."""
    return checkpoint_name(x, _CUT + name)


def look(x, name: str):
    """Returns x; `trace` tells what it is made of."""
    return checkpoint_name(x, _LOOK + name)


def trace(jaxpr, sources: Sequence[frozenset]) -> dict[str, list[frozenset]]:
    """Returns {name: the sources of every value that passed `look(value, name)`}.

    Args:
      jaxpr: of the whole program, for instance `jax.make_jaxpr(f)(*args).jaxpr`.
      sources: of its inputs: `frozenset({DATA})`, or empty for parameters.

    A value's sources are the union of its operands'. Contractions and convolutions mix channels
    and add DATA, and so do loops and unknown calls; jit, remat, custom derivatives and scan are
    followed inside. Anything that escapes the analysis counts as DATA or is not told at all.
    """
    seen = {}
    _follow(jaxpr, sources, seen)
    return seen


def _follow(jaxpr, sources, seen):
    env = dict(zip(jaxpr.invars, sources, strict=True))

    def read(atom):
        return frozenset() if isinstance(atom, core.Literal) else env.get(atom, frozenset())

    for eqn in jaxpr.eqns:
        outs = _follow_eqn(eqn, [read(atom) for atom in eqn.invars], seen)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _follow_eqn(eqn, ins, seen):
    kind, union = eqn.primitive.name, frozenset().union(*ins)
    if kind == "name" and eqn.params["name"].startswith(_CUT):
        return [frozenset({eqn.params["name"].removeprefix(_CUT)})]
    if kind == "name" and eqn.params["name"].startswith(_LOOK):
        seen.setdefault(eqn.params["name"].removeprefix(_LOOK), []).append(union)
    inner = _jaxprs(eqn.params)
    if kind == "scan":
        return _follow_scan(eqn, inner[0], ins, seen)
    if len(inner) == 1 and len(inner[0].invars) == len(ins):  # jit, remat, custom_jvp, ...
        return _follow(inner[0], ins, seen)
    if union and (inner or kind in _MIXERS):
        union |= {DATA}
    return [union] * len(eqn.outvars)


def _follow_scan(eqn, body, ins, seen):
    consts, carried = eqn.params["num_consts"], eqn.params["num_carry"]
    fixed, carry, xs = ins[:consts], ins[consts : consts + carried], ins[consts + carried :]
    while True:
        outs = _follow(body, [*fixed, *carry, *xs], {})[:carried]
        # What is carried over is another iteration's value: never one mark's alone.
        wider = [c if o <= c else c | o | {DATA} for c, o in zip(carry, outs, strict=True)]
        if wider == carry:
            return _follow(body, [*fixed, *carry, *xs], seen)
        carry = wider


def _jaxprs(params):
    found = []
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)
            if isinstance(part, core.Jaxpr):
                found.append(part)
    return found
