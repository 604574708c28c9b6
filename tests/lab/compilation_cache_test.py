import jax

from quantjax.lab import compilation_cache


def test_programs_are_kept_unless_told_of_another_place(tmp_path, monkeypatch):
    told = {"jax_compilation_cache_dir": None}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    compilation_cache.keep()  # the tests have a folder of their own
    assert told == {"jax_compilation_cache_dir": None}
    usual = jax.config.jax_compilation_cache_dir
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setattr(jax.config, "update", told.__setitem__)
        compilation_cache.keep()
    finally:
        monkeypatch.undo()
        jax.config.update("jax_compilation_cache_dir", usual)
    assert told["jax_compilation_cache_dir"].startswith(str(tmp_path / "quantjax"))
    assert told["jax_persistent_cache_min_compile_time_secs"] == 0
