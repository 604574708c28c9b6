"""Recipes: short files in `experiments/`, a folder per paper, and the records they leave."""

import ast
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax

from quantjax.core import qarray
from quantjax.encoded import storage
from quantjax.lab import data, interrupts, recipe_version
from quantjax.lab.names import nearest_name_error
from quantjax.lab.train.options import Options

CHECKOUT = Path(__file__).parents[2] / "experiments"
# An installed wheel has no recipes of its own: those of a checkout that one stands in.
FOLDER = CHECKOUT if CHECKOUT.is_dir() else Path.cwd() / "experiments"
WHERE = (
    "recipes lie in the folder experiments/ of quantjax's repository, which an installed wheel "
    "lacks: run this in a clone of it, or give the path of a recipe"
)


@dataclasses.dataclass(frozen=True)
class Context:
    """What a recipe is given: `run(context)` yields its rows as dicts."""

    scale: float = 1.0
    """Length of every phase in proportion to the recipe's."""
    seeds: tuple[int, ...] = (0,)
    """One run each."""
    bits: tuple[int, ...] | None = None
    """Only these widths; None: all of the recipe's."""
    data_dir: Path | None = None
    """Where prepared TFDS sets lie."""
    init: Path | None = None
    """A torch state dict (.npz, .safetensors) to start from, where a recipe takes one."""
    limit: int | None = None
    """At most so many training images and test images, drawn by a fixed seed."""

    def load(self, dataset: str) -> data.Dataset | data.Text:
        """Returns a data set, at most `limit` examples of each split; see `data.load`."""
        return data.limited(data.load(dataset, self.data_dir), self.limit)

    def steps(self, epochs: float, per_epoch: int) -> int:
        """Returns the scaled number of steps, at least 1."""
        return max(1, round(self.scale * epochs * per_epoch))

    def widths(self, every: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the recipe's widths that were asked for; raises ValueError if there are none."""
        chosen = tuple(bits for bits in every if self.bits is None or bits in self.bits)
        if not chosen:
            raise ValueError(f"bits {self.bits}: this recipe has {every}")
        return chosen


class Network(NamedTuple):
    """What a row may hold under "file": it is saved; the record keeps the file's name and size."""

    tree: dict  # {"params": encoded, ...}
    metadata: dict  # model and dataset, for `quantjax evaluate`
    floats: str | None = None  # of `save`

    def loaded(self) -> dict:
        """Returns the tree, decoded, as a file gives it back: what is to be evaluated."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network"
            storage.save(path, self.tree, metadata=self.metadata, floats=self.floats)
            return qarray.decode(storage.load(path))


def find(name: str, folder: Path = FOLDER) -> Path:
    """Returns the file of a recipe, by name or path; ValueError with the nearest names if none."""
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        return path
    known = known_recipes(folder)
    if not known:
        raise ValueError(f"unknown experiment {name!r}: {WHERE}")
    if name not in known:
        raise nearest_name_error("experiment", name, known)
    return known[name]


def known_recipes(folder: Path = FOLDER) -> dict[str, Path]:
    """Returns {name: file}: `psg/table_a1.py` is `psg_table_a1`; no TITLE, no recipe."""
    files = [file for file in folder.glob("*/*.py") if title(file) is not None]
    return {f"{file.parent.name}_{file.stem}": file for file in sorted(files)}


def name_of(path: Path, folder: Path = FOLDER) -> str:
    """Returns the name of a recipe's file; that of a file elsewhere is its stem."""
    return next((name for name, file in known_recipes(folder).items() if file == path), path.stem)


def title(path: Path) -> str | None:
    """Returns the TITLE of a recipe's file, which is not run; None where it has none."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "TITLE":
            return ast.literal_eval(node.value)
    return None


def load(path: Path) -> ModuleType:
    """Imports a recipe; raises ValueError if it has no TITLE or no `run`."""
    if str(FOLDER.parent) not in sys.path:  # recipes share code as `experiments.psg.protocol`
        sys.path.append(str(FOLDER.parent))
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for wanted in ("TITLE", "run"):
        if not hasattr(module, wanted):
            raise ValueError(f"{path} is no recipe: it lacks {wanted}")
    return module


def run(name: str, context: Context, folder: Path, options: Options = Options()) -> Path:  # noqa: B008
    """Runs a recipe and returns its record in `folder`, which is written anew after every row.

    Checkpoints lie beside the record until it is complete.

    Raises:
      ValueError: unknown recipe, scale or limit not positive, no seed, or as `Options.session`;
        OSError: the record cannot be written.
    """
    if not context.scale > 0:
        raise ValueError(f"scale must be positive, got {context.scale}")
    if not context.seeds:
        raise ValueError("seeds must name at least one seed")
    if context.limit is not None and context.limit < 1:
        raise ValueError(f"limit must be at least 1, got {context.limit}")
    source = find(name)
    recipe = load(source)
    check_writable(folder)
    name = name_of(source)
    target = folder / f"{name}{_suffix(context, options)}.json"
    given = json.loads(json.dumps(dataclasses.asdict(context), default=str))
    about = {"experiment": name, "recipe": recipe_version.digest(source), **given}
    del about["data_dir"]  # it may have moved
    with options.session(folder / "checkpoints" / target.stem, about, versions()):
        record = {
            "experiment": name,
            "title": recipe.TITLE,
            "command": _command(name, context, options),
            "scale": context.scale,
            "device": jax.devices()[0].device_kind,
            "versions": versions(),
            "recipe": about["recipe"],
            "complete": False,
            "rows": [],
        }
        began = time.monotonic() - (_spent(target) if options.resume else 0)
        for row in recipe.run(context):
            if jax.process_index():
                continue
            row = _saved(row, folder / "networks", target.stem)
            record["rows"].append(row)
            record["seconds"] = round(time.monotonic() - began, 1)
            _write(target, record)
            interrupts.tell(f"{target} holds {len(record['rows'])} finished rows")
            print(json.dumps(row), file=sys.stderr, flush=True)
        record["complete"] = True
        if not jax.process_index():
            _write(target, record)
    return target


def _spent(record: Path) -> float:
    """Returns the seconds that an interrupted record has taken."""
    try:
        return float(json.loads(record.read_text()).get("seconds", 0))
    except (OSError, ValueError):
        return 0.0


def _saved(row: dict, folder: Path, record: str) -> dict:
    """Saves a row's network, if any; returns the row with the file's name and kilobytes."""
    network = row.get("file")
    if not isinstance(network, Network):
        return row
    row = {key: value for key, value in row.items() if key != "file"}
    told = [record, *(str(row[key]) for key in ("row", "bits", "sparsity") if key in row)]
    name = re.sub("[^a-z0-9.]+", "-", " ".join([*told, f"seed{row.get('seed', 0)}"]).lower())
    path = folder / f"{name}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        **network.metadata,
        **{k: v for k, v in row.items() if isinstance(v, str | int | float)},
    }
    storage.save(path, network.tree, metadata=told, floats=network.floats)
    return row | {"file KB": round(path.stat().st_size / 1000, 2), "file": path.name}


def check_writable(folder: Path):
    """Makes the folder; raises OSError if it cannot be written to."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe-{os.getpid()}"
    probe.write_text("")
    probe.unlink()


def versions() -> dict[str, str]:
    """Returns the versions that results depend on."""
    names = ("quantjax", "jax", "jaxlib", "flax", "optax", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _suffix(context: Context, options: Options) -> str:
    """Returns what tells records apart: everything that was not left as it is by default."""
    told = "" if context.bits is None else "-b" + "".join(map(str, context.bits))
    told += "" if context.seeds == (0,) else "-s" + "-".join(map(str, context.seeds))
    told += "" if context.scale == 1 else f"-scale{context.scale:g}"
    told += "" if context.limit is None else f"-limit{context.limit}"
    told += "".join(f"-{value}" for value in options.about.values())
    return told + ("" if context.init is None else f"-{context.init.stem}")


def _command(name: str, context: Context, options: Options) -> str:
    words = ["quantjax run", name]
    if context.scale != 1:
        words.append(f"--scale {context.scale:g}")
    if context.seeds != (0,):
        words.append("--seeds " + " ".join(map(str, context.seeds)))
    if context.bits is not None:
        words.append("--bits " + " ".join(map(str, context.bits)))
    if context.data_dir is not None:
        words.append("--data-dir DATA_DIR")
    if context.init is not None:
        words.append(f"--init {context.init.name}")
    if context.limit is not None:
        words.append(f"--limit {context.limit}")
    words += [f"--{name.replace('_', '-')} {value}" for name, value in options.about.items()]
    return " ".join(words)


def _write(path: Path, record: dict[str, Any]):
    storage.replace(path, f"{json.dumps(record, indent=1)}\n".encode())


def benchmark(name: str, numbers: dict, write: bool):
    """Prints what a benchmark measured, and with `write` keeps it as the record of that name."""
    record = {**numbers, "device": jax.devices()[0].device_kind, "versions": versions()}
    text = json.dumps(record, indent=1)
    print(text)
    if write:
        folder = FOLDER / "results" / "benchmarks"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(text + "\n")
