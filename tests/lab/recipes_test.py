import json
import re

import pytest

from quantjax.encoded import storage
from quantjax.lab import interrupts, recipes
from quantjax.lab.recipes import Context

TOY = """
TITLE = "A toy"

def run(context):
    for bits in context.widths((4, 3, 2)):
        for seed in context.seeds:
            yield {"row": "toy", "bits": bits, "seed": seed, "steps": context.steps(2.5, 10)}
            if bits == 3:
                raise RuntimeError("the third width fails")
"""


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(TOY)
    return path


def run(path, out, **context):
    return recipes.run(str(path), Context(**context), out)


def test_the_record_says_what_was_run(toy, tmp_path, capsys):
    record = run(toy, tmp_path / "new" / "results", bits=(2, 4), seeds=(5, 6), scale=0.1)
    assert record == tmp_path / "new" / "results" / "toy-b24-s5-6-scale0.1.json"
    written = json.loads(record.read_text())
    rows = written["rows"]
    # The recipe's order of widths; 2.5 epochs of 10 steps at a tenth are 2 (rounded to even).
    assert rows == [
        {"row": "toy", "bits": bits, "seed": seed, "steps": 2} for bits in (4, 2) for seed in (5, 6)
    ]
    assert {name: written[name] for name in ("experiment", "title", "scale", "complete")} == {
        "experiment": "toy",
        "title": "A toy",
        "scale": 0.1,
        "complete": True,
    }
    assert written["command"] == "quantjax run toy --scale 0.1 --seeds 5 6 --bits 2 4"
    assert set(written["versions"]) == {
        "python",
        "quantjax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "numpy",
    }
    assert all(re.match(r"\d", version) for version in written["versions"].values())
    assert written["device"]
    assert written["seconds"] >= 0
    assert list(record.parent.iterdir()) == [record]  # nothing half-written beside it
    # Progress goes to stderr, row by row.
    out, err = capsys.readouterr()
    assert out == ""
    assert [json.loads(line) for line in err.splitlines()] == rows


def test_a_recipe_that_fails_leaves_the_rows_it_finished(toy, tmp_path):
    with pytest.raises(RuntimeError, match="third width"):
        run(toy, tmp_path)
    written = json.loads((tmp_path / "toy.json").read_text())
    assert written["complete"] is False
    assert [row["bits"] for row in written["rows"]] == [4, 3]


def test_the_record_is_written_after_each_row(tmp_path):
    source = tmp_path / "looking.py"
    source.write_text(
        "import json, pathlib\n"
        "TITLE = 'It looks at its own record'\n"
        "def run(context):\n"
        "    record = pathlib.Path(__file__).parent / 'looking.json'\n"
        "    for _ in range(3):\n"
        "        there = record.exists()\n"
        "        yield {'before': len(json.loads(record.read_text())['rows']) if there else 0}\n"
    )
    written = json.loads(run(source, tmp_path).read_text())
    assert written["rows"] == [{"before": 0}, {"before": 1}, {"before": 2}]


def test_a_recipe_that_fails_before_its_first_row_leaves_no_record(tmp_path):
    source = tmp_path / "failing.py"
    source.write_text("TITLE = 'It fails'\ndef run(context):\n    yield 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        run(source, tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_names_of_records(toy, tmp_path):
    names = [
        run(toy, tmp_path, bits=(4,)).name,
        run(toy, tmp_path, bits=(4,), scale=0.05).name,
        run(toy, tmp_path, bits=(4,), seeds=(1,)).name,
        run(toy, tmp_path, bits=(4,), seeds=(0, 1, 12)).name,
        run(toy, tmp_path, bits=(4,), limit=50, init=tmp_path / "start.npz").name,
    ]
    assert names == [
        "toy-b4.json",
        "toy-b4-scale0.05.json",
        "toy-b4-s1.json",
        "toy-b4-s0-1-12.json",
        "toy-b4-limit50-start.json",
    ]


def test_the_command_holds_no_path_of_this_machine(toy, tmp_path):
    init = tmp_path / "weights.npz"
    record = run(toy, tmp_path, bits=(4,), data_dir=tmp_path / "data", init=init)
    written = json.loads(record.read_text())
    assert written["command"].endswith("--bits 4 --data-dir DATA_DIR --init weights.npz")
    assert str(tmp_path) not in record.read_text()


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_scale_must_be_positive(toy, tmp_path, scale):
    with pytest.raises(ValueError, match=f"scale must be positive, got {scale}"):
        run(toy, tmp_path / "results", scale=scale)
    assert not (tmp_path / "results").exists()


def test_a_record_that_cannot_be_written_raises_before_the_recipe_runs(tmp_path):
    source = tmp_path / "never.py"
    source.write_text("TITLE = 'never'\ndef run(context):\n    raise AssertionError('it ran')\n")
    with pytest.raises(OSError, match=r"never\.py"):
        run(source, source / "results")  # a file stands where the folder should be


def test_steps_and_widths():
    context = Context(scale=0.01, bits=(3, 8))
    assert context.steps(150, 390) == 585
    assert context.steps(1, 10) == 1  # never none
    assert Context().steps(2, 10) == 20
    assert context.widths((4, 3, 2)) == (3,)
    assert Context().widths((4, 3, 2)) == (4, 3, 2)
    with pytest.raises(ValueError, match=r"bits \(3, 8\): this recipe has \(4, 2\)"):
        context.widths((4, 2))


def test_find_by_name_and_by_path(toy, tmp_path):
    table = tmp_path / "paper" / "toy.py"
    table.parent.mkdir()
    table.write_text(toy.read_text())
    (table.parent / "protocol.py").write_text("SHARED = 1\n")  # no TITLE: no recipe
    assert recipes.known_recipes(tmp_path) == {"paper_toy": table}
    assert recipes.find("paper_toy", tmp_path) == table
    assert recipes.name_of(table, tmp_path) == "paper_toy"
    assert recipes.find(str(toy)) == toy
    with pytest.raises(ValueError, match="'paper_toi'; did you mean 'paper_toy'"):
        recipes.find("paper_toi", tmp_path)
    with pytest.raises(ValueError, match=r"unknown experiment 'absent\.py'"):
        recipes.find("absent.py", tmp_path)
    with pytest.raises(ValueError, match=r"unknown experiment 'psg_minst'; did you mean 'psg_m"):
        recipes.find("psg_minst")


@pytest.mark.parametrize(
    ("text", "lacks"), [("TITLE = 'no run'\n", "run"), ("def run(context): ...\n", "TITLE")]
)
def test_load_rejects_what_is_no_recipe(tmp_path, text, lacks):
    path = tmp_path / "other.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"other.py is no recipe: it lacks {lacks}"):
        recipes.load(path)


@pytest.mark.parametrize("path", recipes.known_recipes().values(), ids=recipes.name_of)
def test_every_experiment_is_a_recipe(path):
    recipe = recipes.load(path)
    assert recipe.__doc__
    assert callable(recipe.run)


def test_networks_of_rows_are_saved_and_their_size_is_recorded(tmp_path):
    source = tmp_path / "shipping.py"
    source.write_text(
        "import numpy as np\nfrom quantjax.lab.recipes import Network\nTITLE = 'Files'\n"
        "def run(context):\n"
        "    tree = {'params': {'kernel': np.ones((3, 4), np.float32)}}\n"
        "    yield {'row': 'A, b', 'seed': 7, 'low precision': 98.5, 'layers': {},\n"
        "           'file': Network(tree, {'model': 'lenet5'}, 'float16')}\n"
    )
    (row,) = json.loads(run(source, tmp_path / "out").read_text())["rows"]
    file = tmp_path / "out" / "networks" / "shipping-a-b-seed7.safetensors"
    assert row == {
        "row": "A, b",
        "seed": 7,
        "low precision": 98.5,
        "layers": {},
        "file KB": round(file.stat().st_size / 1000, 2),
        "file": file.name,
    }
    told = storage.inspect(file).metadata
    assert told == {"model": "lenet5", "row": "A, b", "seed": 7, "low precision": 98.5}
    assert storage.load(file)["params"]["kernel"].shape == (3, 4)


def test_a_limit_is_told_and_kept(toy, tmp_path):
    record = run(toy, tmp_path, bits=(4,), limit=50)
    assert json.loads(record.read_text())["command"].endswith("--bits 4 --limit 50")
    loaded = Context(limit=50).load("digits")
    assert [len(part.labels) for part in (loaded.train, loaded.test)] == [50, 50]
    assert len(Context().load("digits").train.labels) == 1400


def test_an_installed_wheel_says_where_recipes_are(tmp_path):
    with pytest.raises(
        ValueError, match="unknown experiment 'psg_mnist': recipes lie in the folder"
    ):
        recipes.find("psg_mnist", tmp_path)


def test_an_interruption_says_what_is_on_disk(toy, tmp_path):
    path = run(toy, tmp_path, bits=(4,), seeds=(0, 1))
    assert interrupts.on_disk == f"{path} holds 2 finished rows"
