"""What is said when training cannot go on: which step and layer, how much memory, who is gone."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.core import paths


def all_finite(loss, trainable):
    """True where the loss and every number that is trained are finite; traced."""
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(trainable)]
    return jnp.all(jnp.stack([jnp.isfinite(loss), *finite]))


def where(pick, new, old):
    """Returns new or old, leaf by leaf; leaves that are the same object stay."""
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(pick, a, b), new, old)


def first_bad(pairs: Iterable) -> str | None:
    """Returns what is said of the first leaf that is not finite, of (path, array); None if none."""
    for path, leaf in pairs:
        leaf = np.asarray(leaf)
        if np.issubdtype(leaf.dtype, np.inexact) or leaf.dtype == jnp.bfloat16:
            bad = ~np.isfinite(leaf.astype(np.float32))
            if bad.any():
                return f" of {path} ({bad.sum()} of {bad.size} numbers)" if path else ""
    return None


def in_order(captured: dict) -> tuple[list, list]:
    """Returns names and outputs of the layers that Flax has captured, as they were called."""
    names, outputs = [], []

    def walk(node, path):
        for name, child in node.items():
            if isinstance(child, Mapping):
                walk(child, (*path, name))
                continue
            for leaf in jax.tree.leaves(child):
                names.append("/".join(path) or "the model")
                outputs.append(leaf)

    walk(captured, ())
    return names, outputs


def explain(label: str, step: int, parts: dict) -> str:
    """Returns what is told of a step that is not finite.

    Args:
      label: of the phase.
      step: the first such, from 1.
      parts: {"the loss": tree or pairs, ...} in the order in which they are computed; the first
        one with a number that is not finite is named.
    """
    told = f"{label}: step {step} is not finite"
    for what, tree in parts.items():
        pairs = tree if isinstance(tree, list) else paths.flatten(tree)[0].items()
        bad = first_bad(pairs)
        if bad is not None:
            told = f"{told}, first in {what}{bad}"
            break
    return f"{told}. A smaller learning rate or strength may help"


def out_of_memory(error: Exception, label: str, batch_size: int) -> MemoryError | None:
    """Returns what is told when the device's memory did not suffice; None for another error."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Out of memory" not in text:
        return None
    return MemoryError(
        f"{label}: a step of {batch_size} examples does not fit into the device's memory; try "
        f"batches of {max(1, batch_size // 2)}, --precision bf16, or a mesh of more devices "
        f"({text.splitlines()[0][:200]})"
    )


def lost_process(error: Exception, label: str) -> ConnectionError | None:
    """Returns what is told where one of several processes is gone; None for another error."""
    signs = ("Gloo", "coordination", "heartbeat", "NCCL", "UNAVAILABLE")
    if jax.process_count() == 1 or not any(sign in str(error) for sign in signs):
        return None
    return ConnectionError(
        f"{label}: another process is gone; start again with --resume, on as many as are left "
        f"({str(error).splitlines()[0][:120]})"
    )
