"""`quantjax export`: a saved network as a program that needs no quantjax."""

import re
import sys

import jax
import numpy as np
import pytest

import quantjax as qj
from quantjax.lab import data, models
from quantjax.lab.cli import main
from tests.lab.train.tasks_test import TINY, write_text

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def saved(task, tmp_path_factory):
    """A file of a network with weights and inputs of few bits, and its logits of 20 images."""
    apply = qj.linen.quantize_inputs(task.model.apply, qj.uniform_input(6))
    images = task.inputs(task.dataset.test.images[:20])
    variables = qj.linen.calibrate(apply, task.init(0), images)
    quantizer = qj.uniform(3, axes="channel")
    params = quantizer.encode(variables["params"], quantizer.init(variables["params"]))
    path = tmp_path_factory.mktemp("network") / "net.safetensors"
    told = {"model": "small-cnn", "dataset": "digits", "inputs": "uniform_input(6)"}
    qj.save(path, {**variables, "params": params}, metadata=told)
    return path, np.asarray(jax.jit(apply)({**variables, "params": qj.decode(params)}, images))


def run(path, images):
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    return exported, np.asarray(exported.call(images))


def test_stablehlo_of_normalised_images(task, saved, tmp_path, capsys):
    path, logits = saved
    out = tmp_path / "net.stablehlo"
    assert main(["export", str(path), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "net.stablehlo: StableHLO for cpu, cuda, tpu, " in told
    assert "float32 [any, 8, 8, 1], (pixels / 255 - mean) / std, mean [0.30" in told
    (difference,) = re.findall(r"logits of 16 test images: (\S+) from the library's", told)
    assert float(difference) <= 1e-5
    exported, found = run(out, task.inputs(task.dataset.test.images[:20]))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    np.testing.assert_allclose(found, logits, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 6])
def test_pixels_platforms_and_batch(task, saved, tmp_path, capsys, batch):
    path, logits = saved
    out = tmp_path / "net"
    options = ["--platforms", "cpu", "rocm", "--batch", str(batch), "--pixels"]
    assert main(["export", str(path), "--out", str(out), *options]) == 0
    assert f"it takes uint8 [{batch}, 8, 8, 1]\n" in capsys.readouterr().out
    exported, found = run(out, task.dataset.test.images[:batch])
    assert exported.platforms == ("cpu", "rocm")
    np.testing.assert_allclose(found, logits[:batch], atol=1e-5)


def test_other_platforms_are_not_compared(saved, tmp_path, capsys):
    path, _ = saved
    out = tmp_path / "net"
    assert main(["export", str(path), "--out", str(out), "--platforms", "tpu"]) == 0
    assert "not compared with the library" in capsys.readouterr().out
    assert out.exists()


def test_bad_input_is_one_line_and_leaves_the_old_file(saved, tmp_path, capsys):
    path, _ = saved
    out, text = tmp_path / "net", tmp_path / "text"
    out.write_text("old")
    text.write_text("not a network")
    bare = tmp_path / "bare"
    qj.save(bare, qj.load(path))
    cases = {
        (text, out): "text: no safetensors file",
        (tmp_path / "absent", out): "No such file",
        (bare, out): "bare names no dataset: give --dataset",
        (path, out, "--model", "resnet20"): "net.safetensors is of another network",
        (path, out, "--platforms", "gpu"): "platform must be one of",
        (path, out, "--batch", "0"): "batch must be a whole number from 1 on, got 0",
        (path, tmp_path / "no" / "net"): "no such folder",
        (path, tmp_path): "a folder, not a file",
    }
    for (file, to, *options), message in cases.items():
        assert main(["export", str(file), "--out", str(to), *options]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert out.read_text() == "old"


@pytest.fixture(scope="module")
def saved_text(tmp_path_factory):
    """A file of a network for text, windows of a test text, and their logits."""
    folder = write_text(tmp_path_factory.mktemp("text"))
    windows = data.load(folder).test.tokens
    variables = TINY().init(jax.random.key(0), np.asarray(windows[:1], np.int32))
    quantizer = qj.uniform(3, axes="channel")
    params = quantizer.encode(variables["params"], quantizer.init(variables["params"]))
    path = folder / "net.safetensors"
    qj.save(
        path,
        {**variables, "params": params},
        metadata={"model": "text-small", "dataset": str(folder)},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "text-small", TINY)
        decoded = {**variables, "params": qj.decode(params)}
        yield path, windows, np.asarray(jax.jit(TINY().apply)(decoded, windows.astype(np.int32)))


@pytest.mark.parametrize(
    ("options", "takes", "count"),
    [
        ([], "int32 [any, 64], bytes", 12),
        (["--batch", "1"], "int32 [1, 64], bytes", 1),
        (["--batch", "5", "--pixels"], "uint8 [5, 64]", 5),
    ],
)
def test_stablehlo_of_text(saved_text, tmp_path, capsys, options, takes, count):
    path, windows, logits = saved_text
    out = tmp_path / "net.stablehlo"
    assert main(["export", str(path), "--out", str(out), *options]) == 0
    told = capsys.readouterr().out
    assert f"it takes {takes}\n" in told
    (difference,) = re.findall(rf"logits of {count} test windows: (\S+) from the library's", told)
    assert float(difference) <= 1e-4
    _, found = run(out, windows[:count].astype(takes.split()[0]))
    np.testing.assert_allclose(found, logits[:count], atol=1e-4)


def test_onnx_of_text(saved_text, tmp_path):
    pytest.importorskip("jax2onnx", reason="the extra `onnx` is not installed")
    runtime = pytest.importorskip("onnxruntime")
    path, windows, logits = saved_text
    out = tmp_path / "net.onnx"
    assert main(["export", str(path), "--out", str(out)]) == 0
    session = runtime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": windows.astype(np.int32)})[0]
    np.testing.assert_allclose(found, logits, atol=1e-4)


def test_onnx_or_what_it_takes(task, saved, tmp_path, capsys, monkeypatch):
    path, logits = saved
    out = tmp_path / "net.onnx"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "jax2onnx", None)
        assert main(["export", str(path), "--out", str(out)]) == 2
        assert 'pip install "quantjax[onnx]"' in capsys.readouterr().err
    pytest.importorskip("jax2onnx", reason="the extra `onnx` is not installed")
    runtime = pytest.importorskip("onnxruntime")
    assert main(["export", str(path), "--out", str(out)]) == 0
    assert "net.onnx: ONNX, " in capsys.readouterr().out
    session = runtime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    images = np.asarray(task.inputs(task.dataset.test.images[:20]))
    np.testing.assert_allclose(session.run(None, {"x": images})[0], logits, atol=1e-5)
