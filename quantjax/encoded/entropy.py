"""Entropy coding of symbols, by the constriction library, and how small leaves become by it.

Constriction reads over damaged data in silence: check a digest before `decode`.
"""

import math
from typing import NamedTuple

import jax
import numpy as np

from quantjax.core import qarray

CODERS = ("ans", "huffman")
TABLE_SUM = 2**16 - 1  # of the frequencies of a table, about: each takes two bytes
CHUNK = 2**20  # symbols at once: int32 for the library, one or two bytes for what is kept
WORD = 4  # bytes of a word of a stream


def entropy(counts) -> float:
    """Returns the entropy of a distribution given as counts, in bits; 0 for no counts."""
    counts = np.asarray(counts, np.float64)
    share = counts[counts > 0] / max(counts.sum(), 1)
    return float(max(0.0, -np.sum(share * np.log2(share))))


def frequencies(counts) -> np.ndarray:
    """Returns the table of a coder: counts scaled to two bytes each, 1 at least for what occurs."""
    counts = np.asarray(counts, np.float64)
    scaled = np.rint(counts * min(1, TABLE_SUM / max(counts.sum(), 1)))
    return np.where(counts > 0, np.maximum(scaled, 1), 0).astype("<u2")


def encode(symbols, levels: int, coder: str = "ans") -> bytes:
    """Returns a table of frequencies, two bytes a level, and the stream of the symbols.

    Where only one symbol occurs the table says it all.

    Args:
      symbols: `[n]` integers in 0..levels-1.
      levels: size of the alphabet, at most 2**16.
      coder: "ans", or "huffman", which works symbol by symbol (3 million a second) and is hardly
        ever smaller.
    """
    table = frequencies(np.bincount(symbols, minlength=levels))
    occurring = np.flatnonzero(table)
    if occurring.size < 2:
        return table.tobytes()
    rank = np.zeros(levels, np.int32)  # among what occurs: the rest would take up probability
    rank[occurring] = np.arange(occurring.size)
    write = _ans if coder == "ans" else _huffman
    return table.tobytes() + write(rank[symbols], _weights(table))


def decode(data: bytes, levels: int, count: int, coder: str = "ans") -> np.ndarray:
    """Returns the symbols of a stream, uint8 or uint16 `[count]`.

    Args:
      data: what `encode` gives; compare its digest first.
      levels: size of the alphabet.
      count: of symbols.
      coder: as it was encoded.

    Raises:
      ValueError: the data are too short or too long for so many symbols.
    """
    table = np.frombuffer(data[: 2 * levels].ljust(2 * levels, b"\0"), "<u2")
    stream, occurring = data[2 * levels :], np.flatnonzero(table)
    if len(data) < 2 * levels or occurring.size < min(1, count):
        raise ValueError(f"{len(data)} bytes hold no table of {levels} frequencies")
    if occurring.size < 2 and stream:
        raise ValueError(f"{len(stream)} bytes follow the table of a single symbol")
    # The likeliest symbol's cost bounds what a stream can hold, before memory is taken for it.
    weights = _weights(table)
    least = count * math.log2(weights.sum() / weights.max()) if count else 0
    if least > 8 * (len(stream) + 2 * WORD):
        raise ValueError(f"{len(stream)} bytes cannot hold {count} symbols")
    names = occurring.astype(np.uint8 if levels <= 256 else np.uint16)
    if occurring.size < 2:
        return np.repeat(names[:1], count)
    symbols = np.empty(count, names.dtype)
    (_read_ans if coder == "ans" else _read_huffman)(stream, weights, symbols)
    return names[symbols]


def _weights(table):
    return table[table > 0].astype(np.float64)


def _library():
    try:
        import constriction
    except ImportError as error:
        raise ImportError('entropy coding takes: pip install "quantjax[files]"') from error
    return constriction


def _model(weights):
    return _library().stream.model.Categorical(weights, perfect=False)


def _ans(symbols, weights) -> bytes:
    coder, model = _library().stream.stack.AnsCoder(), _model(weights)
    for start in range((symbols.size - 1) // CHUNK * CHUNK, -1, -CHUNK):  # a stack: last first
        coder.encode_reverse(symbols[start : start + CHUNK], model)
    # The last word is not zero, its highest bytes may be: they are put back by the reader.
    return coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


def _read_ans(stream, weights, symbols):
    coder, model = _library().stream.stack.AnsCoder(_words(stream)), _model(weights)
    for start in range(0, symbols.size, CHUNK):
        part = symbols[start : start + CHUNK]
        part[:] = coder.decode(model, part.size)
    if not coder.is_empty():
        raise ValueError(f"{symbols.size} symbols leave a part of the stream unread")


def _huffman(symbols, weights) -> bytes:
    library = _library().symbol
    tree, queue = library.huffman.EncoderHuffmanTree(weights), library.QueueEncoder()
    for symbol in symbols.tolist():
        queue.encode_symbol(symbol, tree)
    words, bits = queue.get_compressed_and_bitrate()
    return words.astype("<u4").tobytes()[: math.ceil(bits / 8)]


def _read_huffman(stream, weights, symbols):
    library = _library().symbol
    tree, queue = library.huffman.DecoderHuffmanTree(weights), library.QueueDecoder(_words(stream))
    for i in range(symbols.size):
        symbols[i] = queue.decode_symbol(tree)


def _words(stream):
    return np.frombuffer(stream + bytes(-len(stream) % WORD), "<u4").astype(np.uint32)


def huffman_lengths(table) -> np.ndarray:
    """Returns the bits of every symbol's Huffman code; 0 for what does not occur."""
    library = _library().symbol
    lengths = np.zeros(table.size, np.int64)
    occurring = np.flatnonzero(table)
    if occurring.size < 2:
        return lengths
    tree = library.huffman.EncoderHuffmanTree(_weights(table))
    for rank, symbol in enumerate(occurring.tolist()):
        queue = library.QueueEncoder()
        queue.encode_symbol(rank, tree)
        lengths[symbol] = queue.get_compressed_and_bitrate()[1]
    return lengths


class CodeSize(NamedTuple):
    """Bits that the codes of a leaf take in a file, levels or steps apart."""

    symbols: int  # codes in the leaf
    fixed: float  # packed: all codes as wide as the widest, three levels five to a byte
    entropy: float  # symbols times the entropy of their distribution: a bound, not a size
    huffman: float  # with the table of frequencies; never below one bit a symbol
    ans: float  # with the table of frequencies and the final state


def code_size(leaf) -> CodeSize:
    """Returns what the codes of a Grid or a Table take up in a file, by kind of coder.

    Raises:
      ValueError: another leaf.
    """
    if not isinstance(leaf, qarray.Grid | qarray.Table):
        raise ValueError(f"a {type(leaf).__name__} has no codes to count")
    levels, symbols = qarray.alphabet(leaf), np.asarray(qarray.symbols(leaf)).ravel()
    counts = np.bincount(symbols, minlength=levels)
    table = frequencies(counts)
    bits = int(counts @ huffman_lengths(table))
    return CodeSize(
        symbols=symbols.size,
        fixed=8 * qarray.stream_bytes(symbols.size, levels),
        entropy=symbols.size * entropy(counts),
        huffman=8 * (table.nbytes + math.ceil(bits / 8)),
        ans=8 * len(encode(symbols, levels)),
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
    """Returns the compression of all Grid and Table leaves of a tree together, as a file has it.

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
