"""Relaxed quantization (RQ): rounding as a sample of the categories, by Gumbel-Softmax.

It forms all 2**bits categories of every element: the baseline that SRQ does without.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from quantjax.core import checks, qarray, rounding
from quantjax.core.quantizer import InputQuantizer, Quantizer, QuantState, leafwise
from quantjax.methods import categories


def log_categories(x, alpha, sigma, codes):
    """Returns log pi_i of eq. 1 for every code, on a new last axis; not normalised."""
    return categories.log_masses(x * (1 / alpha), alpha / sigma, codes)
