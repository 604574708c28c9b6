"""The records as tables: `quantjax results`, and the sections of files that it writes."""

import json
import re
from pathlib import Path

import numpy as np

from quantjax.lab import recipe_version, recipes
from quantjax.lab.report import headline

BEGIN = "<!-- results: written by `quantjax results --write experiments/RESULTS.md` -->"
END = "<!-- end -->"
MARK = re.compile(r"<!-- (results|comparison): .*-->\n")  # that begins a section
RANKS = (
    "`>` where McNemar's test over the test examples of all seeds, at 5 percent, "
    "tells neighbours apart:\n"
)
KEYS = ("experiment", "title", "command", "scale", "device", "versions", "complete", "rows")
COLUMNS = (
    *("average bits", "full precision", "low precision", "re-estimated", "accuracy", "sparse"),
    *("error", "KB", "file KB", "widths", "MSE", "setting"),
)


def show(write: Path | None = None, folder: Path = recipes.FOLDER / "results"):
    """Prints the records of a folder as Markdown, or writes them into the sections of a file.

    Raises:
      As `updated`.
    """
    if write is None:
        print(markdown(load(folder)))
    else:
        write.write_text(updated(write.read_text(), folder))
        print(f"wrote {write}")


def updated(page: str, folder: Path) -> str:
    """Returns a page whose sections of results and of the comparison are those of the records.

    Raises:
      FileNotFoundError: no records for a section; ValueError: the page has neither section, one
      without its end, or a file is no record.
    """
    marks = list(MARK.finditer(page))
    if not marks:
        raise ValueError(
            f"the file has no results section, {BEGIN} ... {END}, and no comparison section, "
            f"{headline.BEGIN} ... {END}"
        )
    texts = {
        "results": lambda: markdown(load(folder)),
        "comparison": lambda: headline.markdown(headline.load(folder)),
    }
    out = page[: marks[0].start()]
    ends = [*(mark.start() for mark in marks[1:]), len(page)]
    for mark, end in zip(marks, ends, strict=True):
        _, found, after = page[mark.end() : end].partition(END)
        if not found:
            raise ValueError(f"a section has no end: {mark[0].strip()} ... {END}")
        out += f"{mark[0]}{texts[mark[1]]()}\n{END}{after}"
    return out


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
    text = f"**{record['title']}**\n{', '.join(notes)}: `{record['command']}`\n\n{table}"
    ranks = [f"- {row['bits']:g} bits: {row['ranks']}" for row in record["rows"] if "ranks" in row]
    return "\n".join([text, "", RANKS, *ranks]) if ranks else text


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
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"
