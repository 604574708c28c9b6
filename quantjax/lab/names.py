"""Errors for unknown names, with the nearest known ones."""

import difflib
from collections.abc import Iterable


def nearest_name_error(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """Returns the error to raise for an unknown name: `raise nearest_name_error("model", ...)`.

    It names up to three near names, and all of them where none is near or they are few.
    """
    known = sorted(set(known))
    near = difflib.get_close_matches(str(name).lower(), known, n=3)
    message = f"unknown {kind} {name!r}"
    if near:
        message += f"; did you mean {' or '.join(map(repr, near))}?"
    if not near or len(known) <= 20:
        message += f"; known: {', '.join(known)}"
    return ValueError(message)
