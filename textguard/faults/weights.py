"""Stored weights: who reads them, where faults in them strike, and what a number format rounds."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from textguard.faults.sites import SURVEYED, Site

# The torch functions that multiply activations by what they read, by their names.
PRODUCTS = (
    *("linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "baddbmm", "addbmm", "einsum"),
    *("tensordot", "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("multi_head_attention_forward", "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell"),
    *("rnn_relu_cell", "scaled_dot_product_attention", "embedding", "embedding_bag"),
)


class Reads(TorchFunctionMode):
    """A context that notes which torch functions read which parameters and buffers of a model.

    A view of a parameter, such as its transpose, counts as the parameter. What only asks for a shape or a type reads nothing.

    Parameters
    ----------
    model : nn.Module
        The model.

    Attributes
    ----------
    readers : dict of str to list of callable
        Name in the state dict -> the functions that were called with it, in order. Of tied names, the first one stands for all.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from textguard.faults.weights import Reads
    >>> layer = nn.Linear(2, 2)
    >>> with Reads(layer) as reads:
    ...     logits = layer(layer(torch.zeros(1, 2)))
    >>> [reader.__name__ for reader in reads.readers["weight"]]
    ['linear', 'linear']
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.readers: dict[str, list[Any]] = {}
        self._name = {id(tensor): name for name, tensor in (*model.named_buffers(), *model.named_parameters())}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Called by torch in place of `func`."""
        output = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(output)):
            found = (self._of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            for name in dict.fromkeys(name for name in found if name):
                self.readers.setdefault(name, []).append(func)
        return output

    def _of(self, tensor: Tensor) -> str | None:
        with torch._C.DisableTorchFunction():
            return self._name.get(id(tensor)) or (self._name.get(id(tensor._base)) if tensor._is_view() else None)


@torch.inference_mode(False)  # views of inference mode do not know what they are views of
@torch.no_grad()
def weight_readers(model: nn.Module, image: Tensor) -> dict[str, list[Any]]:
    """Parameter or buffer -> the torch functions that read it in one inference, see `Reads`. image: one, [...]."""
    with Reads(model) as reads:
        model(image.expand(SURVEYED[0], *image.shape).clone())
    return reads.readers


def matrices(readers: Mapping[str, Sequence[Any]]) -> list[str]:
    """The parameters and buffers that a product reads: of weights, as of a convolution, a recurrent layer or an attention."""
    return [name for name, functions in readers.items() if any(function.__name__ in PRODUCTS for function in functions)]


def one_per_weight(sites: Sequence[Site]) -> list[Site]:
    """The sites without those that read the weights of an earlier one: a stored weight is one place for faults."""
    first: dict[str, Site] = {}
    for site in sites:
        first.setdefault(site.parameter or site.layer, site)
    return list(first.values())


def computed_weights(model: nn.Module, sites: Sequence[Site]) -> set[int]:
    """Positions of the sites whose weights no parameter holds, because the model computes them, as `weight_norm` does."""
    found = zip(sites, stored_weights(model, sites), strict=True)
    return {site.position for site, weight in found if site.weights and weight is None}


def stored_weights(model: nn.Module, sites: Sequence[Site]) -> list[Tensor | None]:
    """For each site its stored weights, None where it has none."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    return [tensors.get(site.parameter) if site.weights else None for site in sites]
