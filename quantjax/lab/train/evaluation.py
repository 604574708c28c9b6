"""Scores of networks over a split."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from quantjax.lab.train import meshes, states
from quantjax.lab.train import session as session_lib
from quantjax.lab.train.tasks import Score, Task


def make_evaluate(task: Task, input_quantizer=None, batch_size: int = 500) -> Callable:
    """Returns evaluate(variables, split) -> Score, compiled once for all trees of one shape.

    Off the CPU all batches of a split are one call.
    """
    session = session_lib.current()
    apply = states.model_apply(task.model, input_quantizer)

    def sums(variables, x, y, real):
        """Returns the sums of losses, of hits and of predictions over a batch."""
        losses, hits = task.measure(apply(variables, task.inputs(x), train=False), y)
        real = real.reshape(real.shape + (1,) * (losses.ndim - 1))
        predictions = jnp.sum(real) * (losses.size // len(losses))
        return jnp.sum(losses * real), jnp.sum(hits * real), predictions

    if session.mesh is not None and AxisType.Explicit in session.mesh.axis_types:
        everywhere = NamedSharding(session.mesh, PartitionSpec())
        sums = jax.sharding.auto_axes(sums, out_sharding=(everywhere,) * 3)

    @jax.jit
    def whole(variables, x, y, real):
        return jax.lax.map(lambda batch: sums(variables, *batch), (x, y, real))

    each = jax.jit(sums)

    def evaluate(variables, split) -> Score:
        count = len(split[0])
        if session.mesh is not None:
            variables = meshes.replicated(variables, session.mesh)
        parts = 1 if session.mesh is None else session.mesh.shape[meshes.DATA]
        size = -(-min(batch_size, count) // parts) * parts
        # The last batch is filled up with examples that do not count.
        index = np.arange(-(-count // size) * size).reshape(-1, size)
        real = (index < count).astype(np.float32)
        index = np.minimum(index, count - 1)
        if session.mesh is None and jax.default_backend() != "cpu":
            found = whole(variables, *(part[index] for part in split), real)
        else:
            batches = zip(index, real, strict=True)
            found = [
                each(variables, *_placed((*(part[rows] for part in split), mine), session.mesh))
                for rows, mine in batches
            ]
            found = zip(*found, strict=True)
        loss, hits, total = (np.sum(np.asarray(jax.device_get(p), np.float64)) for p in found)
        return Score(float(loss / total), float(100 * hits / total))

    return evaluate


def _placed(batch, mesh):
    if mesh is None:
        return batch
    return meshes.place(batch, NamedSharding(mesh, PartitionSpec(meshes.DATA)))
