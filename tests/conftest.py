"""Strict numerics for every test, and eight simulated devices for the sharding laws."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def few_programs():
    """Empties jax's caches: beyond some thousand programs they evict, and none can be counted."""
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation():
    """Programs of tests about wiring, not numbers: most of their time would be the compiler's."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
