"""Programs that run once or twice: compiling them well would take longer than running them."""

import functools

import jax

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
