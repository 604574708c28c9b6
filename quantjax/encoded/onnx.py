"""Networks as ONNX: packed integers in the file, made floats in the graph, by jax2onnx.

Codes are INT2 (opset 25), INT4, INT8 or INT16, whichever is the least that holds them: three levels
take 2 bits, 3 bits take 4, and every basis of a MultiBit 2, pruned slots of a kept one included.

The scale is a product of its own: DequantizeLinear with the scale inside, before a product, is what
ONNX Runtime (1.32, CPU) turns into products of inputs in 8 bits, 2% beside the exact logits.
"""

import math

import jax
import numpy as np
from jax.extend.core import jaxpr_as_fun

from quantjax.core import checks, qarray
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
    if batch is not None:
        batch = checks.whole("batch", batch, 1)
    inputs, input_tree = jax.tree.flatten(export_lib.specs(example, batch))
    pairs, treedef = jax.tree_util.tree_flatten_with_path(variables, is_leaf=qarray.is_encoded)
    graph, specs = _Graph(), []
    for key_path, leaf in pairs:
        name = jax.tree_util.keystr(key_path, simple=True, separator="/")
        try:
            specs.append(graph.add(name, leaf))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def flat(*arrays):
        given = input_tree.unflatten(arrays[: len(inputs)])
        return apply(treedef.unflatten(arrays[len(inputs) :]), given)

    # Traced here: under jax2onnx's patches of Flax the layers never meet an interceptor, and
    # quantized inputs would be left out without a word.
    with export_lib.named_rows():
        closed = jax.make_jaxpr(flat)(*inputs, *specs)
    names = ["x"] if len(inputs) == 1 else [f"x_{i}" for i in range(len(inputs))]
    model = jax2onnx.to_onnx(
        jaxpr_as_fun(closed),
        [*inputs, *specs],
        model_name="quantjax",
        opset=OPSET_OF_INT2 if graph.narrow else OPSET,
        input_names=names + graph.names,
    )
    del model.graph.input[len(inputs) :]
    own = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*graph.nodes, *own])  # sorted as they depend on each other
    model.graph.initializer.extend(graph.initializers)
    onnx.checker.check_model(model)
    return model.SerializeToString()


class _Graph:
    """Initializers of packed leaves, and the nodes that make floats of them."""

    def __init__(self):
        self.names, self.nodes, self.initializers, self.narrow = [], [], [], False

    def add(self, name, leaf) -> jax.ShapeDtypeStruct:
        """Adds what gives a tensor `name`, the decoded leaf; returns its shape and dtype."""
        self.names.append(name)
        if not qarray.is_encoded(leaf):
            array = leaves_lib.plain(leaf)
            self._constant(name, array)
            return jax.ShapeDtypeStruct(array.shape, array.dtype)
        leaf.validate()
        if isinstance(leaf, qarray.Grid):
            codes = self._codes(f"{name}.codes", np.asarray(leaf.codes), leaf.bits, signed=True)
            value = self._scaled(f"{name}.grid", codes, leaf.step)
        elif isinstance(leaf, qarray.Table):
            value = self._table(name, leaf)
        else:
            value = self._bases(name, leaf)
        self._node("Cast", [value], name, to=_kind(leaf.dtype))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

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
        basis, coords, mask = leaves_lib.kept_first(leaf)
        slots = max(1, int(mask.sum(axis=-1).max(initial=0)))
        parts = []
        for k in range(slots):
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
