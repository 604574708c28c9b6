"""`quantjax list` names everything, each with a line."""

import io

from rich.console import Console

from quantjax.lab import listing, methods, models, recipes


def shown(data_dir=None):
    file = io.StringIO()
    listing.show(data_dir, Console(file=file, width=200))
    return file.getvalue()


def told(text):
    """Returns {name: line} of what stands indented."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("  ")]
    return {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in lines}


def test_every_name_has_a_line():
    found = told(shown())
    for name in [*methods.METHODS, *models.MODELS, *recipes.known_recipes(), "digits"]:
        assert found[name], name
    assert found["lsq"] == "LSQ; 2 to 8 bits; by default"
    assert found["binary"] == "binary; 1 bit"
    assert found["pruned"] == "pruned; float weights"
    assert found["resnet32"].endswith("Depth 32.")
    assert found["psg_table_a1"] == "PSG, table A1: ResNet-32, CIFAR-100, weights only"


def test_prepared_sets_are_listed(tmp_path):
    folder = tmp_path / "mine" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    assert told(shown(tmp_path))["mine"].startswith("Prepared in ")


def test_without_recipes_it_says_where_they_are(monkeypatch):
    monkeypatch.setattr(recipes, "known_recipes", dict)
    assert "in a clone of it" in shown()
