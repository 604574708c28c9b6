import pytest

from quantjax.lab import recipe_version, recipes

RECIPE = '''"""A docstring."""

from experiments.mine import protocol

RATE = 0.1  # why


def run(context):
    """Yields a row."""
    name = f"rate {RATE:g}"
    yield {"row": name, "of": protocol.train(context)}
'''
PROTOCOL = "def train(context):\n    return context.steps(2, 10)\n"


@pytest.fixture
def recipe(tmp_path):
    folder = tmp_path / "experiments" / "mine"
    folder.mkdir(parents=True)
    (folder / "protocol.py").write_text(PROTOCOL)
    (folder / "table.py").write_text(RECIPE)
    return folder / "table.py"


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("A docstring.", "Another one.", True),
        ("Yields a row.", "Yields another.", True),
        ("  # why", "  # because", True),
        ('{"row": name, ', '{\n        "row": name,\n        ', True),
        ("RATE = 0.1", "RATE = 0.2", False),
        ("rate {", "a rate {", False),
        ("RATE:g", "RATE:e", False),
    ],
)
def test_what_changes_the_version(recipe, old, new, same):
    before = recipe_version.digest(recipe)
    assert RECIPE.count(old) == 1
    recipe.write_text(RECIPE.replace(old, new))
    assert (recipe_version.digest(recipe) == before) == same


@pytest.mark.parametrize(
    "way",
    [
        "from experiments.mine import protocol",
        "from experiments.mine.protocol import train",
        "from experiments.mine import (\n    protocol,\n)",
        "def late():\n    from experiments.mine import protocol as other",
    ],
)
def test_what_it_imports_counts(recipe, way):
    recipe.write_text(RECIPE.replace("from experiments.mine import protocol", way))
    before = recipe_version.digest(recipe)
    (recipe.parent / "protocol.py").write_text(PROTOCOL.replace("10", "11"))
    assert recipe_version.digest(recipe) != before


def test_a_file_elsewhere_has_a_version_too(tmp_path):
    (tmp_path / "toy.py").write_text("TITLE = 'toy'\n")
    assert len(recipe_version.digest(tmp_path / "toy.py")) == 12


def test_every_recipe_has_its_own():
    found = [recipe_version.digest(file) for file in recipes.known_recipes().values()]
    assert len(set(found)) == len(found)
