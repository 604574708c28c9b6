"""The report: its files, its numbers, and what its pictures show."""

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import quantjax as qj
from quantjax.lab.report import files, plots
from quantjax.lab.report import rows as rows_lib

pytestmark = pytest.mark.usefixtures("quick_compilation")

FLOAT32 = np.dtype("float32")
SETTINGS = {
    "dataset": "digits",
    "model": "mlp",
    "epochs": 3,
    "seeds": [0],
    "device": "cpu",
    "versions": {"jax": "0.10.2"},
    "command": "quantjax compare --dataset digits --methods psg",
}
CURVE = ((10, 1.5, 80.0), (20, 0.25, 95.0))


def weights(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def tree(seed=0):
    return {
        "Dense_0": {"kernel": weights(24, 16, seed=seed), "bias": jnp.zeros(16)},
        "Dense_1": {"kernel": weights(16, 10, seed=seed + 1), "bias": jnp.zeros(10)},
    }


def encode(params, bits, **options):
    quantizer = qj.uniform(bits, **options)
    return quantizer.encode(params, quantizer.init(params))


def multi_bit(params, bits, *, shared=False):
    """Random bases and coordinates; one group, or one for each output."""

    def leaf(w):
        if w.ndim < 2:
            return w
        group = (1, 1) if shared else (1, w.shape[1])
        coords = 0.5 + jax.random.uniform(jax.random.key(1), (*group, bits))
        basis = jnp.where(jax.random.bernoulli(jax.random.key(2), 0.5, (*w.shape, bits)), 1, -1)
        mask = jnp.ones(coords.shape, bool)
        return qj.MultiBit(basis.astype(jnp.int8), coords, mask, FLOAT32).validate()

    return jax.tree.map(leaf, params)


def table_of(params, bits, *, groups=1):
    def leaf(w):
        if w.ndim < 2:
            return w
        levels = np.linspace(-1, 1, 2**bits, dtype=np.float32)
        levels = levels * np.arange(1, groups + 1, dtype=np.float32)[:, None]
        codes = jnp.zeros(w.shape, jnp.uint8).at[0].set(1)
        return qj.Table(codes, jnp.asarray(levels[None]), bits, FLOAT32).validate()

    return jax.tree.map(leaf, params)


def make(method="psg", bits=4.0, quantized=97.5, encoded=None, params=None, **other):
    params = tree() if params is None else params
    if encoded is None:
        encoded = encode(params, int(bits)) if bits < 32 else params
    row = qj.summary(encoded, params)
    fields = {
        "method": method,
        "title": method.upper(),
        "bits": bits,
        "full_precision": 98.59154510498047,
        "quantized": quantized,
        "nbytes": row.nbytes,
        "compression": row.compression,
        "weight_error": 12.5,
        "seconds": 1.25,
        "curve": CURVE,
        "params": params,
        "encoded": encoded,
    }
    return rows_lib.Result(**(fields | other))


def everything():
    """One row of every kind of leaf."""
    return [
        make("float", 32.0, 98.59154510498047, weight_error=0.0),
        make("psg", 4.0, 98.1),
        make("psg", 2.0, 55.0, curve=((10, 1.0, 70.0), (20, 0.5, 91.0))),
        make("fq", 3.0, 97.0, table_of(tree(), 3)),
        make("alq", 2.0, 96.0, multi_bit(tree(), 2), curve=()),
    ]


class Page(HTMLParser):
    """Checks that tags are closed, and collects what the tests ask for."""

    void = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.cells, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data


def read(path):
    return path.read_text(encoding="utf-8")


def written(folder, results, settings=SETTINGS, **options):
    page = files.write(folder, settings, results, **options)
    assert page == folder / "report.html"
    return Page(read(page))


def test_files(tmp_path):
    folder = tmp_path / "a" / "b"
    page = written(folder, everything())
    names = {"report.html", "results.json", "results.csv", "pareto.png", "histograms.png"}
    assert {path.name for path in folder.iterdir()} == names  # no temporary file is left
    for name in ("pareto.png", "histograms.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert len(page.images) == 3
    for image in page.images:
        assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))[1:4] == b"PNG"
        assert int(image["width"]) > 300
        assert image["alt"]
    files.write(folder, SETTINGS, everything())  # the second time overwrites the first
    assert {path.name for path in folder.iterdir()} == names


def test_the_page_needs_nothing_from_outside(tmp_path):
    written(tmp_path, everything())
    text = re.sub(r"base64,[^\"]*", "", read(tmp_path / "report.html"))
    assert "http" not in text
    assert "//" not in text
    assert not re.search(r"<(script|link|iframe|object)|url\(|@import", text)


def test_the_page_says_what_was_run(tmp_path):
    settings = SETTINGS | {"batch_size": 64, "methods": ["psg", "alq"]}
    text = written(tmp_path, everything(), settings).text
    for part in ("mlp on digits", "3 epochs", "seed 0", "on cpu", "jax 0.10.2", "batch_size"):
        assert part in text
    assert SETTINGS["command"] in text
    for column in rows_lib.columns(everything()):
        assert column.meaning in text
    assert "Dense_1/kernel" in text


def test_settings_may_be_missing(tmp_path):
    assert "Low-bit methods side by side" in written(tmp_path, [make()], {}).text


def test_numbers_are_the_input(tmp_path):
    results = everything()
    files.write(tmp_path, SETTINGS, results)
    stored = json.loads(read(tmp_path / "results.json"))
    rows = list(csv.DictReader(io.StringIO(read(tmp_path / "results.csv"))))
    assert stored["settings"] == SETTINGS
    assert stored["complete"] is True
    assert len(stored["results"]) == len(rows) == len(results)
    for result, there, row in zip(results, stored["results"], rows, strict=True):
        (run,) = there.pop("runs")
        assert tuple(map(tuple, run["curve"])) == result.curve
        assert there["seeds"] == [run["seed"]] == [0]
        spreads = ("full_precision_spread", "quantized_spread")
        told = {k: v for k, v in there.items() if k not in ("seeds", "best", "inputs", *spreads)}
        for name, value in told.items():
            assert value == getattr(result, name)
            assert row[name] == str(value)
            assert run.get(name, value) == value
        for name in (*spreads, "inputs"):
            assert (there[name], row[name]) == (None, "")
        assert (row["seeds"], row["best"]) == ("0", str(there["best"]))


def test_table_cells(tmp_path):
    page = written(tmp_path, everything())
    expected = ["98.59", "98.10", "1.2", "12.5", "–"]  # noqa: RUF001
    assert set(expected) <= set(page.cells)
    console = Console(width=80, file=io.StringIO())
    console.print(rows_lib.table(everything()))
    printed = console.file.getvalue()
    assert "98.10" in printed
    assert "12.5" not in printed  # 80 columns have no room for the weight error


def test_array_scalars_are_numbers(tmp_path):
    result = make(quantized=jnp.float32(97.5), nbytes=np.int64(1000), bits=np.float32(2.5))
    result = result._replace(encoded=encode(tree(), 2), curve=((np.int32(1), jnp.ones(()), 9.0),))
    files.write(tmp_path, {"seeds": (np.int64(3),), "path": tmp_path.name}, [result])
    stored = json.loads(read(tmp_path / "results.json"))
    assert stored["settings"]["seeds"] == [3]
    assert stored["results"][0]["quantized"] == 97.5
    assert stored["results"][0]["runs"][0]["curve"] == [[1, 1.0, 9.0]]
    assert "2.50" in read(tmp_path / "report.html")


def test_no_nan_anywhere(tmp_path):
    curve = ((1, float("nan"), 10.0), (2, float("inf"), 10.0), (3, 0.0, 100.0))
    result = make(weight_error=float("nan"), compression=float("inf"), curve=curve, quantized=100.0)
    files.write(tmp_path, SETTINGS | {"rate": float("nan")}, [make("float", 32.0), result])
    strict = {"parse_constant": lambda name: pytest.fail(name)}
    row = json.loads(read(tmp_path / "results.json"), **strict)["results"][1]
    assert row["weight_error"] is None
    assert row["compression"] is None
    for name in ("results.csv", "report.html"):
        text = re.sub(r"base64,[^\"]*", "", read(tmp_path / name)).lower()
        assert not re.search(r"\b(nan|inf)\b", text)


def test_escaping(tmp_path):
    bad = "<script>alert('x')</script> & \"q\""
    params = {"<b>": tree()["Dense_0"], "Dense_1": tree()["Dense_1"]}
    result = make(title=bad, params=params)
    settings = dict.fromkeys(SETTINGS, bad) | {bad: bad}
    page = written(tmp_path, [result], settings)
    text = read(tmp_path / "report.html")
    assert "<script" not in text
    assert "<b>" not in text
    assert page.text.count(bad) > 5
    assert "<b>/kernel" in page.cells
    rows_lib.table([make(title="[red]x[/")])  # no markup


def test_interrupted(tmp_path):
    note = "interrupted: finished rows only"
    assert note not in written(tmp_path, [make()]).text
    assert note in written(tmp_path, [make()], complete=False).text
    assert json.loads(read(tmp_path / "results.json"))["complete"] is False


@pytest.mark.parametrize("bits", [32.0, 3.0])
def test_single_row(tmp_path, bits):
    assert len(written(tmp_path, [make(bits=bits)]).images) == 3
    assert len(written(tmp_path, [make(bits=bits, curve=())]).images) == 2


def test_no_rows(tmp_path):
    with pytest.raises(ValueError, match="at least one finished row"):
        files.write(tmp_path, SETTINGS, [])


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    files.write(tmp_path, SETTINGS, [make()])
    before = read(tmp_path / "results.csv")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write(tmp_path, SETTINGS, everything())
    assert read(tmp_path / "results.csv") == before
    assert not list(tmp_path.glob(".*"))


def test_best_per_width():
    low = [("a", 4.0, 90.0), ("b", 4.0, 95.0), ("c", 3.8, 95.0), ("a", 2.0, 50.0), ("b", 0.7, 60.0)]
    rows = [make("float", 32.0, 99.0)]
    rows += [make(method, 4.0, right)._replace(bits=bits) for method, bits, right in low]
    assert rows_lib.best_per_width(rows) == {2, 3}  # a tie; widths of a single row have no best


def test_pareto_front():
    size = [10, 20, 20, 30, 5, 40]
    accuracy = [90, 91, 95, 94, 50, 96]
    assert plots.pareto_front(size, accuracy) == [4, 0, 2, 5]


def test_colors_are_distinct_by_method():
    looks = plots.colors([make("float", 32.0), *(make(name) for name in "abcdefghijklmna")])
    assert len(looks) == 15
    assert len(set(looks.values())) == 15
    assert looks["float"] == (plots.INK, "*")


def test_grid_levels():
    params = tree()
    encoded = encode(params, 3)
    shown = plots.picture(make(bits=3.0, params=params, encoded=encoded))
    step = float(encoded["Dense_0"]["kernel"].step.squeeze())
    codes = np.asarray(encoded["Dense_0"]["kernel"].codes)
    assert shown.path == "Dense_0/kernel"  # the largest
    np.testing.assert_allclose(shown.levels, step * np.arange(codes.min(), codes.max() + 1))
    np.testing.assert_array_equal(shown.weights, np.ravel(params["Dense_0"]["kernel"]))


def test_grid_levels_are_in_the_middle_of_bins():
    shown = plots.picture(make(bits=3.0))
    edges = plots._edges(shown)
    middles = (edges[1:] + edges[:-1]) / 2
    assert np.abs(middles[:, None] - shown.levels).min(axis=0).max() < 1e-9
    assert edges[0] <= shown.weights.min() <= shown.weights.max() <= edges[-1]
    assert 60 < len(edges) < 240


def test_grids_of_groups_are_shown_in_steps():
    params = tree()
    encoded = encode(params, 3, axes=-2)
    shown = plots.picture(make(params=params, encoded=encoded))
    assert shown.unit == "weight / step"
    np.testing.assert_array_equal(shown.levels, np.arange(-3, 4))
    np.testing.assert_allclose(np.abs(shown.weights).max(), 3, rtol=1e-6)


def test_too_many_levels_are_left_out():
    assert plots.picture(make(bits=8.0)).levels.size == 0


def test_table_levels():
    shown = plots.picture(make(encoded=table_of(tree(), 3)))
    np.testing.assert_allclose(shown.levels, np.linspace(-1, 1, 8), rtol=1e-6)
    # Two groups that differ by a factor of two offer more levels, still few enough for one picture.
    params = {"kernel": weights(8, 2)}
    shown = plots.picture(make(params=params, encoded=table_of(params, 3, groups=2)))
    assert len(shown.levels) == 16
    assert shown.weights.size == 16
    params = {"kernel": weights(300, 20)}
    shown = plots.picture(make(params=params, encoded=table_of(params, 6, groups=20)))
    np.testing.assert_allclose(shown.levels, np.linspace(-1, 1, 64), rtol=1e-6)
    np.testing.assert_array_equal(shown.weights, params["kernel"][:, 0])
    assert shown.note == "1 of 20 groups"


def test_multi_bit_levels():
    params = {"kernel": weights(30, 40)}
    shared = multi_bit(params, 2, shared=True)
    shown = plots.picture(make(params=params, encoded=shared))
    np.testing.assert_array_equal(shown.levels, np.unique(shared["kernel"].decode()))
    assert len(shown.levels) == 4
    assert shown.weights.size == 1200

    # 21 groups of 2 levels and 19 of 4 are too many for one picture: it shows a group of median
    # width, which has one bit.
    leaf = multi_bit(params, 2)["kernel"]
    mask = leaf.mask.at[:, :21, 1].set(False)
    leaf = qj.MultiBit(leaf.basis, jnp.where(mask, leaf.coords, 0), mask, FLOAT32).validate()
    shown = plots.picture(make(params=params, encoded={"kernel": leaf}))
    assert shown.note == "1 of 40 groups"
    columns = np.asarray(params["kernel"], float).T
    (column,) = (i for i in range(40) if np.array_equal(columns[i], shown.weights))
    assert column < 21
    np.testing.assert_array_equal(shown.levels, np.unique(leaf.decode()[:, column]))
    assert len(shown.levels) == 2


def test_multi_bit_of_blocks_and_groups():
    w = weights(60, 32)
    blocks = 4
    basis = jnp.where(jax.random.bernoulli(jax.random.key(3), 0.5, (60, blocks, 8, 3)), 1, -1)
    coords = 0.5 + jax.random.uniform(jax.random.key(4), (1, blocks, 8, 3))
    mask = jnp.ones(coords.shape, bool)
    leaf = qj.MultiBit(basis.astype(jnp.int8), coords, mask, FLOAT32, blocks, -1).validate()
    shown = plots.picture(make(params={"kernel": w}, encoded={"kernel": leaf}))
    assert shown.note == "1 of 32 groups"
    assert shown.weights.size == 60
    assert len(shown.levels) == 8
    # Every group is a column here, whatever the view: the weights are one column of the leaf.
    assert any(np.array_equal(shown.weights, column) for column in np.asarray(w, float).T)


def test_rows_without_encoded_leaves_show_their_largest_kernel():
    shown = plots.picture(make("float", 32.0))
    assert shown.path == "Dense_0/kernel"
    assert shown.levels.size == 0


def test_degenerate_weights_are_drawn(tmp_path):
    params = {"Dense_0": {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)}}
    one = {"Dense_0": {"kernel": jnp.ones((1, 1))}}
    written(tmp_path, [make(params=params), make(params=one), make("float", 32.0, params=one)])
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree())
    written(tmp_path, [make(params=half)])


def test_one_training_is_drawn_once():
    rows = [make("float", 32.0), make("ptq", 4.0), make("psg", 4.0), make("psg", 2.0)]
    fresh = ((10, 1.0, 70.0), (20, 0.5, 91.0))
    rows[2:] = [row._replace(curve=fresh) for row in rows[2:]]
    loss, accuracy = plots.curves(rows).axes  # ptq repeats the curve of full precision
    assert loss.get_title(loc="left") == "PSG"
    assert len(loss.lines) == len(accuracy.lines) == 2
    texts = [text.get_text() for text in accuracy.get_legend().get_texts()]
    assert texts == ["full precision", "4, 2 bits"]


def test_labels_stay_apart():
    rows = [make("float", 32.0, 98.6)]
    rows += [make(name, 4.0, 98.5 + 0.01 * i) for i, name in enumerate("abcd")]
    fig = plots.pareto(rows)
    fig.draw_without_rendering()
    boxes = [text.get_window_extent() for text in fig.axes[0].texts]
    assert len(boxes) == len(rows) + 1  # and the front's name
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
