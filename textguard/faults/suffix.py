"""Layers as replays run them: what comes after a fault's layer need not be computed layer by layer, and need not be kept."""

import copy
import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from textguard.faults.graph import ACTIVATIONS, TracedModel

Shortcut = tuple[fx.Node, Callable[[Tensor], Tensor]]

# The outputs of these lie in memory of their own.
FRESH = (nn.Conv2d, nn.BatchNorm2d, nn.Linear, operator.add, torch.add)


def shortcuts(traced: TracedModel) -> dict[fx.Node, Shortcut]:
    """The faster ways to run some steps of a traced model, in replays that start before them.

    Parameters
    ----------
    traced : TracedModel
        The model.

    Returns
    -------
    dict of fx.Node to (fx.Node, callable)
        Step -> the step whose value the shortcut gives, and the shortcut, from the input of the first to that value.
    """
    return _convolutions(traced) | _activations(traced)


def _activations(traced: TracedModel) -> dict[fx.Node, Shortcut]:
    """Activations that overwrite their input, which takes two thirds of the time.

    They may where no other step reads the input, and where its memory is not that of another value.
    """
    found: dict[fx.Node, Shortcut] = {}
    for step in traced.steps:
        module = traced.modules.get(step.target) if step.op == "call_module" else None
        if type(module) not in ACTIVATIONS or not hasattr(module, "inplace") or not traced.is_plain(step):
            continue
        source = step.args[0]
        fresh = traced.operation(source) in FRESH and (source.op == "call_function" or traced.is_plain(source))
        if fresh and len(source.users) == 1 and traced.depends_on_images(source):
            found[step] = (step, copy.copy(module))
            found[step][1].inplace = True
    return found


def _convolutions(traced: TracedModel) -> dict[fx.Node, Shortcut]:
    """Convolutions together with the BatchNorm behind them, and convolutions as matrix products.

    Folding BatchNorm into the convolution makes MobileNet-V2 at 224 x 224 1.6 times as fast. On a map so small that every
    output sees every input, a convolution is a matrix product, which is 5 times as fast for 512 channels at 1 x 1. A fault in
    the convolution's own output never meets a shortcut, because its replay starts behind the convolution.
    """
    found = {}
    for step in traced.steps:
        conv = traced.modules.get(step.target) if step.op == "call_module" else None
        if (
            type(conv) is not nn.Conv2d
            or not traced.is_plain(step)
            or conv.padding_mode != "zeros"
            or isinstance(conv.padding, str)
        ):
            continue
        weight, bias, end = conv.weight, conv.bias, step
        readers = list(step.users)
        norm = traced.modules.get(readers[0].target) if len(readers) == 1 and readers[0].op == "call_module" else None
        if type(norm) is nn.BatchNorm2d and traced.is_plain(readers[0]) and norm.running_mean is not None:
            statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
            (weight, bias), end = fuse_conv_bn_weights(weight, bias, *statistics), readers[0]
        as_matrix = _as_matrix(conv, weight.detach(), traced.shapes[step.args[0]])
        if as_matrix is not None:
            found[step] = (end, matrix_product(as_matrix, bias, traced.shapes[step]))
        elif end is not step:
            found[step] = (end, _convolution(conv, weight.detach(), bias))
    return found


def _convolution(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """A convolution with these weights, and `conv`'s geometry."""
    weight = weight.contiguous(memory_format=torch.channels_last)

    def run(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    return run


def _as_matrix(conv: nn.Conv2d, weight: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The convolution of maps of `shape` as a matrix [outputs, inputs], both in the order height, width, channel.

    None where some output does not see some input. The matrix would multiply that input by 0, which makes NaN of an infinity.
    """
    channels, height, width = shape
    if conv.groups > 1 or height * width > 16:
        return None
    settings = (None, conv.stride, conv.padding, conv.dilation)
    pixels = torch.eye(height * width, device=weight.device).reshape(-1, 1, height, width)
    if not F.conv2d(pixels, torch.ones_like(weight[:1, :1]), *settings).all():
        return None
    # Made in this order, not permuted to it: oneDNN (torch 2.13) errs on permuted inputs with one channel and unequal strides.
    inputs = torch.eye(channels * height * width, device=weight.device).reshape(-1, channels, height, width)
    found = F.conv2d(inputs, weight, *settings).unflatten(0, (channels, height, width))
    return found.permute(4, 5, 3, 1, 2, 0).flatten(3).flatten(0, 2).contiguous()


def matrix_product(matrix: Tensor, bias: Tensor | None, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """A convolution as a matrix product.

    Parameters
    ----------
    matrix : Tensor
        float32 [H * W * C, inputs], both in the order height, width, channel.
    bias : Tensor or None
        float32 [C].
    shape : tuple of int
        (C, H, W) of the output.

    Returns
    -------
    callable
        From maps [N, channels, height, width] to maps [N, C, H, W].
    """
    channels, height, width = shape
    bias = bias if bias is None else bias.detach().repeat(height * width)

    def run(x: Tensor) -> Tensor:
        product = F.linear(x.permute(0, 2, 3, 1).flatten(1), matrix, bias)
        return product.unflatten(1, (height, width, channels)).permute(0, 3, 1, 2)

    return run
