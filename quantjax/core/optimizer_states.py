"""The state of one transformation within an optimizer's, however it is chained or partitioned."""

import jax


def only(opt_state, kind: type, name: str):
    """Returns the one part of an optimizer's state that is of a type.

    Args:
      opt_state: any tree.
      kind: the type of the state, a NamedTuple.
      name: of the transformation, for messages.

    Raises:
      ValueError: there is none, or more than one.
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    found = [leaf for leaf in leaves if isinstance(leaf, kind)]
    if len(found) != 1:
        raise ValueError(f"expected the state of one {name} in the optimizer's, found {len(found)}")
    return found[0]
