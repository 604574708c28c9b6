"""Compiled programs are kept on disk, so that the same command compiles nothing a second time."""

import hashlib
import os
import platform
from pathlib import Path


def keep():
    """Makes JAX keep its programs in the user's cache, unless it is told of another place."""
    import jax

    if jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR, or set by the caller
        return
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(Path(cache) / "quantjax" / _machine()))
    # Small programs, too: there are hundreds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_compilation_cache_max_size", 2 << 30)


def _machine() -> str:
    """Returns a name for processors of one kind: programs of another may not run here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    except OSError:
        told = [platform.processor()]
    return hashlib.sha256("".join([platform.machine(), *told]).encode()).hexdigest()[:12]
