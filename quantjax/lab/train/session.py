"""How a command trains: what holds for all of its phases, set once around them.

Recipes and comparisons train many phases through many functions; where they run, in what precision
and what is kept of them is none of their business. So it is ambient, as JAX's own configuration is.
"""

import contextlib
import contextvars
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

PRECISIONS = {"float32": None, "bf16": jnp.bfloat16}
ON_NAN = ("stop", "skip")


class Session(NamedTuple):
    """What `engine` asks for."""

    mesh: Mesh | None = None  # None: one device
    rules: Any = None  # which leaves lie in parts on which axes, as `meshes.shardings` takes it
    precision: Any = None  # dtype that layers compute in; None: the model's own
    on_nan: str = "stop"  # or "skip": a step with a non-finite loss or weight is left out
    journal: Any = None  # of `checkpoints.Journal`; None: nothing is kept
    board: Any = None  # of `monitor.Board`: scalars and histograms
    trace: Any = None  # of `monitor.Trace`: of a few steps

    def model(self, model: nn.Module) -> nn.Module:
        """Returns a model that computes in the session's precision; its params stay as they are.

        Raises:
          ValueError: it has no field `dtype`.
        """
        if self.precision is None:
            return model
        if not hasattr(model, "dtype"):
            name = type(model).__name__
            raise ValueError(f"{name} has no field `dtype`, so it computes in its own precision")
        return model.clone(dtype=self.precision)


_CURRENT: contextvars.ContextVar[Session | None] = contextvars.ContextVar("session", default=None)


def current() -> Session:
    """Returns the session around the caller; by default one device, and nothing is kept."""
    return _CURRENT.get() or Session()


@contextlib.contextmanager
def use(session: Session):
    """Everything that trains within trains by this session."""
    token = _CURRENT.set(session)
    try:
        yield session
    finally:
        _CURRENT.reset(token)
