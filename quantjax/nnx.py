"""Quantized layer inputs for any Flax NNX model, without editing it.

NNX has no interceptor, but its layers pass their input through an attribute, `promote_dtype`.
`quantize_inputs` clones the model and puts an `ActQuant` there, a module that holds the state of
an `InputQuantizer`: the paths of all kernels stay, so that float checkpoints still load.
"""

from collections.abc import Callable, Iterable

from flax import nnx
from jax import lax

from quantjax import inputs
from quantjax.core.quantizer import InputQuantizer, QuantState

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
        self.fitted = self.calibrating = False
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
        update = self.fitted and (self.calibrating or not self.use_running_average)
        if not self.fitted:
            if not self.calibrating:
                raise ValueError(
                    f"{self.path or 'the model itself'}: the input quantizer is not fitted; call "
                    "quantjax.nnx.calibrate(model, batch) once, outside of jit"
                )
            learned, buffers = self.quantizer.init(lax.stop_gradient(x))
            self.learned.update({name: QuantParam(value) for name, value in learned.items()})
            self.buffers.update({name: QuantStat(value) for name, value in buffers.items()})
            self.fitted = True
        state = QuantState(
            *({name: var[...] for name, var in d.items()} for d in (self.learned, self.buffers))
        )
        key = None if self.deterministic or self.rngs is None else self.rngs()
        x_hat, state = self.quantizer.apply(x, state, key=key, update=update)
        if update:
            for name, value in state.buffers.items():
                self.buffers[name][...] = value
        return x_hat


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
    every batch norm and dropout of the model is, otherwise in training mode.

    Raises:
      ValueError: a quantizer that is none; a pattern that matches no layer or is wholly shadowed;
        a layer that is quantized already.
    """
    quantizers = inputs.by_pattern(quantizer)
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
    return model


def calibrate(model: nnx.Module, batches: Iterable, **kwargs) -> None:
    """Fits the input quantizers of `model` to the first batch and updates them with the others.

    Args:
      model: what `quantize_inputs` returned; changed in place. It runs in the mode it is in: after
        `model.eval()`, batch norm and dropout stay as they are.
      batches: inputs of the model, arrays or trees of arrays; a single array is one batch.
      **kwargs: further arguments of the model.

    Not under jit: it creates the state. A quantized checkpoint loads into a model that was
    calibrated on any batch. nnx.scan over stacked layers fits one state per layer; inside a loop
    that carries its layers (nnx.RNN) the state cannot be created: leave those layers out.

    Raises:
      ValueError: no batches, nothing to calibrate, or a layer that these batches did not reach.
    """
    acts = [module for _, module in nnx.iter_modules(model) if isinstance(module, ActQuant)]
    if not acts:
        raise ValueError("the model quantizes no inputs: pass what quantize_inputs returned")
    batches = [batches] if hasattr(batches, "shape") else batches
    ran = False
    try:
        for act in acts:
            act.calibrating = True
        for batch in batches:
            model(batch, **kwargs)
            ran = True
    finally:
        for act in acts:
            act.calibrating = False
    if not ran:
        raise ValueError("calibrate needs at least one batch")
    unfitted = [act.path for act in acts if not act.fitted]
    if unfitted:
        raise ValueError(
            f"these layers saw no input: {unfitted}. Leave out with `where`, or with a pattern "
            "that maps to None, what the model does not call or what ignores promote_dtype"
        )
