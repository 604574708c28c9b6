"""Networks as ONNX: packed integers in the file, made floats in the graph, by jax2onnx.

Codes are INT2 (opset 25), INT4, INT8 or INT16, whichever is the least that holds them: three levels
take 2 bits, 3 bits take 4, and every basis of a MultiBit 2, pruned slots of a kept one included.

The scale is a product of its own: DequantizeLinear with the scale inside, before a product, is what
ONNX Runtime (1.32, CPU) turns into products of inputs in 8 bits, 2% beside the exact logits.
"""

import math

import jax
import numpy as np

from quantjax.core import qarray
from quantjax.encoded import export as export_lib
from quantjax.encoded import leaves as leaves_lib
from quantjax.encoded import packing

WIDTHS = (2, 4, 8, 16)
OPSET = 23
OPSET_OF_INT2 = 25


def export_onnx(apply, variables, example, *, batch: int | None = None) -> bytes:
    """Returns `apply` with its variables as an ONNX model with packed weights.

    Args:
      apply, variables, example, batch: as in `export`; inputs are named `x`, or `x_0`, `x_1`, ...

    Raises:
      ValueError: as `export`.
      ImportError: jax2onnx is missing.
    """
    try:
        import jax2onnx
        import onnx
    except ImportError as error:
        raise ImportError('ONNX takes: pip install "quantjax[onnx]"') from error
    leaves = export_lib.by_name(variables, _Leaf)
    # Traced here: under jax2onnx's patches of Flax the layers never meet an interceptor, and
    # quantized inputs would be left out without a word.
    trace = export_lib.traced(apply, variables, example, batch)
    inputs = jax.tree.leaves(trace.inputs)
    names = ["x"] if len(inputs) == 1 else [f"x_{i}" for i in range(len(inputs))]
    model = jax2onnx.to_onnx(
        trace.call,
        [*trace.leaves.values(), *inputs],
        model_name="quantjax",
        opset=OPSET_OF_INT2 if any(leaf.narrow for leaf in leaves.values()) else OPSET,
        input_names=[*leaves, *names],
    )
    del model.graph.input[: len(leaves)]
    own, used = list(model.graph.node), [leaves[name] for name in trace.used]
    del model.graph.node[:]  # nodes come after those that they depend on
    model.graph.node.extend([*(node for leaf in used for node in leaf.nodes), *own])
    model.graph.initializer.extend(tensor for leaf in used for tensor in leaf.initializers)
    onnx.checker.check_model(model)
    return model.SerializeToString()


class _Leaf:
    """The initializers of a leaf, and the nodes that make of them a tensor of its name."""

    def __init__(self, name, leaf):
        self.nodes, self.initializers, self.narrow = [], [], False
        if not qarray.is_encoded(leaf):
            array = leaves_lib.plain(leaf)
            self._constant(name, array.astype(jax.dtypes.canonicalize_dtype(array.dtype)))
        else:
            self._node("Cast", [self._floats(name, leaf.validate())], name, to=_kind(leaf.dtype))

    def _floats(self, name, leaf):
        if isinstance(leaf, qarray.Grid):
            codes = self._codes(f"{name}.codes", np.asarray(leaf.codes), leaf.bits, signed=True)
            return self._scaled(f"{name}.grid", codes, leaf.step)
        return (self._table if isinstance(leaf, qarray.Table) else self._bases)(name, leaf)

    def _table(self, name, leaf):
        codes = self._codes(f"{name}.codes", np.asarray(leaf.codes), leaf.bits, signed=False)
        index = self._node("Cast", [codes], f"{name}.code", to=_kind(np.int32))
        group, length = leaf.levels.shape[:-1], leaf.levels.shape[-1]
        if math.prod(group) > 1:
            starts = np.arange(math.prod(group), dtype=np.int32).reshape(group) * np.int32(length)
            starts = self._constant(f"{name}.starts", starts)
            index = self._node("Add", [index, starts], f"{name}.index")
        levels = self._constant(f"{name}.levels", np.asarray(leaf.levels).ravel())
        return self._node("Gather", [levels, index], f"{name}.level")

    def _bases(self, name, leaf):
        basis, coords, mask = qarray.kept_first(leaf)
        parts = []
        for k in range(mask.shape[-1]):
            codes = self._codes(f"{name}.basis{k}", basis[..., k], 2, signed=True)
            kept = np.where(mask[..., k], coords[..., k], 0)
            parts.append(self._scaled(f"{name}.slot{k}", codes, kept.astype(coords.dtype)))
        total = self._node("Sum", parts, f"{name}.sum")
        shape = self._constant(f"{name}.shape", np.array(leaf.shape, np.int64))
        return self._node("Reshape", [total, shape], f"{name}.view")

    def _scaled(self, name, codes, scales):
        scales = np.asarray(scales)
        one = self._constant(f"{name}.one", np.ones((), scales.dtype))
        # Runtimes fold a Cast of constants into floats when they load; this they leave.
        floats = self._node("DequantizeLinear", [codes, one], f"{name}.floats")
        return self._node("Mul", [floats, self._constant(f"{name}.scales", scales)], name)

    def _codes(self, name, codes, bits, *, signed):
        from onnx import TensorProto, helper

        width = next(width for width in WIDTHS if width >= bits)
        self.narrow |= width == 2
        kind = getattr(TensorProto, f"{'INT' if signed else 'UINT'}{width}")
        # The first code lies in the lowest bits, there as here.
        symbols = (codes.ravel().astype(np.int32) & (2**width - 1)).astype(np.uint16)
        data = packing.pack(symbols, 2**width).tobytes()
        self.initializers.append(helper.make_tensor(name, kind, codes.shape, data, raw=True))
        return name

    def _constant(self, name, array):
        from onnx import helper

        data = np.ascontiguousarray(array).tobytes()
        tensor = helper.make_tensor(name, _kind(array.dtype), array.shape, data, raw=True)
        self.initializers.append(tensor)
        return name

    def _node(self, kind, inputs, name, **attributes):
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name


def _kind(dtype) -> int:
    from onnx import helper

    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
