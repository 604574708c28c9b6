"""How small the symbols of encoded leaves can be made: entropy, and sizes to expect of coders.

The sizes are estimates: they count the bits that a coder of the kind writes for the codes of a
leaf, and what it must write beside them to be read again.
"""

import heapq
import math
from typing import NamedTuple

import jax
import numpy as np

from quantjax.core import qarray

LENGTH_BITS = 5  # of a code length in a canonical Huffman table
ANS_BITS = 12  # of a frequency: they sum to 2**12
STATE_BITS = 32  # of the state that an ANS stream ends with


class CodeSize(NamedTuple):
    """Bits of the codes of a leaf, levels or steps apart."""

    symbols: int  # codes in the leaf
    fixed: float  # all codes as wide as the widest
    entropy: float  # symbols times the entropy of their distribution
    huffman: float  # with the table of code lengths; never below one bit a symbol
    ans: float  # with the table of frequencies and the final state


def symbol_counts(leaf) -> np.ndarray:
    """Returns how often every code of a Grid or a Table occurs: 2**bits counts.

    Raises:
      ValueError: another leaf.
    """
    if not isinstance(leaf, qarray.Grid | qarray.Table):
        raise ValueError(f"a {type(leaf).__name__} has no codes to count")
    codes = np.asarray(leaf.codes).astype(np.int64).ravel()
    if isinstance(leaf, qarray.Grid):
        codes = codes + 2 ** (leaf.bits - 1)
    return np.bincount(codes, minlength=2**leaf.bits)


def entropy(counts) -> float:
    """Returns the entropy of a distribution given as counts, in bits; 0 for no counts."""
    counts = np.asarray(counts, np.float64)
    share = counts[counts > 0] / max(counts.sum(), 1)
    return float(max(0.0, -np.sum(share * np.log2(share))))


def huffman_lengths(counts) -> np.ndarray:
    """Returns the lengths of a Huffman code, in bits; 0 for what does not occur, 1 at least."""
    counts = np.asarray(counts)
    lengths = np.zeros(counts.size, np.int64)
    heap = [(int(count), i, (i,)) for i, count in enumerate(counts) if count]
    if len(heap) == 1:
        lengths[heap[0][2][0]] = 1
    heapq.heapify(heap)
    while len(heap) > 1:
        few, first, mine = heapq.heappop(heap)
        more, _, others = heapq.heappop(heap)
        lengths[list(mine + others)] += 1
        heapq.heappush(heap, (few + more, first, mine + others))
    return lengths


def ans_frequencies(counts, bits: int = ANS_BITS) -> np.ndarray:
    """Returns whole frequencies that sum to 2**bits, at least 1 for what occurs.

    Raises:
      ValueError: more symbols than frequencies.
    """
    counts = np.asarray(counts, np.float64)
    occurs = counts > 0
    total = 2**bits
    if np.count_nonzero(occurs) > total:
        raise ValueError(f"{np.count_nonzero(occurs)} symbols do not fit into 2**{bits}")
    if not occurs.any():
        return np.zeros(counts.size, np.int64)
    exact = counts / counts.sum() * total
    rounded = np.where(occurs, np.maximum(1, np.rint(exact)), 0).astype(np.int64)
    while (over := int(rounded.sum()) - total) != 0:
        # Where one step costs the least: n log2(f) changes by about n / f.
        step = -1 if over > 0 else 1
        cost = np.where(rounded + step >= 1, counts / np.maximum(rounded, 1), np.inf)
        cost = np.where(occurs, cost, np.inf if over > 0 else -np.inf)
        rounded[np.argmin(cost) if over > 0 else np.argmax(cost)] += step
    return rounded


def code_size(leaf) -> CodeSize:
    """Returns what the codes of a Grid or a Table take up, by kind of coder.

    Raises:
      ValueError: another leaf.
    """
    counts = symbol_counts(leaf)
    total, alphabet = int(counts.sum()), counts.size
    frequencies = ans_frequencies(counts, max(ANS_BITS, leaf.bits))
    occurs = counts > 0
    share = np.log2(frequencies[occurs] / max(frequencies.sum(), 1))
    return CodeSize(
        symbols=total,
        fixed=float(total * leaf.bits),
        entropy=total * entropy(counts),
        huffman=float(np.sum(counts * huffman_lengths(counts)) + LENGTH_BITS * alphabet),
        ans=float(-np.sum(counts[occurs] * share)) + ANS_BITS * alphabet + STATE_BITS,
    )


class Compression(NamedTuple):
    """How many times smaller than float32 the encoded leaves of a tree are, by kind of coder."""

    weights: int  # of the encoded leaves
    density: float  # share of codes that decode to other than zero
    fixed: float
    entropy: float
    huffman: float
    ans: float


def compression(encoded, *, tables: bool = True) -> Compression:
    """Returns the compression of all Grid and Table leaves of a tree together.

    Args:
      encoded: what `Quantizer.encode` gives; other leaves are left out.
      tables: counts the levels and steps, too.

    Raises:
      ValueError: no such leaf.
    """
    leaves = [
        leaf
        for leaf in jax.tree.leaves(encoded, is_leaf=qarray.is_encoded)
        if isinstance(leaf, qarray.Grid | qarray.Table)
    ]
    if not leaves:
        raise ValueError("no Grid and no Table among the leaves")
    sizes = [code_size(leaf) for leaf in leaves]
    weights = sum(size.symbols for size in sizes)
    kept = sum(int(np.count_nonzero(np.asarray(leaf.decode()))) for leaf in leaves)
    beside = sum(_bits_beside(leaf) for leaf in leaves) if tables else 0
    totals = [sum(getattr(size, name) for size in sizes) for name in CodeSize._fields[1:]]
    ratios = [32 * weights / total if (total := codes + beside) else math.inf for codes in totals]
    return Compression(weights, kept / weights, *ratios)


def _bits_beside(leaf) -> int:
    scales = leaf.step if isinstance(leaf, qarray.Grid) else leaf.levels
    return scales.size * scales.dtype.itemsize * 8
