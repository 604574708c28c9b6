"""Quantized weights in the forward pass of any Flax NNX model, without editing it.

The functional interface is what the other modules use: a quantizer's `apply` makes other params of
an `nnx.state`. `quantize_weights` is that as a module, for those who train with `nnx.Optimizer`:
weights and what their grids learn are `nnx.Param`s of one model.
"""

from flax import nnx

from quantjax.core.quantizer import Quantizer, QuantState
from quantjax.nnx.input_layers import QuantParam, QuantStat


class QuantizedWeights(nnx.Module):
    """A model whose float weights pass through a quantizer at every call.

    After every optimizer step call `update`. Like nnx.Dropout it is stochastic, given rngs, unless
    `deterministic`: `model.train()` and `model.eval()` set that.
    """

    def __init__(self, model: nnx.Module, quantizer: Quantizer, rngs: nnx.Rngs | None = None):
        self.model, self.quantizer = nnx.clone(model), quantizer
        self.rngs = nnx.data(None if rngs is None else rngs["quant"].fork())
        self.deterministic = False
        state = quantizer.init(self._params(), None if self.rngs is None else self.rngs())
        self.learned = _variables(state.learned, QuantParam)
        self.buffers = _variables(state.buffers, QuantStat)
        # Of the last call: penalty and update see the very masks that it drew.
        self.key = None if self.rngs is None else QuantStat(self.rngs())

    @property
    def state(self) -> QuantState:
        """The quantizer's state, as its functions take it."""
        return QuantState(_values(self.learned), _values(self.buffers))

    def __call__(self, *args, **kwargs):
        """Returns what the model gives on quantized weights; its other variables move as ever."""
        if not self.deterministic and self.key is not None:
            self.key[...] = self.rngs()
        graph, params, rest = nnx.split(self.model, nnx.Param, ...)
        params = self.quantizer.apply(params, self.state, key=self._key())
        model = nnx.merge(graph, params, rest)
        out = model(*args, **kwargs)
        nnx.update(self.model, nnx.state(model, nnx.Not(nnx.Param)))
        return out

    def penalty(self):
        """Returns what the quantizer adds to the loss: 0 for all but learned widths."""
        return self.quantizer.penalty(self.state, key=self._key())

    def update(self):
        """Moves the quantizer's buffers: once after every optimizer step."""
        moved = self.quantizer.update(self._params(), self.state, key=self._key())
        nnx.update(self.buffers, nnx.state(_variables(moved.buffers, QuantStat)))

    def encode(self) -> dict:
        """Returns the params as nested dicts whose quantized leaves are encoded; outside of jit."""
        return self.quantizer.encode(nnx.to_pure_dict(self._params()), self.state)

    def _params(self):
        return nnx.state(self.model, nnx.Param)

    def _key(self):
        return None if self.deterministic or self.key is None else self.key[...]


def quantize_weights(
    model: nnx.Module, quantizer: Quantizer, *, rngs: nnx.Rngs | None = None
) -> QuantizedWeights:
    """Returns a module that runs a clone of `model` on quantized weights.

    Args:
      model: any NNX module, one of `quantize_inputs`, too; its float weights start the training.
      quantizer: of weights, such as `qj.lsq(2)`, or a `partition` or `chain` of them.
      rngs: with a stream `quant` or a default one, for quantizers that draw (DropBits, RQ, FQ).

    Raises:
      ValueError: no NNX model, no Quantizer, or one that owns none of the params.
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(f"expected an NNX model, got {model!r}")
    if not isinstance(quantizer, Quantizer):
        raise ValueError(
            f"expected a Quantizer of weights, got {quantizer!r}; an InputQuantizer goes to "
            "quantjax.nnx.quantize_inputs"
        )
    return QuantizedWeights(model, quantizer, rngs)


def _variables(tree, kind):
    """Returns nested nnx.Dicts of variables, in the place of dicts of arrays."""
    if isinstance(tree, dict):
        return nnx.Dict({name: _variables(part, kind) for name, part in tree.items()})
    return kind(tree)


def _values(tree):
    if isinstance(tree, nnx.Variable):
        return tree[...]
    return {name: _values(part) for name, part in tree.items()}
