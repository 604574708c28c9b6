"""`quantjax compare` from end to end on the digits, one epoch; and how it fails."""

import csv
import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

import quantjax as qj
from quantjax.encoded import storage
from quantjax.lab import compare, data, interrupts, methods, models, plans
from quantjax.lab.compare import Settings
from quantjax.lab.deploy import better_statistics, reestimated
from quantjax.lab.report import plots
from quantjax.lab.train import engine, evaluation, phases, tasks
from tests.lab.train import toy_task
from tests.lab.train.tasks_test import TINY, write_text

pytestmark = pytest.mark.usefixtures("quick_compilation")

FILES = {"networks", "report.html", "results.json", "results.csv", "pareto.png", "histograms.png"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "new" / "report"
    return Settings(methods=("psg", "sgd"), bits=(4, 2), epochs=1, out=out, quick=True)


@pytest.fixture(scope="module")
def results(settings):
    return compare.compare(settings)


def test_rows_come_in_the_order_that_was_asked_for(results):
    assert [(row.method, row.bits) for row in results] == [
        ("float", 32),
        ("psg", 4),
        ("psg", 2),
        ("sgd", 4),
        ("sgd", 2),
    ]


def test_the_report_holds_the_rows(settings, results):
    assert {path.name for path in settings.out.iterdir()} == FILES
    written = json.loads((settings.out / "results.json").read_text())
    assert written["complete"] is True
    assert [row["quantized"] for row in written["results"]] == [row.quantized for row in results]
    assert [row["start"] for row in written["results"]] == [
        "",
        "trained",
        "trained",
        "none",
        "none",
    ]
    with (settings.out / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["title"] for line in lines] == [row.title for row in results]
    told = written["settings"]
    for name, value in (("dataset", "digits"), ("model", "small-cnn"), ("batch_size", 32)):
        assert told[name] == value  # the defaults of the data set are filled in
    assert not {"out", "data_dir"} & set(told)
    assert (settings.out / "report.html").read_text().count("interrupted") == 0


def test_the_numbers_are_those_of_the_networks(settings, results):
    digits = data.load("digits")
    model = models.build("small-cnn", 10)
    images = data.normalize(digits.test.images, digits.mean, digits.std)
    apply = jax.jit(lambda params: model.apply({"params": params}, images))

    def accuracy(params):
        predicted = np.argmax(np.asarray(apply(params)), axis=1)
        return 100 * np.mean(predicted == digits.test.labels)

    for row in results:
        assert row.full_precision == pytest.approx(accuracy(row.params))
        assert row.quantized == pytest.approx(accuracy(qj.decode(row.encoded)))
        assert row.curve[-1][2] == row.full_precision
        assert row.seconds > 0
        summary = qj.summary(row.encoded, row.params)
        path = settings.out / "networks" / f"{row.method}-{row.bits:g}bits.safetensors"
        assert row.nbytes == path.stat().st_size > summary.nbytes
        assert row.compression == results[0].nbytes / row.nbytes
        assert row.quantized == pytest.approx(accuracy(qj.decode(qj.load(path)["params"])))
        errors = [r.squared_error for r in summary.rows if r.squared_error is not None]
        assert row.weight_error == pytest.approx(np.mean(errors) if errors else 0)
    full, psg4, psg2, sgd4, sgd2 = results
    assert full.compression == 1
    assert full.full_precision == sgd4.full_precision == sgd2.full_precision
    assert full.nbytes > psg4.nbytes > psg2.nbytes
    assert full.nbytes > sgd4.nbytes > sgd2.nbytes
    # What PSG is for: at the same width its weights lie closer to the grid.
    assert psg4.weight_error < sgd4.weight_error
    assert psg2.weight_error < sgd2.weight_error
    steps = len(digits.train.labels) // 32
    assert all(row.curve[-1][0] == steps for row in results)


def stop_after(rows, error):
    def fn(*args, **kwargs):
        yield from rows
        raise error

    return fn


def test_an_interrupted_comparison_leaves_the_finished_rows(
    tmp_path, results, settings, monkeypatch, capsys
):
    monkeypatch.setattr(compare, "rows", stop_after(results[:1], KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        compare.compare(Settings(out=tmp_path))
    assert "full precision" in capsys.readouterr().out
    assert interrupts.on_disk == f"{tmp_path / 'report.html'} holds the finished rows, 1 so far"
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["complete"] is False
    assert [row["method"] for row in written["results"]] == ["float"]
    assert "interrupted: finished rows only" in (tmp_path / "report.html").read_text()


def test_an_error_leaves_the_rows_before_it(tmp_path, results, monkeypatch):
    error = RuntimeError("out of memory")
    monkeypatch.setattr(compare, "rows", stop_after(results[:2], error))
    with pytest.raises(RuntimeError, match="out of memory"):
        compare.compare(Settings(out=tmp_path))
    written = json.loads((tmp_path / "results.json").read_text())
    assert (written["complete"], len(written["results"])) == (False, 2)


def test_a_method_that_diverges_has_no_row_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    """On a directory of arrays, whose images decide which network is trained."""
    toy = toy_task.make().dataset
    for part, (images, labels) in (("train", toy.train), ("test", toy.test)):
        np.save(tmp_path / f"{part}_images.npy", images)
        np.save(tmp_path / f"{part}_labels.npy", labels)
    wild = methods.Entry("wild", lambda bits, total: plans.Plan(engine.Method(optax.sgd(1e30))))
    monkeypatch.setitem(methods.METHODS, "wild", wild)
    results = compare.compare(
        Settings(
            dataset=str(tmp_path),
            methods=("wild", "sgd"),
            bits=(4,),
            epochs=4,
            batch_size=16,
            out=tmp_path / "report",
        )
    )
    assert [row.method for row in results] == ["float", "sgd"]
    assert "wild, 4 bits: step" in capsys.readouterr().out
    assert json.loads((tmp_path / "report" / "results.json").read_text())["complete"] is True


def test_batch_norms_ship_with_the_statistics_of_the_quantized_weights(tmp_path):
    settings = Settings(
        model="small-cnn-bn",
        methods=("sgd",),
        bits=(2,),
        epochs=1,
        limit=400,
        seeds=(0,),
        out=tmp_path,
    )
    _, row = compare.compare(settings)
    task = tasks.classification(
        models.build("small-cnn-bn", 10), data.limited(data.load("digits"), settings.limit)
    )
    saved = qj.decode(qj.load(tmp_path / "networks" / "sgd-2bits.safetensors"))
    float_net = qj.load(tmp_path / "networks" / "float-32bits.safetensors")
    evaluate = evaluation.make_evaluate(task)
    assert row.quantized == evaluate(saved, task.dataset.test).accuracy
    running = {**saved, "batch_stats": float_net["batch_stats"]}
    again = reestimated(task, running)
    losses = [evaluate(way, task.dataset.train).loss for way in (running, again)]
    assert losses[1] < losses[0]  # rounded to 2 bits, it is repaired
    for mine, expected in zip(jax.tree.leaves(saved), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-5)
    for way in (again, {**again, "params": float_net["params"]}):
        better = better_statistics(task, evaluate, way)
        others = [way, reestimated(task, way)]
        losses = [evaluate(one, task.dataset.train).loss for one in (better, *others)]
        assert losses[0] == min(losses)


def test_an_interruption_before_the_first_row_leaves_no_report(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "rows", stop_after([], KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        compare.compare(Settings(out=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.fixture
def nothing_loaded(monkeypatch):
    def load(*arguments):
        pytest.fail(f"loaded {arguments} before everything was checked")

    monkeypatch.setattr(data, "load", load)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": ()}, "seeds must name at least one seed"),
        ({"seeds": (0, -1)}, r"different whole numbers from 0 on, got \(0, -1\)"),
        ({"seeds": (2, 2)}, r"different whole numbers from 0 on, got \(2, 2\)"),
        ({"inputs": 0}, "bits must be"),
        ({"methods": ("psg", "psgd")}, "unknown method 'psgd'; did you mean .*'psg'"),
        ({"model": "resnet21"}, "unknown model 'resnet21'; did you mean"),
        ({"bits": (4, 0)}, r"bits must be a whole number in 1\.\.16, got 0"),
        ({"bits": (17,)}, "got 17"),
        ({"methods": ()}, "nothing to compare"),
        ({"bits": ()}, "nothing to compare"),
        ({"epochs": -1}, "epochs must be at least 1, got -1"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": -5}, "batch_size must be at least 1, got -5"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
    ],
)
def test_bad_settings_raise_before_anything_is_loaded(tmp_path, nothing_loaded, arguments, message):
    with pytest.raises(ValueError, match=message):
        compare.compare(Settings(**{"out": tmp_path / "report", **arguments}))
    assert not (tmp_path / "report").exists()


def test_a_folder_that_cannot_be_written_raises_before_anything_is_loaded(tmp_path, nothing_loaded):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "report"):
        with pytest.raises(OSError, match="file"):
            compare.compare(Settings(out=out))


def test_what_cannot_be_drawn_raises_before_anything_is_loaded(
    tmp_path, nothing_loaded, monkeypatch
):
    def fail(*size):
        raise ValueError("'nonsense' is not a valid backend")

    monkeypatch.setattr(plots, "blank", fail)
    with pytest.raises(ValueError, match="cannot draw the report: 'nonsense' is not"):
        compare.compare(Settings(out=tmp_path / "report"))
    assert not (tmp_path / "report").exists()


def test_a_limit_leaves_so_many_images(tmp_path, monkeypatch):
    seen = []

    class StopError(Exception):
        pass

    def task(model, dataset, augment):
        seen.append(dataset)
        raise StopError

    monkeypatch.setattr(compare.tasks, "classification", task)
    with pytest.raises(StopError):
        compare.compare(Settings(limit=90, out=tmp_path))
    assert [len(part.labels) for part in (seen[0].train, seen[0].test)] == [90, 90]


def test_defaults_by_data_set(tmp_path):
    digits = compare.resolve(Settings(out=tmp_path))
    assert (digits.model, digits.epochs, digits.batch_size) == ("small-cnn", 20, 32)
    assert digits.seeds == (0, 1, 2)
    mnist = compare.resolve(Settings(dataset="mnist", out=tmp_path))
    assert (mnist.model, mnist.epochs, mnist.batch_size) == ("lenet5", 5, 128)
    assert mnist.seeds == (0,)
    assert digits.methods == mnist.methods == methods.DEFAULT
    quick = compare.resolve(Settings(dataset="cifar10", quick=True, out=tmp_path))
    assert (quick.methods, quick.model, quick.epochs) == (methods.QUICK, "small-cnn", 4)
    assert (quick.batch_size, quick.limit) == (32, 2000)
    longer = Settings(quick=True, epochs=9, model="lenet5", limit=7, out=tmp_path)
    longer = compare.resolve(longer)
    assert (longer.epochs, longer.model, longer.limit) == (9, "lenet5", 7)  # what is given counts
    given = Settings(
        dataset="./arrays",
        model="lenet5",
        methods=("psg",),
        epochs=3,
        batch_size=7,
        seeds=(5,),
        out=tmp_path,
    )
    assert compare.resolve(given) == given
    every = compare.resolve(Settings(methods=("lsq", "all"), out=tmp_path)).methods
    assert sorted(every) == sorted(methods.METHODS)
    assert every[0] == "lsq"
    assert list(tmp_path.iterdir()) == []  # the probe is gone
    text = compare.resolve(Settings(dataset="tiny_shakespeare", out=tmp_path))
    assert (text.model, text.epochs, text.batch_size) == ("text-small", 3, 32)
    quick = compare.resolve(Settings(dataset="tiny_shakespeare", quick=True, out=tmp_path))
    assert (quick.model, quick.epochs, quick.limit) == ("text-small", 5, 500)
    assert quick.methods == methods.QUICK


@pytest.mark.parametrize("quick", [False, True])
def test_what_a_name_does_not_tell_stays_open_until_the_data_are_there(tmp_path, quick):
    folder = compare.resolve(Settings(dataset="./any", quick=quick, out=tmp_path))
    assert folder.methods is not None
    assert {folder.model, folder.epochs, folder.batch_size, folder.limit} == {None}
    text = compare.resolve(folder, (64,))
    known = compare.resolve(Settings(dataset="tiny_shakespeare", quick=quick, out=tmp_path))
    assert text == dataclasses.replace(known, dataset="./any")
    images = compare.resolve(folder, (28, 28, 1))
    assert (images.model, images.epochs, images.batch_size, images.limit) == (
        ("small-cnn", 4, 32, 2000) if quick else (None, 5, 128, None)  # None: by image size
    )
    given = dataclasses.replace(folder, epochs=7, limit=9)
    given = compare.resolve(given, (64,))
    assert (given.epochs, given.limit, given.batch_size) == (7, 9, 32)


@pytest.fixture(scope="module")
def text_results(tmp_path_factory):
    """Rows of a comparison on a text, its settings, and what `phases.run` gave."""
    folder, out = (tmp_path_factory.mktemp(name) for name in ("text", "report"))
    settings = Settings(
        dataset=str(write_text(folder)),
        methods=("sgd", "lsq"),
        bits=(3,),
        epochs=4,
        batch_size=8,
        limit=16,
        out=out,
    )
    outcomes, run = [], phases.run

    def recorded(*args, **kwargs):
        outcomes.append(run(*args, **kwargs))
        return outcomes[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "text-small", TINY)
        patch.setattr(phases, "run", recorded)
        return compare.compare(settings), settings, outcomes


def test_networks_of_text_are_judged_by_bits_per_byte(text_results):
    rows, settings, outcomes = text_results
    assert [(row.method, row.bits) for row in rows] == [("float", 32), ("sgd", 3), ("lsq", 3)]
    dataset = data.limited(data.load(settings.dataset), settings.limit)
    assert len(dataset.train.tokens) == 16
    apply = jax.jit(TINY().apply)
    for row in rows:
        path = settings.out / "networks" / f"{row.method}-{row.bits:g}bits.safetensors"
        logits = apply(qj.decode(qj.load(path)), np.asarray(dataset.test.tokens, np.int32))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, dataset.test.targets)
        assert row.quantized == pytest.approx(float(losses.mean()) / np.log(2), rel=1e-4)
        told = storage.inspect(path).metadata
        assert (told["bits per byte"], told["model"]) == (row.quantized, "text-small")
        assert "accuracy" not in told
        steps, losses, scores = zip(*row.curve, strict=True)
        assert steps[-1] == 8
        assert scores[-1] == row.full_precision
        # Training and test text are the same words: what is learnt of one is seen in the other.
        assert scores[0] > scores[-1] > 0
        assert losses[0] > losses[-1]
    # The best network on the way is the one of fewest bits.
    for outcome, row in zip(outcomes, (rows[0], rows[2]), strict=True):
        assert -outcome.early_score == min(score for _, _, score in row.curve)


def test_the_report_of_a_text_says_bits_per_byte(text_results, monkeypatch, capsys):
    rows, settings, _ = text_results
    written = json.loads((settings.out / "results.json").read_text())
    assert (written["complete"], written["metric"]) == (True, "bits per byte")
    assert [row["quantized"] for row in written["results"]] == [row.quantized for row in rows]
    assert written["settings"]["model"] == "text-small"
    page = (settings.out / "report.html").read_text()
    assert "quantized, bits per byte" in page
    assert "accuracy" not in page
    assert f"{rows[1].quantized:.3f}" in page
    monkeypatch.setattr(compare, "rows", lambda *args, **kwargs: iter(rows))
    compare.compare(settings)
    told = capsys.readouterr().out
    assert f"LSQ, 3 bits: {rows[2].quantized:.3f} bits per byte in " in told
    assert "percent" not in told


@pytest.mark.parametrize("name", ["lenet5", "text-small"])
def test_a_model_of_the_other_kind_raises_before_training(tmp_path, monkeypatch, name):
    monkeypatch.setattr(compare, "rows", lambda *args, **kwargs: pytest.fail("trained"))
    dataset = str(write_text(tmp_path)) if name == "lenet5" else "digits"
    with pytest.raises(ValueError, match=f"the model '{name}' takes .*, the examples are"):
        compare.compare(Settings(dataset=dataset, model=name, out=tmp_path / "report"))


def test_the_command_is_told_only_where_there_was_one(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["anything/quantjax", "compare", "--bits", "4"])
    told = compare.describe(Settings(out=tmp_path))
    assert told["command"] == "quantjax compare --bits 4"
    assert set(told["versions"]) >= {"python", "jax", "quantjax"}
    monkeypatch.setattr("sys.argv", ["pytest", "tests"])
    assert compare.describe(Settings(out=tmp_path))["command"] == ""


def test_rows_start_from_the_trained_network_or_from_the_first_weights(tmp_path, monkeypatch):
    starts, totals = {}, {}

    def run(task, parts, variables, score, **kwargs):
        (phase,) = parts
        starts[phase.name], totals[phase.name] = variables, phase.total
        moved = jax.tree.map(lambda leaf: leaf + 1, variables)
        history = (phases.Point(phase.name, 1, 0.0, 50.0),)
        return phases.Outcome(moved, qj.QuantState({}, {}), moved, history)

    def plan(bits, total):
        return plans.Plan(engine.Method(optax.sgd(0.1)), qj.uniform(bits))

    def make_predict(task, inputs=None):
        return lambda variables, split: tasks.Predictions(*np.zeros((2, len(split[0]))))

    monkeypatch.setattr(phases, "run", run)
    monkeypatch.setattr(evaluation, "make_predict", make_predict)
    for start in ("scratch", "trained"):
        monkeypatch.setitem(methods.METHODS, start, methods.Entry(start, plan, start))
    settings = Settings(methods=("trained", "scratch"), bits=(4,), seeds=(3,), out=tmp_path)
    assert len(list(compare.rows(compare.resolve(settings), data.load("digits")))) == 3
    first = starts["full precision"]["params"]
    jax.tree.map(np.testing.assert_array_equal, starts["scratch, 4 bits"]["params"], first)
    trained = jax.tree.map(lambda leaf: leaf + 1, first)
    jax.tree.map(np.testing.assert_array_equal, starts["trained, 4 bits"]["params"], trained)
    assert totals["scratch, 4 bits"] == 2 * totals["trained, 4 bits"]
    assert totals["trained, 4 bits"] == totals["full precision"] == 20 * (1400 // 32)
