"""Leaves by path: the names that decide what is a weight, and one random key per leaf."""

import re
import zlib
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

WEIGHT_NAMES = ("kernel", "embedding")


def path_name(key_path) -> str:
    """Returns a `jax.tree_util` key path as `Conv_0/kernel`, without NNX's trailing `value`."""
    parts = [jax.tree_util.keystr((key,), simple=True) for key in key_path]
    if len(parts) > 1 and parts[-1] == "value":
        parts.pop()
    return "/".join(parts)


def flatten(tree, is_leaf: Callable | None = None) -> tuple[dict, Callable]:
    """Returns `{path: leaf}` and the function that rebuilds the tree from such a dict.

    Args:
      tree: any pytree.
      is_leaf: as in `jax.tree.flatten`.

    Raises:
      ValueError: two leaves have one path.
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    paths = [path_name(key_path) for key_path, _ in pairs]
    if len(set(paths)) < len(paths):
        twice = sorted({path for path in paths if paths.count(path) > 1})
        raise ValueError(f"several leaves have the same path: {twice}")
    flat = dict(zip(paths, (leaf for _, leaf in pairs), strict=True))
    return flat, lambda leaves: treedef.unflatten([leaves[path] for path in paths])


def leaf_key(key, path: str):
    """Returns the leaf's own key: the same for the same path, whatever else the tree holds."""
    return None if key is None else jax.random.fold_in(key, zlib.crc32(path.encode()))


def leaf_keys(key, paths: Iterable[str]) -> dict:
    """Returns `{path: leaf_key(key, path)}`; compiles one program however many paths there are."""
    paths = list(paths)
    if key is None:
        return dict.fromkeys(paths)
    numbers = np.asarray([zlib.crc32(path.encode()) for path in paths], np.uint32)
    return dict(zip(paths, jax.vmap(jax.random.fold_in, (None, 0))(key, numbers), strict=True))


def role(path: str) -> str:
    """Returns the last part of a path, which says what the leaf is: `kernel`, `bias`, ..."""
    return path.rsplit("/", 1)[-1]


def is_weight(path: str) -> bool:
    """True for paths that end in `kernel` or `embedding`."""
    return role(path) in WEIGHT_NAMES


def matches(pattern: str, path: str) -> bool:
    """True if the regex matches from the start of `path` up to a `/` or its end."""
    return re.match(rf"(?:{pattern})(?=/|$)", path) is not None


def check_patterns(patterns: Iterable[str]):
    """Raises ValueError for a pattern that is no regex."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is no regex: {error}") from None


def assign(patterns: Iterable[str], paths: Iterable[str]) -> dict[str, list[str]]:
    """Gives each path to the first pattern that matches it.

    Raises:
      ValueError: a pattern matches nothing, or only what earlier patterns took.
    """
    paths, patterns = list(paths), list(patterns)
    taken = {pattern: [] for pattern in patterns}
    for path in paths:
        first = first_match(patterns, path)
        if first is not None:
            taken[first].append(path)
    for pattern, mine in taken.items():
        if mine:
            continue
        if any(matches(pattern, path) for path in paths):
            raise ValueError(f"pattern {pattern!r} is shadowed by the patterns before it: {paths}")
        raise ValueError(
            f"pattern {pattern!r} matches no path; a match must end at a '/' or at "
            f"the end of the path. Paths: {paths}"
        )
    return taken


def first_match(patterns: Iterable[str], path: str) -> str | None:
    """Returns the first pattern that matches `path`, or None."""
    return next((pattern for pattern in patterns if matches(pattern, path)), None)


def restrict(flat: Mapping, paths: Iterable[str], what: str = "state") -> dict:
    """Returns the leaves at `paths`.

    Raises:
      ValueError: the tree lacks some of them.
    """
    missing = [path for path in paths if path not in flat]
    if missing:
        raise ValueError(f"the {what} was made for another tree: {missing} not among {list(flat)}")
    return {path: flat[path] for path in paths}
