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
SURVEYED = (2, 3)  # batch sizes whose comparison shows what grows with the batch
# Only asked for by name: products and sums of activations, which have no weights of their own.
WEIGHTLESS = ("MatMul", "Add")


@dataclass(frozen=True)
class Site:
    """The output of one operation.

    layer: the module that owns the weights, or that makes the call; #2 and so on where it is called again. position: its place
    in the order of execution. shape: one image's share of the output. weights: how many it has, 0 for MatMul and Add.
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
        """Of one image; None where the shape does not tell, as for MatMul."""
        if self.kind not in ("Conv1d", "Conv2d", "Conv3d", "Linear"):
            return None
        return self.neurons * self.weights // self.shape[-1 if self.kind == "Linear" else 0]

    @property
    def parameter(self) -> str:
        """The name of the weights in the model's state dict."""
        return f"{self.layer.partition('#')[0]}.weight"


@dataclass(frozen=True)
class Call:
    """One call of an injectable operation: what went in and what came out."""

    func: Callable
    kind: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    @property
    def weight(self) -> Tensor | None:
        """The operation's weights, where it has any."""
        return None if self.kind in WEIGHTLESS else self.argument(1, "weight")

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument by its place or its name."""
        return self.args[place] if place < len(self.args) else self.kwargs.get(name, default)


class Calls(TorchFunctionMode):
    """While active, shows every call of an injectable operation to `visit`, and puts what that returns in its output's
    place.
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
    """Whether an addition is one of two tensors. Whatever their shapes, so that batches of all sizes have the same calls."""
    return len(args) == 2 and all(isinstance(arg, Tensor) for arg in args)


def joins_branches(call: Call) -> bool:
    """Whether an addition is of two values of one shape, as in a residual connection, and not of a bias."""
    return call.kind != "Add" or call.args[0].shape == call.args[1].shape


class SiteList:
    """Finds the sites of a model, call by call.

    A site's layer is the owner of its weights, else the module that makes the call. `skipped` holds the operations with weights
    that are no sites, each with the reason.
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
        """The next call in order of execution as a site, or None where it is none.

        larger: the same call for another batch size; caller: the module that makes the call, where that is known.
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
        """Note the weights that no call has read. Raises UnsupportedModel where no site was found."""
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
    """The shape of one image's share of an output at batch sizes SURVEYED, or the reason why images have no shares of it."""
    if small.dtype != torch.float32:
        return (), f"its output is {small.dtype}, not float32"
    if small.shape == large.shape:
        return (), "its output has no batch dimension: all images share its values"
    rows, rest = divmod(small.shape[0], SURVEYED[0])
    if rest or small.shape[1:] != large.shape[1:] or large.shape[0] != rows * SURVEYED[1]:
        return (), f"its output of shape {list(small.shape)} does not have its batch in dimension 0"
    return tuple(small.shape[1:]) if rows == 1 else (rows, *small.shape[1:]), ""
