"""Programs that run once or twice: compiling them well would take longer than running them."""

import functools

import jax

OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def _known(name, value):
    try:
        jax.jit(lambda: 0, compiler_options={name: value})()
    except jax.errors.JaxRuntimeError:  # another version's, or another device's
        return False
    return True


jit = functools.partial(
    jax.jit,
    compiler_options={name: value for name, value in OPTIONS.items() if _known(name, value)},
)
