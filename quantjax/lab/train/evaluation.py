"""Predictions and scores of networks over a split."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from quantjax.lab.train import meshes, states
from quantjax.lab.train import session as session_lib
from quantjax.lab.train.tasks import Predictions, Score, Task


def make_predict(task: Task, input_quantizer=None, batch_size: int = 500) -> Callable:
    """Returns predict(variables, split) -> Predictions, compiled once for all trees of one shape.

    Off the CPU all batches of a split are one call.
    """
    session = session_lib.current()
    apply = states.model_apply(task.model, input_quantizer)

    def means(variables, x, y):
        """Returns the mean loss and share of hits of every example of a batch."""
        losses, hits = task.measure(apply(variables, task.inputs(x), train=False), y)
        return tuple(part.reshape(len(part), -1).mean(axis=1) for part in (losses, hits))

    whole_on = None
    if session.mesh is not None:
        whole_on = NamedSharding(session.mesh, PartitionSpec())
        if AxisType.Explicit in session.mesh.axis_types:
            means = jax.sharding.auto_axes(means, out_sharding=(whole_on,) * 2)

    @jax.jit
    def whole(variables, x, y):
        return jax.lax.map(lambda batch: means(variables, *batch), (x, y))

    each = jax.jit(means, out_shardings=whole_on)

    def predict(variables, split) -> Predictions:
        count = len(split[0])
        if session.mesh is not None:
            variables = meshes.replicated(variables, session.mesh)
        parts = 1 if session.mesh is None else session.mesh.shape[meshes.DATA]
        size = -(-min(batch_size, count) // parts) * parts
        # The last batch is filled up with examples that do not count.
        index = np.arange(-(-count // size) * size).reshape(-1, size)
        index = np.minimum(index, count - 1)
        if session.mesh is None and jax.default_backend() != "cpu":
            found = whole(variables, *(part[index] for part in split))
        else:
            found = [
                each(variables, *_placed([part[rows] for part in split], session.mesh))
                for rows in index
            ]
            found = zip(*found, strict=True)
        found = (np.ravel(np.asarray(jax.device_get(part), np.float64)) for part in found)
        return Predictions(*(part[:count] for part in found))

    return predict


def make_evaluate(task: Task, input_quantizer=None, batch_size: int = 500) -> Callable:
    """Returns evaluate(variables, split) -> Score, compiled once for all trees of one shape."""
    predict = make_predict(task, input_quantizer, batch_size)

    def evaluate(variables, split) -> Score:
        return predict(variables, split).score

    return evaluate


def _placed(batch, mesh):
    if mesh is None:
        return batch
    return meshes.place(tuple(batch), NamedSharding(mesh, PartitionSpec(meshes.DATA)))
