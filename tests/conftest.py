"""Strict numerics for every test, and eight simulated devices for the sharding laws."""

import atexit
import os
import shutil
import tempfile

# Equal programs of different tests and processes compile once: half of the suite's time. Workers
# inherit the folder from the first process, which removes it; a folder of yours outlives the run.
CACHE = "JAX_COMPILATION_CACHE_DIR"
if CACHE not in os.environ:
    os.environ[CACHE] = tempfile.mkdtemp(prefix="quantjax-tests-")
    atexit.register(shutil.rmtree, os.environ[CACHE], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# A second run with other versions asks what compiles and what comes out, not how fast it is.
jax.config.update("jax_disable_most_optimizations", "QUANTJAX_QUICK" in os.environ)

from tests import quick  # noqa: E402


@pytest.fixture
def few_programs():
    """Empties jax's caches: beyond some thousand programs they evict, and none can be counted.

    Afterwards, too: a program may hold a constant that the test had changed.
    """
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation():
    """Programs of tests about wiring, not numbers: most of their time would be the compiler's."""
    with quick.compilation():
        yield


@pytest.fixture
def quick_programs():
    """As `quick_compilation`, for one test."""
    with quick.compilation():
        yield


@pytest.fixture
def usual_programs(quick_compilation):
    """For one test of such a module that compares numbers closely."""
    with quick.compilation({}):
        yield
