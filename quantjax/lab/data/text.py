"""Text in memory: windows of bytes, and the same windows one byte later."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

LENGTH = 64
FILES = ("train.txt", "test.txt")  # of a directory that holds a text


class Windows(NamedTuple):
    """Windows of a text, and the byte that follows each of theirs."""

    tokens: np.ndarray  # [n, length] uint8
    targets: np.ndarray  # [n, length] uint8: tokens one byte later


class Text(NamedTuple):
    """A training and a test split of a text; the classes are the values of a byte."""

    name: str
    train: Windows
    test: Windows
    classes: int = 256


def windows(where: str, content: bytes, stride: int, length: int = LENGTH) -> Windows:
    """Returns the windows of a text that start at 0, stride, 2 stride, ...

    What is left at the end is shorter than a window, and dropped. At a stride of `length` every
    byte before it but the first is a target once.

    Raises:
      ValueError: no window and its next byte fit into `content`; the message begins with `where`.
    """
    if len(content) <= length:
        raise ValueError(f"{where} has {len(content)} bytes, expected {length + 1} or more")
    values = np.frombuffer(content, np.uint8)
    longer = np.lib.stride_tricks.sliding_window_view(values, length + 1)[::stride]
    return Windows(longer[:, :-1].copy(), longer[:, 1:].copy())


def dataset(name: str, train: tuple[str, bytes], test: tuple[str, bytes]) -> Text:
    """Returns two texts, each given with what errors call it, as windows of `LENGTH`.

    Windows of the training text overlap by half, those of the test text not at all.

    Raises:
      ValueError: a text is shorter than a window and its next byte.
    """
    return Text(name, windows(*train, stride=LENGTH // 2), windows(*test, stride=LENGTH))


def load_directory(path: Path) -> Text:
    """Returns the text of a directory's train.txt and test.txt, whatever bytes they hold.

    Raises:
      FileNotFoundError: one of them is missing.
      ValueError: one of them is shorter than a window and its next byte.
    """
    missing = [file for file in FILES if not (path / file).is_file()]
    if missing:
        raise FileNotFoundError(f"{path} lacks {missing}; a text is {' and '.join(FILES)}")
    train, test = ((str(path / file), (path / file).read_bytes()) for file in FILES)
    return dataset(path.resolve().name, train, test)


def in_directory(path: Path) -> bool:
    """Returns whether there is a file of a text in a directory."""
    return any((path / file).is_file() for file in FILES)
