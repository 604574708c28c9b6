"""Quantized layer inputs for any Flax NNX model, without editing it.

NNX has no interceptor, but its layers pass their input through an attribute, `promote_dtype`.
`quantize_inputs` clones the model and puts an `ActQuant` there, a module that holds the state of
an `InputQuantizer`: the paths of all kernels stay, so that float checkpoints still load.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from quantjax import inputs
from quantjax.core import passes
from quantjax.core.quantizer import InputQuantizer, QuantState, at
from quantjax.nnx.derived import derived

LAYERS = (nnx.Conv, nnx.ConvTranspose, nnx.Linear, nnx.LinearGeneral)


class QuantParam(nnx.Param):
    """A learned value of an input quantizer."""


class QuantStat(nnx.Variable):
    """A buffer of an input quantizer: a running range, a step, a count."""


class ActQuant(nnx.Module):
    """Quantizes the input of the layer whose `promote_dtype` it is, then promotes as before.

    Like nnx.BatchNorm it updates its statistics unless `use_running_average`, like nnx.Dropout it
    is stochastic (given an rng stream) unless `deterministic`: `model.train()` and `model.eval()`
    set both.
    """

    def __init__(self, quantizer: InputQuantizer, promote: Callable, path: str, rngs=None):
        self.quantizer, self.promote, self.path = quantizer, promote, path
        self.learned, self.buffers = nnx.Dict(), nnx.Dict()  # name -> QuantParam, QuantStat
        self.rngs = nnx.data(None if rngs is None else rngs["quant"].fork())
        self.fitted = self.calibrating = self.in_pass = False
        self.note = None  # while calibrating: takes the path and how many values are not finite
        self.use_running_average = self.deterministic = False

    def __call__(self, args, **kwargs):
        """Returns `promote((quantized input, kernel, bias), dtype=...)`."""
        x, kernel, *others = args
        x = self.quantize(inputs.as_float(x, kwargs.get("dtype") or kernel.dtype))
        return self.promote((x, kernel, *others), **kwargs)

    def quantize(self, x):
        """Returns x on its grid; fits the state first while calibrating, or updates it.

        Raises:
          ValueError: there is no state yet.
        """
        fitting = not self.fitted
        if fitting:
            self._fit(x)
        if self.note is not None:
            note = functools.partial(self.note, self.path or "the model itself")
            jax.debug.callback(note, jnp.sum(~jnp.isfinite(x)))
        update = not fitting and self.updates
        state = QuantState(
            *({name: var[...] for name, var in d.items()} for d in (self.learned, self.buffers))
        )
        key = None if self.deterministic or self.rngs is None else self.rngs()
        with at(self.path or "the model itself"):
            x_hat, state = self.quantizer.apply(x, state, key=key, update=update)
        buffers = state.buffers
        if self.in_pass and (fitting or update):
            buffers = passes.called(buffers, fitting=fitting)
        if fitting or update:
            for name, value in buffers.items():
                self.buffers[name][...] = value
        if update and self.calibrating:  # fitted again where it is the fitting pass
            for name, value in state.learned.items():
                self.learned[name][...] = value
        return x_hat

    @property
    def updates(self) -> bool:
        """Whether a call moves the statistics."""
        return self.calibrating or not self.use_running_average

    def _fit(self, x):
        path = self.path or "the model itself"
        if not self.calibrating:
            raise ValueError(
                f"{path}: the input quantizer is not fitted; call "
                "quantjax.nnx.calibrate(model, batch) once, outside of jit"
            )
        with at(path):
            learned, buffers = self.quantizer.init(lax.stop_gradient(x))
        self.learned.update({name: QuantParam(value) for name, value in learned.items()})
        self.buffers.update({name: QuantStat(value) for name, value in buffers.items()})
        self.fitted = True

    def end_pass(self):
        """The next call begins another pass."""
        values = {name: variable[...] for name, variable in self.buffers.items()}
        for name, value in passes.end(values).items():
            if value is not values[name]:
                self.buffers[name].set_value(value)


def quantize_inputs(model: nnx.Module, quantizer, where: str = ".*", *, rngs=None) -> nnx.Module:
    """Returns a clone of `model` with quantized inputs of its Conv and Linear layers.

    Args:
      model: any NNX module; Conv, ConvTranspose, Linear and LinearGeneral layers are touched.
      quantizer: an InputQuantizer, or {pattern: InputQuantizer, or None for layers that stay as
        they are}; the first pattern that matches a layer's path (`blocks/0/conv`) takes it, a
        match ending at a `/` or at the path's end. A layer used in several places has the first
        of its paths.
      where: the pattern of the layers that are considered at all.
      rngs: nnx.Rngs; with it, passes are stochastic in training mode, from the stream `quant`.

    The clone must be fitted by `calibrate` before its first use. It starts in evaluation mode if
    every batch norm and dropout of the model is, otherwise in training mode. Its class is one of
    the same name made for it: what a layer sees in one call of the clone counts once, however
    often the layer is called there. In other methods of the model every call counts. A step that
    loss scaling skips leaves all as it was if the loop keeps the old `QuantStat` state, as it keeps
    the params.

    Raises:
      ValueError: a quantizer that is none; no NNX model; a pattern that matches no layer or is
        wholly shadowed; a layer that is quantized already.
    """
    quantizers = inputs.by_pattern(quantizer)
    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"expected an NNX model, got {model!r}; model.apply of a Linen model goes to "
            "quantjax.linen.quantize_inputs"
        )
    model = nnx.clone(model)
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    layers = {path: module for path, module in modules.items() if isinstance(module, LAYERS)}
    inputs.check_patterns(quantizers, where, layers)
    modes = [
        getattr(module, name)
        for module in modules.values()
        for name in ("use_running_average", "deterministic")
        if hasattr(module, name)
    ]
    evaluating = bool(modes) and all(modes)
    for path, layer in layers.items():
        chosen = inputs.choose(quantizers, where, path)
        if chosen is None:
            continue
        if isinstance(layer.promote_dtype, ActQuant):
            raise ValueError(f"{path}: the inputs of this layer are quantized already")
        act = ActQuant(chosen, layer.promote_dtype, path, rngs)
        act.use_running_average = act.deterministic = evaluating
        layer.promote_dtype = nnx.data(act)
    model.__class__ = _counting_passes(type(model))
    return model


def calibrate(model: nnx.Module, batches: Iterable, **kwargs) -> None:
    """Fits the input quantizers of `model` to the first batch and updates them with the others.

    Args:
      model: what `quantize_inputs` returned, or a part of it; changed in place, and what was fitted
        before is dropped. It runs in the mode it is in: after `model.eval()`, batch norm and
        dropout stay as they are.
      batches: inputs of the model, arrays or trees of arrays; a single array is one batch.
      **kwargs: further arguments of the model.

    Not under jit: it creates the state. A quantized checkpoint loads into a model that was
    calibrated on any batch. nnx.scan over stacked layers fits one state per layer. Inside a loop
    that carries its layers (nnx.RNN) a state can be read and updated, one grid over time, but not
    made: calibrate the cell by itself first, `calibrate(model.rnn.cell, [carry], inputs=x[:, 0])`;
    the model's calibration then keeps and updates it.

    Raises:
      ValueError: no batches, nothing to calibrate, a layer that these batches did not reach, or
        that is in a loop over time; a batch that gives a layer NaN or infinity (with its path).
        The state is then as before.
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(f"expected what quantize_inputs returned, got {model!r}")
    acts = [module for _, module in nnx.iter_modules(model) if isinstance(module, ActQuant)]
    if not acts:
        raise ValueError("the model quantizes no inputs: pass what quantize_inputs returned")
    batches = [batches] if hasattr(batches, "shape") else batches
    in_loops = _in_loops(model)
    for act in acts:
        if act in in_loops and not act.fitted:
            raise ValueError(
                f"{act.path}: a loop over time cannot make the state of an input quantizer. "
                "Calibrate the cell by itself first, `calibrate(model.rnn.cell, [carry], "
                "inputs=x[:, 0])`, or leave the layer out with {pattern: None}"
            )
    before = [(act, act.learned, act.buffers, act.fitted) for act in acts]
    bad, ran = {}, False

    def note(path, count):
        bad[path] = bad.get(path, 0) + int(count)

    try:
        for act in acts:
            act.calibrating, act.note = True, note
            if act not in in_loops:
                act.learned, act.buffers, act.fitted = nnx.Dict(), nnx.Dict(), False
        for number, batch in enumerate(batches):
            with _one_pass(model):
                model(batch, **kwargs)
            jax.effects_barrier()
            inputs.refuse(number, bad)
            ran = True
        if not ran:
            raise ValueError("calibrate needs at least one batch")
        unfitted = [act.path for act in acts if not act.fitted]
        if unfitted:
            raise ValueError(
                f"these layers saw no input: {unfitted}. Leave out with `where`, or with a pattern "
                "that maps to None, what the model does not call or what ignores promote_dtype"
            )
    except BaseException:
        for act, *state in before:
            act.learned, act.buffers, act.fitted = state
        raise
    finally:
        for act in acts:
            act.calibrating, act.note = False, None


def _in_loops(model) -> list[ActQuant]:
    """Returns what lies in a loop over time."""
    loops = [module for _, module in nnx.iter_modules(model) if isinstance(module, nnx.RNN)]
    found = [module for loop in loops for _, module in nnx.iter_modules(loop)]
    return [module for module in found if isinstance(module, ActQuant)]


@contextlib.contextmanager
def _one_pass(model):
    """Inside, all calls of a layer whose statistics move count as one."""
    acts = [module for _, module in nnx.iter_modules(model) if isinstance(module, ActQuant)]
    moving = [act for act in acts if act.calibrating or (act.fitted and act.updates)]
    moving = [act for act in moving if not act.in_pass]
    for act in moving:
        act.in_pass = True
    try:
        yield
    finally:
        for act in moving:
            act.in_pass = False
            act.end_pass()


@functools.cache
def _counting_passes(cls: type) -> type:
    """Returns the class of a model whose every call is one pass."""

    def call(self, *args, **kwargs):
        with _one_pass(self):
            return cls.__call__(self, *args, **kwargs)

    return derived(cls, _counting_passes, call if "__call__" in dir(cls) else None)
