"""The torch functions whose outputs can be fault sites, and what is inside of those that hide several of them."""

import types
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function


def recurrent_product(state: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product of a recurrent layer's weights [G, H] with its last state [B, H]: the share of the gates, [B, G]."""
    if has_torch_function((state, weight)):
        return handle_torch_function(recurrent_product, (state, weight), state, weight, bias)
    return F.linear(state, weight, bias)


def _functions(*names: str) -> list[Callable]:
    """These functions, wherever torch has them: in nn.functional, in torch, and as methods, in place as well."""
    places = (F, torch, torch.Tensor)
    spellings = [spelling for name in names for spelling in (name, f"{name}_")]
    return [getattr(place, name) for name in spellings for place in places if callable(getattr(place, name, None))]


_POOLS = [
    f"{way}_pool{rank}d" for way in ("max", "avg", "adaptive_max", "adaptive_avg", "lp", "fractional_max") for rank in (1, 2, 3)
]
# Kind -> its functions.
KINDS: dict[str, Sequence[Callable]] = {
    "Conv1d": [torch.conv1d],
    "Conv2d": [torch.conv2d],
    "Conv3d": [torch.conv3d],
    "Linear": [F.linear],
    "ConvTranspose1d": [torch.conv_transpose1d],
    "ConvTranspose2d": [torch.conv_transpose2d],
    "ConvTranspose3d": [torch.conv_transpose3d],
    "Bilinear": [F.bilinear],
    "Recurrent": [recurrent_product],
    "Embedding": [F.embedding, torch.embedding, F.embedding_bag],
    "MatMul": [
        *_functions("matmul", "mm", "bmm", "mv", "addmm", "addbmm", "baddbmm", "addmv", "einsum", "tensordot", "chain_matmul"),
        torch.linalg.multi_dot,
        torch.linalg.matmul,
        torch.Tensor.__rmatmul__,
        F.scaled_dot_product_attention,
    ],
    "Add": [torch.add, torch.Tensor.add, torch.Tensor.add_],
    "LayerNorm": [F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm],
    "BatchNorm": [F.batch_norm, torch.batch_norm],
    "GroupNorm": [F.group_norm, torch.group_norm, F.instance_norm, torch.instance_norm],
    "Softmax": _functions("softmax", "log_softmax"),
    "Activation": _functions(
        *("relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "silu", "gelu", "mish", "softplus", "softsign"),
        *("tanhshrink", "softshrink", "hardshrink", "sigmoid", "logsigmoid", "tanh", "hardswish", "hardsigmoid", "prelu"),
        *("rrelu", "glu", "threshold"),
    ),
    "Pool": [getattr(F, name) for name in _POOLS if hasattr(F, name)],
    "Quantize": [],  # by name, see kind_of
}
# What stands for Quantize where faults hit weights: a call that makes numbers of the integers in which weights are stored.
STORED_WEIGHT = "QuantizedWeight"
OPERATIONS: dict[Callable, str] = {function: kind for kind, functions in KINDS.items() for function in functions}
# What has no weights of its own. Which sites these are is not said one by one, where they are not asked for.
WEIGHTLESS = ("MatMul", "Add", "Softmax", "Activation", "Pool", "Quantize")
# Position of the weights among a function's arguments, where it is not 1.
_WEIGHT_AT = {
    **dict.fromkeys((F.bilinear, F.layer_norm, F.rms_norm, torch.layer_norm, torch.rms_norm), 2),
    **dict.fromkeys((F.group_norm, torch.group_norm), 2),
    **dict.fromkeys((F.batch_norm, F.instance_norm), 3),
    **dict.fromkeys((torch.batch_norm, torch.instance_norm, torch.embedding), 1),
    torch.embedding: 0,
}
# torch.convolution says by its arguments what it is: whether it is transposed, and by its weights how many dimensions it has.
_ANY_CONVOLUTION = (torch.convolution,)
# Operations of torch's eager quantisation, by their names, for not every build of torch has them.
_QUANTIZED = {
    **{f"conv{rank}d{more}": f"Conv{rank}d" for rank in (1, 2, 3) for more in ("", "_relu", "_dynamic")},
    **{f"conv_transpose{rank}d{more}": f"ConvTranspose{rank}d" for rank in (1, 2, 3) for more in ("", "_dynamic")},
    **{
        f"linear{more}": "Linear"
        for more in ("", "_relu", "_leaky_relu", "_tanh", "_dynamic", "_relu_dynamic", "_dynamic_fp16")
    },
    **dict.fromkeys(("add", "add_relu"), "Add"),
}


def kind_of(func: Callable, args: tuple, kwargs: dict) -> str | None:
    """The kind of a function's call; None where it is none of KINDS.

    Examples
    --------
    >>> import torch
    >>> from textguard.faults.operations import kind_of
    >>> kind_of(torch.conv2d, (), {}), kind_of(torch.exp, (), {})
    ('Conv2d', None)
    """
    kind = OPERATIONS.get(func)
    if kind == "Add" and not (len(args) == 2 and all(isinstance(arg, Tensor) for arg in args)):
        return None  # of two tensors, whatever their shapes: so batches of all sizes have the same calls
    if kind is None and func in _ANY_CONVOLUTION:
        transposed = kwargs.get("transposed", args[6] if len(args) > 6 else False)
        weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
        return f"Conv{'Transpose' if transposed else ''}{weight.ndim - 2}d"
    if kind is None and isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        space, _, name = str(func).partition("::" if "::" in str(func) else ".")
        if space == "quantized_decomposed":  # of graphs that torchao's convert_pt2e made
            return {"quantize": "Quantize", "dequantize": STORED_WEIGHT}.get(name.partition("_per_")[0])
        return _QUANTIZED.get(name.partition(".")[0]) if space == "quantized" else None
    return kind


def weight_of(func: Callable, kind: str, args: tuple, kwargs: dict) -> Tensor | None:
    """The weights of a call: None where it has none, or where the operation packs them away."""
    if kind in WEIGHTLESS:
        # x @ self.w, and in any other spelling where the images come first, reads weights as a layer does.
        found = args[1] if len(args) > 1 and kind == "MatMul" and isinstance(args[0], Tensor) else None
        return found if isinstance(found, nn.Parameter) else None
    if kind == STORED_WEIGHT:
        return args[0]
    at = _WEIGHT_AT.get(func, 1)
    found = args[at] if len(args) > at else kwargs.get("weight")
    return found if isinstance(found, Tensor) else None


def _opened(function: Callable) -> Callable:
    """The same function, which runs its body where torch would hand the whole call to a mode. So a mode sees what is inside."""
    own = {**function.__globals__, "has_torch_function": lambda args: False}
    copy = types.FunctionType(function.__code__, own, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _lstm_step(gates: Tensor, product: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    i, f, g, o = (gates + product).chunk(4, dim=-1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru_step(gates: Tensor, product: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (r, z, n), (hidden_r, hidden_z, hidden_n) = gates.chunk(3, dim=-1), product.chunk(3, dim=-1)
    r, z = (r + hidden_r).sigmoid(), (z + hidden_z).sigmoid()
    n = (n + r * hidden_n).tanh()
    return ((state[0] - n) * z + n,)


def _rnn_step(activation: Callable) -> Callable:
    return lambda gates, product, state: (activation(gates + product),)


_STEPS = {"lstm": _lstm_step, "gru": _gru_step, "rnn_tanh": _rnn_step(torch.tanh), "rnn_relu": _rnn_step(torch.relu)}


def _step(step: Callable, gates: Tensor, product: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # What lies between the products is not to be heard: neither fused kernels nor users name it.
    with torch._C.DisableTorchFunction():
        return step(gates, product, state)


def _layers(name: str) -> Callable:
    """Torch's recurrent layers in steps: one product for the inputs of all times, then one for each time's state."""
    step, states = _STEPS[name], 2 if name == "lstm" else 1

    def run(
        x: Tensor,
        hx: Tensor | Sequence[Tensor],
        weights: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        x = x.transpose(0, 1) if batch_first else x
        starts = tuple(hx) if states == 2 else (hx,)
        rows, ends = iter(weights), [[] for _ in range(states)]
        for layer in range(num_layers):
            outputs = []
            for direction in range(2 if bidirectional else 1):
                inner, recurrent = next(rows), next(rows)
                biases = (next(rows), next(rows)) if has_biases else (None, None)
                gates = F.linear(x, inner, biases[0])
                state = tuple(start[layer * (2 if bidirectional else 1) + direction] for start in starts)
                times, found = range(len(x)), [None] * len(x)
                for time in reversed(times) if direction else times:
                    state = _step(step, gates[time], recurrent_product(state[0], recurrent, biases[1]), state)
                    found[time] = state[0]
                outputs.append(torch.stack(found))
                for end, part in zip(ends, state, strict=True):
                    end.append(part)
            x = torch.cat(outputs, dim=-1)
        return x.transpose(0, 1) if batch_first else x, *(torch.stack(end) for end in ends)

    return run


def _cell(name: str) -> Callable:
    step = _STEPS[name]

    def run(x: Tensor, hx: Tensor | Sequence[Tensor], inner: Tensor, recurrent: Tensor, *biases: Tensor | None) -> object:
        state = tuple(hx) if name == "lstm" else (hx,)
        first, second = biases or (None, None)
        found = _step(step, F.linear(x, inner, first), recurrent_product(state[0], recurrent, second), state)
        return found if name == "lstm" else found[0]

    return run


_OPENED: dict[Callable, Callable] = {F.multi_head_attention_forward: _opened(F.multi_head_attention_forward)}
_OPENED |= {getattr(torch, name): _layers(name) for name in _STEPS}
_OPENED |= {getattr(torch, f"{name}_cell"): _cell(name) for name in _STEPS}
_LAYERS = tuple(getattr(torch, name) for name in _STEPS)


def inside_of(func: Callable, args: tuple) -> Callable | None:
    """A function that does the same as `func` by operations that a mode sees; None where there is none.

    torch's attention, and its recurrent layers and cells, hide several operations in one call. Packed sequences, recurrent
    layers that project their states, and those that drop at random stay closed.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from textguard.faults.operations import inside_of
    >>> cell, x, h = nn.GRUCell(3, 4), torch.randn(2, 3), torch.randn(2, 4)
    >>> args = (x, h, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    >>> torch.allclose(inside_of(torch.gru_cell, args)(*args), cell(x, h), atol=1e-6)
    True
    """
    found = _OPENED.get(func)
    if found is None or func not in _LAYERS:
        return found
    if len(args) != 9 or isinstance(args[3], (Tensor, tuple, list)):
        return None  # packed: the images' rows are mixed, more of them at early times
    _, _, weights, has_biases, num_layers, dropout, train, bidirectional, _ = args
    projected = len(weights) != num_layers * (1 + bidirectional) * (4 if has_biases else 2)
    return None if projected or (train and dropout) else found
