"""Classes made of a user's, of the same name, which pickle."""

import functools
from collections.abc import Callable


def derived(cls: type, remake: Callable, call: Callable | None) -> type:
    """Returns a class of `cls`'s name with another `__call__`.

    Args:
      cls: the class.
      remake: what made it of `cls`; a function of a module, so that instances pickle by its name.
      call: in the place of `cls.__call__`; None: as it is.
    """

    def reduce_ex(self, protocol):
        _, _, *rest = super(made, self).__reduce_ex__(protocol)
        return _unpickled, (remake, cls), *rest

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    if call is not None:
        names["__call__"] = functools.wraps(cls.__call__)(call)
    made = type(cls.__name__, (cls,), {**names, "__reduce_ex__": reduce_ex})
    return made


def _unpickled(remake, cls):
    made = remake(cls)
    return made.__new__(made)
