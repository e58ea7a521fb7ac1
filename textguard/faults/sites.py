"""Where faults can be injected: every call of an injectable operation, be it made by a module or inside a function."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from textguard.errors import Setting, UnknownName, UnsupportedModel

OPERATIONS: dict[Callable, str] = {
    torch.conv1d: "Conv1d",
    torch.conv2d: "Conv2d",
    torch.conv3d: "Conv3d",
    torch.conv_transpose2d: "ConvTranspose2d",
    F.linear: "Linear",
    torch.matmul: "MatMul",
    torch.Tensor.matmul: "MatMul",
    torch.bmm: "MatMul",
    torch.Tensor.bmm: "MatMul",
    torch.einsum: "MatMul",
    F.scaled_dot_product_attention: "MatMul",
    torch.add: "Add",
    torch.Tensor.add: "Add",
    torch.Tensor.add_: "Add",
}
KINDS = tuple(dict.fromkeys(OPERATIONS.values()))
DEFAULT_KINDS = ("Conv2d", "Linear")
SURVEYED = (2, 3)  # a model is run with both batch sizes, and their comparison shows what grows with the batch
# Products and sums of activations, which have no weights of their own. They are sites only where they are asked for by name.
WEIGHTLESS = ("MatMul", "Add")


@dataclass(frozen=True)
class Site:
    """The output of one operation: where faults can be injected.

    Attributes
    ----------
    layer : str
        The module that owns the weights, or that makes the call. From its second call on, `#2` and so on follow.
    kind : str
        One of KINDS.
    position : int
        The site's index among all sites, in order of execution.
    shape : tuple of int
        The shape of one image's share of the output.
    weights : int
        How many weights the operation has, 0 for MatMul and Add.

    Examples
    --------
    >>> from textguard.faults.sites import Site
    >>> site = Site("layer1.0.conv1", "Conv2d", position=1, shape=(64, 8, 8), weights=36_864)
    >>> site.neurons, site.multiply_adds, site.parameter
    (4096, 2359296, 'layer1.0.conv1.weight')
    """

    layer: str
    kind: str
    position: int
    shape: tuple[int, ...]
    weights: int = 0

    @property
    def neurons(self) -> int:
        """The number of values in one image's share."""
        return torch.Size(self.shape).numel()

    @property
    def multiply_adds(self) -> int | None:
        """The multiply-adds for one image; None where the shape does not tell them, as for MatMul."""
        if self.kind not in ("Conv1d", "Conv2d", "Conv3d", "Linear"):
            return None
        return self.neurons * self.weights // self.shape[-1 if self.kind == "Linear" else 0]

    @property
    def parameter(self) -> str:
        """The name of the weights in the model's state dict."""
        return f"{self.layer.partition('#')[0]}.weight"


@dataclass(frozen=True)
class Call:
    """One call of an injectable operation: what went in and what came out.

    Attributes
    ----------
    func : callable
        The torch function.
    kind : str
        One of KINDS.
    args : tuple
        Its positional arguments.
    kwargs : dict
        Its named arguments.
    output : Tensor
        What it returned.
    """

    func: Callable
    kind: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    @property
    def weight(self) -> Tensor | None:
        """The operation's weights; None where it has none."""
        if self.kind in WEIGHTLESS:
            return None
        return self.args[1] if len(self.args) > 1 else self.kwargs.get("weight")


class Calls(TorchFunctionMode):
    """A context in which every call of an injectable operation is shown to `visit`.

    Parameters
    ----------
    visit : callable
        Gets the Call, and returns the tensor that takes the place of its output.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from textguard.faults.sites import Calls
    >>> seen = []
    >>> with Calls(lambda call: seen.append(call.kind) or call.output):
    ...     logits = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))(torch.zeros(1, 1, 4, 4))
    >>> seen
    ['Conv2d', 'Linear']
    """

    def __init__(self, visit: Callable[[Call], Tensor]) -> None:
        super().__init__()
        self._visit = visit

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Called by torch in place of `func`."""
        output = func(*args, **(kwargs or {}))
        kind = OPERATIONS.get(func)
        if kind is None or (kind == "Add" and not _adds_tensors(args)):
            return output
        seen = self._visit(Call(func, kind, args, kwargs or {}, output))
        return output.copy_(seen) if func is torch.Tensor.add_ and seen is not output else seen


def _adds_tensors(args: tuple) -> bool:
    """Whether an addition is of two tensors, whatever their shapes. So batches of all sizes have the same calls."""
    return len(args) == 2 and all(isinstance(arg, Tensor) for arg in args)


def joins_branches(call: Call) -> bool:
    """Whether a call can be a site. An addition can where it adds two values of one shape, as a residual connection does."""
    return call.kind != "Add" or call.args[0].shape == call.args[1].shape


class SiteList:
    """The sites of a model, found call by call.

    A site's layer is the owner of its weights, else the module that makes the call.

    Parameters
    ----------
    model : nn.Module
        The model.
    kinds : sequence of str
        The wanted kinds of sites, out of KINDS.

    Attributes
    ----------
    sites : list of Site
        The sites so far, in order of execution.
    skipped : list of (str, str)
        The layers that have weights and are no sites, each with the reason.

    Raises
    ------
    UnknownName
        A kind is none of KINDS.
    UnsupportedModel
        The model normalises over the batch, so a fault on one image would change the others.
    """

    def __init__(self, model: nn.Module, kinds: Sequence[str]) -> None:
        self.sites: list[Site] = []
        self.skipped: list[tuple[str, str]] = []
        for kind in kinds:
            if kind not in KINDS:
                raise UnknownName("kind of site", kind, KINDS, Setting("kinds"))
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise UnsupportedModel(f"{name} normalises over the batch: a fault on one image would change the others")
        self._model, self._kinds = model, kinds
        self._owner = {id(weight): name.rpartition(".")[0] for name, weight in model.named_parameters()}
        self._calls: dict[str, int] = {}
        self._read: set[int] = set()

    def add(self, call: Call, larger: Call, caller: str = "") -> Site | None:
        """Take the next call in order of execution.

        Parameters
        ----------
        call, larger : Call
            The same call with the two batch sizes of SURVEYED.
        caller : str
            The module that makes the call, where that is known.

        Returns
        -------
        Site or None
            The call as a site, None where it is none.
        """
        if not (joins_branches(call) and joins_branches(larger)):
            return None
        self._read.add(id(call.weight))
        name = self._owner.get(id(call.weight)) or ".".join(part for part in (caller, call.kind.lower()) if part)
        self._calls[name] = self._calls.get(name, 0) + 1
        name = name if self._calls[name] == 1 else f"{name}#{self._calls[name]}"
        if call.kind not in self._kinds:
            if call.kind not in WEIGHTLESS:
                self.skipped.append((name, f"{call.kind} is not among the wanted kinds of sites"))
            return None
        shape, problem = _share_of_one_image(call.output, larger.output)
        if problem:
            self.skipped.append((name, problem))
            return None
        weights = 0 if call.weight is None else call.weight.numel()
        self.sites.append(Site(name, call.kind, len(self.sites), shape, weights))
        return self.sites[-1]

    def finish(self) -> None:
        """Note the layers whose weights no call has read.

        Raises
        ------
        UnsupportedModel
            No site was found.
        """
        unread = {
            name.rpartition(".")[0]: None
            for name, weight in self._model.named_parameters()
            if "weight" in name.rpartition(".")[2] and weight.ndim > 1 and id(weight) not in self._read
        }
        for layer in unread:
            kind = type(self._model.get_submodule(layer)).__name__
            self.skipped.append((layer, f"no injectable operation reads the weights of this {kind}"))
        if not self.sites:
            kinds = " or ".join(self._kinds)
            raise UnsupportedModel(f"the model has no {kinds} output to inject faults into; change ", Setting("kinds"))


def _share_of_one_image(small: Tensor, large: Tensor) -> tuple[tuple[int, ...], str]:
    """The shape of one image's share of an output, or the reason why images have no shares of it.

    small, large: the output with the two batch sizes of SURVEYED.
    """
    if small.dtype != torch.float32:
        return (), f"its output is {small.dtype}, not float32"
    if small.shape == large.shape:
        return (), "its output has no batch dimension: all images share its values"
    rows, rest = divmod(small.shape[0], SURVEYED[0])
    if rest or small.shape[1:] != large.shape[1:] or large.shape[0] != rows * SURVEYED[1]:
        return (), f"its output of shape {list(small.shape)} does not have its batch in dimension 0"
    return tuple(small.shape[1:]) if rows == 1 else (rows, *small.shape[1:]), ""
