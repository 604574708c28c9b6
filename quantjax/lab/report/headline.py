"""The README's table of the default comparison, from the record that `quantjax compare` writes."""

import json
from collections.abc import Mapping
from pathlib import Path

BEGIN = "<!-- comparison: written by `quantjax results --write README.md` -->"
FILE = Path("compare", "results.json")  # in the folder of records
KEYS = ("settings", "complete", "results")
SETTINGS = ("dataset", "model", "seeds", "epochs", "versions", "device", "command")
ROW = ("title", "start", "bits", "inputs", "quantized", "quantized_spread", "nbytes", "best")
NONE = "–"  # noqa: RUF001


def load(folder: Path) -> dict:
    """Returns the comparison in a folder of records.

    Raises:
      FileNotFoundError: there is none; ValueError: the file is no record of a comparison.
    """
    path = folder / FILE
    if not path.exists():
        raise FileNotFoundError(
            f"no comparison in {folder}: run `quantjax compare --out {path.parent}` first"
        )
    try:
        record = json.loads(path.read_text())
        _check(record)
    except ValueError as error:
        raise ValueError(f"{path} is no record of a comparison: {error}") from None
    return record


def markdown(record: dict) -> str:
    """Returns the table of a comparison, and a line that says what was compared, where and how.

    Args:
      record: what results.json holds.

    Raises:
      ValueError: something that is told here is not in the record.
    """
    _check(record)
    rows = record["results"]
    metric = record.get("metric", "accuracy")
    heading, digits = ("accuracy, %", 2) if metric == "accuracy" else (metric, 3)
    whole = all(float(row["bits"]).is_integer() for row in rows)
    with_inputs = any(row["inputs"] is not None for row in rows)
    inputs_too = ["inputs"] if with_inputs else []
    header = ["method", "starts from", "bits", *inputs_too, heading, "size, kB"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        inputs = NONE if row["inputs"] is None else f"{row['inputs']}"
        lines.append(
            [
                row["title"].replace("|", r"\|"),
                NONE if row["start"] == "none" else row["start"],
                f"{row['bits']:{'g' if whole else '.2f'}}",
                *([inputs] if with_inputs else []),
                _quantized(row, digits),
                f"{row['nbytes'] / 1000:.1f}",
            ]
        )
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n{_made(record)}"


def _check(record):
    """Raises ValueError where something is missing."""
    if not isinstance(record, dict) or not all(name in record for name in KEYS):
        raise ValueError(f"it lacks one of {', '.join(KEYS)}")
    if not record["results"]:
        raise ValueError("it has no rows")
    parts = [(record["settings"], SETTINGS), *((row, ROW) for row in record["results"])]
    for part, names in parts:
        lacking = [n for n in names if n not in part] if isinstance(part, dict) else names
        if lacking:
            raise ValueError(f"it lacks {', '.join(lacking)}")


def _quantized(row, digits):
    if row["quantized"] is None:
        return NONE
    spread = row["quantized_spread"]
    told = f"{row['quantized']:.{digits}f}"
    told += "" if spread is None else f" ± {spread:.{digits}f}"
    return f"**{told}**" if row["best"] else told


def _made(record):
    """Returns model, data set, seeds, epochs, versions, device and command, comma separated."""
    settings = record["settings"]
    versions = settings["versions"]
    if isinstance(versions, Mapping):
        versions = ", ".join(f"{name} {version}" for name, version in versions.items())
    notes = [
        f"{settings['model']} on {settings['dataset']}",
        _counted(len(settings["seeds"]), "seed"),
        _counted(settings["epochs"], "epoch"),
        versions,
        settings["device"],
    ]
    if not record["complete"]:
        notes.insert(0, "**interrupted**")
    command = f": `{settings['command']}`" if settings["command"] else ""
    return f"{', '.join(notes)}{command}"


def _counted(count, what):
    return f"{count} {what}{'s' if count > 1 else ''}"
