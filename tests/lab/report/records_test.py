import json
import re

import pytest

from quantjax.lab import recipe_version, recipes
from quantjax.lab.report import headline, records
from tests.lab.report import headline_test


def record(**changes):
    rows = [
        {"row": "held-out accuracy", "bits": 2, "of": {"10.0": 90.0}},
        {
            "row": "PSG",
            "bits": 2,
            "seed": 0,
            "low precision": 94.0,
            "paper": {"low precision": 60.8},
        },
        {
            "row": "PSG",
            "bits": 2,
            "seed": 1,
            "low precision": 96.0,
            "paper": {"low precision": 60.8},
        },
        {"row": "SGD", "bits": 2, "seed": 0, "low precision": 39.5},
    ]
    base = {
        "experiment": "toy",
        "title": "A toy",
        "command": "quantjax run toy",
        "scale": 1.0,
        "device": "cpu",
        "versions": {"jax": "0.10.2"},
        "complete": True,
        "seconds": 120.0,
        "rows": rows,
    }
    return base | changes


def test_mean_and_deviation_over_seeds_beside_the_paper():
    text = records.markdown([record()])
    assert "| PSG | 2 | 95.00 ± 1.41 | 60.8 |" in text
    assert "| SGD | 2 | 39.50 |  |" in text
    assert "held-out" not in text
    assert "2 seeds" in text
    assert "`quantjax run toy`" in text


def test_ranks_stand_below_the_table():
    rows = [*record()["rows"], {"bits": 2, "ranks": "PSG > SGD"}]
    text = records.markdown([record(rows=rows)])
    assert text.endswith("neighbours apart:\n\n- 2 bits: PSG > SGD")
    assert "McNemar" not in records.markdown([record()])


def test_rows_without_a_width():
    rows = [{"row": "pruned", "seed": 0, "sparse": 99.5}]
    text = records.markdown([record(rows=rows)])
    assert "|  | sparse |" in text  # no empty column
    assert "| pruned | 99.50 |" in text
    rows.append({"row": "FQ", "seed": 0, "bits": 5, "sparse": 99.0})
    text = records.markdown([record(rows=rows)])
    assert "|  | bits | sparse |" in text
    assert "| pruned |  | 99.50 |" in text


def test_shortened_and_interrupted_runs_say_so():
    text = records.markdown([record(scale=0.1, complete=False)])
    assert "**every phase shortened to 0.1 of the recipe's**" in text
    assert "**interrupted**" in text


@pytest.mark.parametrize(
    ("name", "whose"),
    [
        ("psg_table_a1", "paper's"),
        ("srq_table3", "paper's"),
        ("psg_mnist", "recipe's"),
        ("fq_mnist_a7", "recipe's"),  # the comparison of a table, at no paper's size
    ],
)
def test_a_schedule_is_the_papers_where_the_recipe_follows_a_table(name, whose):
    text = records.markdown([record(experiment=name, scale=0.5)])
    assert f"**every phase shortened to 0.5 of the {whose}**" in text


def test_show_replaces_the_section_and_nothing_else(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="quantjax run"):
        records.show(None, folder)
    (folder / "toy.json").write_text(json.dumps(record()))
    page = tmp_path / "RESULTS.md"
    page.write_text(f"before\n{records.BEGIN}\nold\n{records.END}\nafter\n")
    for _ in range(2):
        records.show(page, folder)
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "old" not in text
        assert text.count("A toy") == 1


def test_show_replaces_the_sections_that_a_file_has(tmp_path):
    (tmp_path / "compare").mkdir()
    (tmp_path / "toy.json").write_text(json.dumps(record()))
    (tmp_path / "compare" / "results.json").write_text(json.dumps(headline_test.record()))
    page = tmp_path / "page.md"
    comparison = f"{headline.BEGIN}\n{headline.markdown(headline_test.record())}\n{records.END}\n"
    results = f"<!-- results: -->\n{records.markdown([record()])}\n{records.END}\n"
    for expected in (f"before\n{comparison}after\n", f"{results}between\n{comparison}after\n"):
        page.write_text(re.sub(r"(<!-- \w+: .*-->\n).*?(?=<!-- end)", r"\1", expected, flags=re.S))
        assert page.read_text() != expected
        for _ in range(2):
            records.show(page, tmp_path)
            assert page.read_text() == expected


def test_a_file_without_a_whole_section_is_refused(tmp_path):
    (tmp_path / "toy.json").write_text(json.dumps(record()))
    page = tmp_path / "page.md"
    page.write_text("no section")
    with pytest.raises(ValueError, match=r"no results section.* and no comparison section"):
        records.show(page, tmp_path)
    for text in (records.BEGIN, f"{records.BEGIN}\n{headline.BEGIN}\n{records.END}"):
        page.write_text(f"{text}\n")
        with pytest.raises(ValueError, match="a section has no end: <!-- results"):
            records.show(page, tmp_path)
        assert page.read_text() == f"{text}\n"
    page.write_text(f"{headline.BEGIN}\n{records.END}\n")
    with pytest.raises(FileNotFoundError, match="no comparison in"):
        records.show(page, tmp_path)


def test_a_record_of_another_version_of_its_recipe_says_so():
    source = recipes.known_recipes()["psg_mnist"]
    mine = record(experiment="psg_mnist", recipe=recipe_version.digest(source))
    assert "another version" not in records.markdown([mine])
    other = {**mine, "recipe": "0123456789ab"}
    assert "**made by another version of the recipe**" in records.markdown([other])
    assert "another version" not in records.markdown([{**other, "experiment": "of a user"}])


@pytest.mark.parametrize(
    ("content", "told"),
    [("{", "Expecting"), ("[]", "it lacks experiment"), ('{"title": "x"}', "it lacks experiment")],
)
def test_a_file_that_is_no_record_is_named(tmp_path, content, told):
    (tmp_path / "broken.json").write_text(content)
    with pytest.raises(ValueError, match=f"broken.json is no record: {told}"):
        records.load(tmp_path)
