"""Programs that run once or twice: compiling them well would take longer than running them."""

import contextlib
import functools
from unittest import mock

import jax
from jax._src import compiler  # its options of all programs are an interface of no other module


def _known(name, value):
    try:
        jax.jit(lambda: 0, compiler_options={name: value})()
    except jax.errors.JaxRuntimeError:  # another version's, or another device's
        return False
    return True


OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
OPTIONS = {name: value for name, value in OPTIONS.items() if _known(name, value)}
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())  # XLA_FLAGS

jit = functools.partial(jax.jit, compiler_options=OPTIONS)


_usual = compiler.get_compile_options


@contextlib.contextmanager
def compilation(options=OPTIONS):
    """All that is compiled inside, operations outside of jit, too; without options as usual.

    The switch that jax has leaves out the emitters of fusions, which are half of the time.
    """

    def chosen(*args, env_options_overrides=None, **kwargs):
        overrides = options | dict(env_options_overrides or {})
        return _usual(*args, env_options_overrides=overrides, **kwargs)

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", bool(options))
    try:
        with mock.patch.object(compiler, "get_compile_options", chosen):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
