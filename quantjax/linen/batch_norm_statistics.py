"""Statistics of batch norms measured anew, after quantization."""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from quantjax import batch_norms
from quantjax.core import paths
from quantjax.linen.layers import check_apply
from quantjax.linen.probes import axes_of, is_batch_norm

STATISTICS = "batch_stats"


def reestimate_batch_norm(apply: Callable, variables: Mapping, batches: Iterable, **kwargs) -> dict:
    """Returns `variables` with the mean and variance that its batch norms meet over the batches.

    Args:
      apply: `model.apply`, or what `quantize_inputs` or `packed` returned; not jitted.
      variables: of the model, with the weights that it shall have: those of `quantizer.apply`, say.
      batches: inputs of the model, arrays or trees of arrays; a single array is one batch. Take
        them as large as in training; one of another size compiles again.
      **kwargs: further arguments of apply. Give what evaluation takes, such as `train=False`:
        dropout is then off, and every nn.BatchNorm uses the statistics of the batch all the same.

    Each batch goes through the model once, normalised everywhere by its own statistics, without
    momentum. A mean and a variance are those of all values that a batch norm got, whatever the
    sizes of batches and however often it is called in a pass:

      mean = sum_i n_i mean_i / sum_i n_i
      var = sum_i n_i (var_i + (mean_i - mean)^2) / sum_i n_i

    Only `batch_stats` of nn.BatchNorm changes; batch norms that the model does not run keep it, and
    input quantizers stay as they are. A batch norm with an `axis_name` needs an `apply` that runs
    the model under that axis (shard_map, say) and gives `batch_stats` back as one copy.

    Raises:
      ValueError: no batches, no statistics in `variables`, no batch norm that runs, or one (its
        path is named) that gets a single value per channel, or whose statistics are not finite
        (that not under jit).
    """
    check_apply(apply, "apply")
    held = flatten_dict(unfreeze(variables.get(STATISTICS, {})))
    old = {
        key[:-1]: {"mean": mean, "var": held[*key[:-1], "var"]}
        for key, mean in held.items()
        if key[-1] == "mean" and (*key[:-1], "var") in held
    }
    if not old:
        raise ValueError(
            f"variables hold no statistics of batch norms: expected {STATISTICS!r} among "
            f"{list(variables)}"
        )
    ran = set()

    @jax.jit
    def seen(variables, unions, batch):
        # Beside the model's own: they take the same way through nn.scan and nn.remat.
        beside = {(*key, name): x for key, union in unions.items() for name, x in union.items()}
        given = unflatten_dict({**flatten_dict(unfreeze(variables[STATISTICS])), **beside})
        with nn.intercept_methods(_by_statistics_of_the_batch(ran)):
            _, state = apply(
                {**variables, STATISTICS: given}, batch, mutable=[STATISTICS], **kwargs
            )
        found = flatten_dict(unfreeze(state[STATISTICS]))
        return {key: {name: found[*key, name] for name in union} for key, union in unions.items()}

    start = unions = {key: batch_norms.empty(**stats) for key, stats in old.items()}
    for batch in [batches] if hasattr(batches, "shape") else batches:
        unions = seen(variables, unions, batch)
    if unions is start:
        raise ValueError("reestimate_batch_norm needs at least one batch")
    if not ran:
        raise ValueError("the model runs no nn.BatchNorm")
    name_of = {"/".join(key): key for key in old}
    new = batch_norms.settled(
        {name: old[key] for name, key in name_of.items()},
        {name: unions[key] for name, key in name_of.items()},
    )
    leaves, rebuild = paths.flatten(variables[STATISTICS])
    for name, stats in new.items():
        leaves |= {f"{name}/{stat}".removeprefix("/"): value for stat, value in stats.items()}
    return {**variables, STATISTICS: rebuild(leaves)}


def _by_statistics_of_the_batch(ran: set):
    """An interceptor: batch norms use their input's statistics, and join them to the union."""
    inside = False

    def intercept(next_fun, args, kwargs, context):
        nonlocal inside
        # A subclass arrives here twice; what it calls takes the arguments of nn.BatchNorm.
        original = getattr(context.orig_method, "func", None) is nn.BatchNorm.__call__.__wrapped__
        if inside or not original or not is_batch_norm(context):
            return next_fun(*args, **kwargs)
        module, scope = context.module, context.module.scope
        path = "/".join(module.path) or "the model itself"
        x, _, mask = batch_norms.arguments(*args, **kwargs)
        if not scope.has_variable(STATISTICS, batch_norms.COUNT):
            raise ValueError(f"{path}: {STATISTICS!r} holds no mean and var of this batch norm")
        count = batch_norms.values_per_channel(
            path, x, axes_of(module, x)[0], mask, module.axis_name is not None
        )
        free = module.clone(
            parent=None,
            name=None,
            use_running_average=False,
            momentum=0.0,
            use_fast_variance=False,
        )
        given = {
            name: jnp.zeros_like(scope.get_variable(STATISTICS, name)) for name in ("mean", "var")
        }
        params = dict(scope.variables().get("params", {}))
        inside = True
        try:
            y, state = free.apply(
                {"params": params, STATISTICS: given},
                x,
                mask=mask,
                mutable=[STATISTICS],
                method=nn.BatchNorm.__call__,
            )
        finally:
            inside = False
        union = {name: scope.get_variable(STATISTICS, name) for name in batch_norms.UNION}
        union = batch_norms.joined(union, count, **state[STATISTICS])
        for name, value in union.items():
            scope.put_variable(STATISTICS, name, value)
        ran.add(path)
        return y

    return intercept
