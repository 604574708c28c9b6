"""Which version of a recipe a record was made with."""

import ast
import hashlib
import io
import re
import tokenize
from pathlib import Path

NOTHING = {tokenize.COMMENT, tokenize.NL}
BETWEEN = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}  # statements


def digest(path: Path) -> str:
    """Returns 12 hexadecimal digits of what a recipe does.

    Its file counts, and those of its `experiments` package that it imports, directly or not;
    comments, docstrings and layout do not. The library's own version is told beside it.
    """
    package = next((p for p in path.resolve().parents if p.name == "experiments"), None)
    found, todo = {}, [path.resolve()]
    while todo:
        file = todo.pop()
        if file not in found:
            source = file.read_text()
            found[file] = _code(source)
            todo += _imported(source, package) if package else []
    told = "\n".join(f"{file.stem} {code}" for file, code in sorted(found.items()))
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def _code(source: str) -> str:
    """Returns the code without comments, docstrings and white space, equal for all Pythons."""
    kept, last = [], tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in NOTHING:
            continue
        docstring = token.type == tokenize.STRING and last in BETWEEN
        if token.type not in BETWEEN and not docstring:
            kept.append(token.string)
        last = token.type
    return re.sub(r"\s", "", "".join(kept))


def _imported(source: str, package: Path) -> list[Path]:
    """Returns the files that `from experiments.psg import protocol` and the like name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("experiments."):
            place = package.joinpath(*node.module.split(".")[1:])
            files = [place.with_suffix(".py"), *(place / f"{n.name}.py" for n in node.names)]
            found += [file for file in files if file.is_file()]
    return found
