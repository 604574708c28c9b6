"""`quantjax inspect` and `quantjax evaluate` on saved networks."""

import jax
import numpy as np
import pytest

import quantjax as qj
from quantjax.encoded import storage
from quantjax.lab import artifacts, data, models
from quantjax.lab.cli import main
from tests.lab.train.tasks_test import TINY, write_text

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def network(task, tmp_path_factory):
    """A file of a network with weights and inputs of few bits, and its accuracy."""
    variables = task.init(0)
    inputs = {"Conv_0": None, ".*": qj.srq_input(4, signed=False)}
    apply = qj.linen.quantize_inputs(task.model.apply, inputs)
    variables = qj.linen.calibrate(apply, variables, task.inputs(task.dataset.train.images[:64]))
    quantizer = qj.partition({"Conv.*": qj.uniform(4), ".*kernel": qj.multi_bit(2, axes=-2)})
    encoded = quantizer.encode(variables["params"], quantizer.init(variables["params"]))
    path = tmp_path_factory.mktemp("network") / "net.safetensors"
    told = {"model": "small-cnn", "dataset": "digits", "inputs": repr(inputs)}
    qj.save(path, {**variables, "params": encoded}, metadata=told)
    logits = jax.jit(lambda v, x: apply(v, x))(
        {**variables, "params": qj.decode(encoded)},
        task.inputs(task.dataset.test.images),
    )
    return path, 100 * np.mean(np.argmax(logits, axis=1) == task.dataset.test.labels)


def test_evaluate_says_what_the_network_scores(network, capsys):
    path, accuracy = network
    assert artifacts.evaluate(path).accuracy == pytest.approx(accuracy)
    assert main(["evaluate", str(path)]) == 0
    assert capsys.readouterr().out.startswith(f"accuracy {accuracy:.2f} percent, loss ")


def test_scores_are_told_by_the_metric(network, tmp_path, monkeypatch):
    path, accuracy = network
    told = []
    score = artifacts.evaluate(path, tell=told.append)
    monkeypatch.setitem(models.MODELS, "text-small", TINY)
    folder = str(write_text(tmp_path))
    text = data.load(folder)
    variables = TINY().init(jax.random.key(0), np.asarray(text.test.tokens[:1], np.int32))
    quantizer = qj.lsq(4)
    encoded = quantizer.encode(variables["params"], quantizer.init(variables["params"]))
    net = tmp_path / "net"
    # Means and deviations are of images: a text has none to replace.
    about = {"model": "text-small", "dataset": folder, "mean": [0.5], "std": [0.2]}
    qj.save(net, {**variables, "params": encoded}, metadata=about)
    of_text = artifacts.evaluate(net, tell=told.append)
    logits = jax.jit(TINY().apply)(
        {**variables, "params": qj.decode(encoded)}, np.asarray(text.test.tokens, np.int32)
    )
    hits = np.mean(np.argmax(logits, axis=-1) == text.test.targets)
    chances = np.take_along_axis(
        np.asarray(jax.nn.softmax(logits)), np.asarray(text.test.targets, int)[..., None], axis=-1
    )
    assert told == [
        f"accuracy {accuracy:.2f} percent, loss {score.loss:.4f}",
        f"{-np.log2(chances).mean():.3f} bits per byte, accuracy {100 * hits:.2f} percent",
    ]
    assert of_text.accuracy == pytest.approx(100 * hits)
    for file, dataset, message in (
        (net, "digits", r"the model 'text-small' takes bytes \[length\], the examples are \[8, "),
        (path, folder, r"the model 'small-cnn' takes images \[h, w, c\], the examples are \[64\]"),
    ):
        with pytest.raises(ValueError, match=message):
            artifacts.evaluate(file, dataset)


def test_what_is_given_comes_before_what_the_file_says(network, tmp_path):
    path, accuracy = network
    bare = tmp_path / "bare"
    told = {"inputs": storage.inspect(path).metadata["inputs"]}
    qj.save(bare, qj.load(path), metadata=told)
    assert artifacts.evaluate(bare, "digits", "small-cnn").accuracy == pytest.approx(accuracy)
    with pytest.raises(ValueError, match="bare names no dataset: give --dataset"):
        artifacts.evaluate(bare)
    with pytest.raises(ValueError, match="bare names no model: give --model"):
        artifacts.evaluate(bare, "digits")
    with pytest.raises(
        ValueError,
        match=r"bare is of another network: it lacks batch_stats/.* and \d+ more; it has besides",
    ):
        artifacts.evaluate(bare, "digits", "resnet20")
    for inputs, message in (
        ("srq_inputs(4)", "unknown input quantizer 'srq_inputs'; did you mean 'srq"),
        ("open('/etc')", "unknown input quantizer 'open'"),
        ("srq_input(4).init(3)", "which is no input quantizer"),
        ("srq_input(", "which is no input quantizer"),
        ("srq_input(99)", "bits must be"),
    ):
        qj.save(bare, qj.load(path), metadata={"inputs": inputs})
        with pytest.raises(ValueError, match=message):
            artifacts.evaluate(bare, "digits", "small-cnn")
    mean = {"mean": [5.0], "std": [0.1]}
    qj.save(bare, qj.load(path), metadata={**told, **mean})
    assert artifacts.evaluate(bare, "digits", "small-cnn").loss != artifacts.evaluate(path).loss


def test_inspect_shows_leaves_sizes_digests_and_metadata(network, capsys, tmp_path):
    path, _ = network
    assert main(["inspect", str(path), "--plots", str(tmp_path / "new" / "plots")]) == 0
    shown = capsys.readouterr().out
    for part in ("params/Conv_0", "MultiBit", "ans", "SHA-256 digests agree", "model: small-cnn"):
        assert part in shown
    assert f"{path.stat().st_size:,} bytes in all" in shown
    for name in ("bits.png", "weights.png"):
        assert (tmp_path / "new" / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_pictures_of_leaves_with_many_levels_and_of_none(tmp_path):
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(50, 40)).astype(np.float32)}
    quantizer = qj.uniform(8, axes="channel")
    qj.save(tmp_path / "net", quantizer.encode(params, quantizer.init(params)))
    artifacts.inspect(tmp_path / "net", tmp_path / "plots", tell=lambda *a, **k: None)
    assert (tmp_path / "plots" / "weights.png").exists()
    qj.save(tmp_path / "plain", params)
    with pytest.raises(ValueError, match="plain: no encoded leaves to draw"):
        artifacts.inspect(tmp_path / "plain", tmp_path / "plots", tell=lambda *a, **k: None)


def test_files_that_are_none(tmp_path, capsys):
    (tmp_path / "text").write_text("not a network")
    for command in ("inspect", "evaluate"):
        assert main([command, str(tmp_path / "text")]) == 2
        assert "text: no safetensors file" in capsys.readouterr().err
        assert main([command, str(tmp_path / "absent")]) == 2
        assert "No such file" in capsys.readouterr().err


def test_every_input_quantizer_can_be_named():
    public = {name for name in qj.__all__ if name.endswith("_input")}
    assert set(artifacts.INPUTS) == public
