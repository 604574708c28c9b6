"""The table of recorded results: `quantjax results`, and the README's section that it writes."""

import json
from pathlib import Path

import numpy as np

from quantjax.lab import recipe_version, recipes

BEGIN, END = "<!-- results: written by `quantjax results --write README.md` -->", "<!-- end -->"
KEYS = ("experiment", "title", "command", "scale", "device", "versions", "complete", "rows")
COLUMNS = (
    *("average bits", "full precision", "low precision", "re-estimated", "accuracy", "sparse"),
    *("error", "KB", "file KB", "widths", "MSE"),
)


def show(write: Path | None = None, folder: Path = recipes.FOLDER / "results"):
    """Prints the records of a folder as Markdown, or writes them into a file's results section.

    Raises:
      FileNotFoundError: no records; ValueError: the file has no results section.
    """
    text = markdown(load(folder))
    if write is None:
        print(text)
    else:
        write.write_text(replaced(write.read_text(), text))
        print(f"wrote {write}")


def load(folder: Path) -> list[dict]:
    """Returns the records in a folder, sorted by file name.

    Raises:
      FileNotFoundError: there are none; ValueError: a file is no record.
    """
    records = [_read(path) for path in sorted(folder.glob("*.json"))]
    if not records:
        raise FileNotFoundError(f"no records in {folder}: run `quantjax run EXPERIMENT` first")
    return records


def _read(path: Path) -> dict:
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no record: {error}") from None
    lacking = [name for name in KEYS if name not in record] if isinstance(record, dict) else KEYS
    if lacking:
        raise ValueError(f"{path} is no record: it lacks {', '.join(lacking)}")
    return record


def replaced(page: str, text: str) -> str:
    """Returns the page with the text between its two results marks.

    Raises:
      ValueError: a mark is missing.
    """
    if BEGIN not in page or END not in page:
        raise ValueError(f"the file has no results section: {BEGIN} ... {END}")
    before, rest = page.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}"


def markdown(records: list[dict]) -> str:
    """Returns a table per record: mean and deviation over seeds, the paper's numbers below ours."""
    sources = recipes.known_recipes()
    return "\n\n".join(_section(record, sources.get(record["experiment"])) for record in records)


def _section(record: dict, source: Path | None) -> str:
    groups = {}
    for row in record["rows"]:
        if any(name in row for name in COLUMNS) and "seed" in row:
            key = (row["row"], row.get("bits", row.get("sparsity")))
            groups.setdefault(key, []).append(row)
    used = [name for name in COLUMNS if any(name in row for g in groups.values() for row in g)]
    width = "sparsity" if any("sparsity" in g[0] for g in groups.values()) else "bits"
    with_paper = any("paper" in g[0] for g in groups.values())
    sized = [width] if any(size is not None for _, size in groups) else []
    header = ["", *sized, *used, *(["paper"] if with_paper else [])]
    lines = [header, ["---"] * len(header)]
    for (name, size), rows in groups.items():
        cells = [_mean([row[column] for row in rows if column in row]) for column in used]
        paper = rows[0].get("paper", {})
        told = [" / ".join(f"{paper[c]:g}" for c in used if c in paper)] if with_paper else []
        size = ["" if size is None else f"{size:g}"] if sized else []
        lines.append([name, *size, *cells, *told])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    seeds = len({row["seed"] for rows in groups.values() for row in rows})
    notes = [
        f"{seeds} seed{'s' if seeds > 1 else ''}",
        record["device"],
        f"jax {record['versions']['jax']}",
        f"{record.get('seconds', 0) / 60:.0f} min",
    ]
    if record["scale"] != 1:
        # Recipes that follow a table are named after it: psg_table_a1, srq_table3.
        whose = "paper" if "_table" in record["experiment"] else "recipe"
        notes.insert(0, f"**every phase shortened to {record['scale']:g} of the {whose}'s**")
    if _is_of_another_version(record, source):
        notes.insert(0, "**made by another version of the recipe**")
    if not record["complete"]:
        notes.insert(0, "**interrupted**")
    return f"**{record['title']}**\n{', '.join(notes)}: `{record['command']}`\n\n{table}"


def _is_of_another_version(record: dict, source: Path | None) -> bool:
    """True where the recipe is here and does something else; old records do not say."""
    made_by = record.get("recipe")
    return None not in (source, made_by) and made_by != recipe_version.digest(source)


def _mean(values: list) -> str:
    if not values:
        return ""
    if isinstance(values[0], str):
        return ", ".join(dict.fromkeys(values))
    digits = 2 if max(map(abs, values)) >= 1 else 3
    deviation = f" ± {np.std(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"
