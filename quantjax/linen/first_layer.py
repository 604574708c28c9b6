"""Gradients of a learned input grid where the input itself needs none, as a network's data.

Through x_hat, reverse mode would compute the gradient of a whole image by a transposed convolution,
only to sum it against d x_hat / d value. Where nothing differentiates x, the gradient of a scalar
value is the cotangent of y times layer(d x_hat / d value), the layer without its bias: one
convolution as in the forward pass.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from quantjax.core import meshes


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def output(layer: Callable, slopes: Callable, x, x_hat, values, buffers, params, y):
    """Returns y, the output of a layer, differentiated as said above where x is not.

    Args:
      layer: (params, x) -> y, linear in x without a bias, and in params; a static argument.
      slopes: of the input quantizer's `Scalars`; a static argument.
      x, x_hat, values, buffers: what the input quantizer takes, gives, and knows.
      params: of the layer, a dict with a kernel and perhaps a bias.
      y: layer(params, x_hat), nothing else.
    """
    del layer, slopes, x, x_hat, values, buffers, params
    return y


@functools.partial(output.defjvp, symbolic_zeros=True)
def _output_jvp(layer, slopes, primals, tangents):
    x, x_hat, values, buffers, params, y = primals
    of_x, _, of_values, _, of_params, of_y = tangents
    if type(of_x) is not SymbolicZero:
        return y, of_y
    total = jnp.zeros_like(y)
    if any(type(tangent) is not SymbolicZero for tangent in of_params.values()):
        total += layer({name: _filled(of_params[name]) for name in params}, x_hat)
    if all(type(tangent) is SymbolicZero for tangent in of_values):
        return y, total
    kernel = {"kernel": params["kernel"]}
    found = meshes.typed_as((x,) * len(values), slopes, x, values, buffers)
    for slope, tangent in zip(found, of_values, strict=True):
        if type(tangent) is not SymbolicZero:
            # Summed over y in the dtype of the value, as the gradient of x_hat would be.
            change = layer(kernel, slope.astype(x.dtype)).astype(tangent.dtype)
            total += (tangent * change).astype(y.dtype)
    return y, total


def _filled(tangent):
    """Returns a tangent as an array."""
    return jnp.zeros(tangent.shape, tangent.dtype) if type(tangent) is SymbolicZero else tangent
