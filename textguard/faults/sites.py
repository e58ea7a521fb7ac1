"""Where faults can be injected: every call of an injectable operation, be it made by a module or inside a function."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from textguard.errors import Setting, UnknownName, UnsupportedModel
from textguard.faults.operations import KINDS, STORED_WEIGHT, WEIGHTLESS, inside_of, kind_of, weight_of

DEFAULT_KINDS = ("Conv1d", "Conv2d", "Conv3d", "Linear")
UNWANTED = "is not among the wanted kinds of sites"
SURVEYED = (2, 3)  # a model is run with both batch sizes, and their comparison shows what grows with the batch
# What faults are injected into: floating-point values, each in its own format.
FLOATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float64"}
# The integers that quantised graphs store.
INTEGERS = {torch.int8: "int8", torch.uint8: "uint8"}
# What no image flows into is a layer's share in these kinds only where it grows with the batch.
_MAKES_WEIGHTS = tuple(kind for kind in KINDS if not kind.startswith(("Conv", "Linear", "Bilinear", "Recurrent", "Embedding")))
# Methods that take nothing from a second tensor but its type or its shape.
_LOOKS = ("type_as", "expand_as", "view_as", "reshape_as", "to", "is_same_size")


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
        How many weights the operation has, 0 for a MatMul of activations and for Add.
    dimension : int
        The output's dimension that grows with the batch.
    outer : int
        In how many parts of that dimension each image has a share: 1 where the images' shares follow each other.
    dtype, weight_dtype : str
        How torch stores the output, and the weights: `float32`, `float16`, `bfloat16` or `float64`; in quantised graphs
        `int8` or `uint8`.
    reads : str or None
        The name of the weights in the model's state dict; "" where they are computed from others; None for `LAYER.weight`.

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
    dimension: int = 0
    outer: int = 1
    dtype: str = "float32"
    weight_dtype: str = "float32"
    reads: str | None = None

    @property
    def neurons(self) -> int:
        """The number of values in one image's share."""
        return torch.Size(self.shape).numel()

    @property
    def multiply_adds(self) -> int | None:
        """The multiply-adds for one image; None where the shape does not tell them, as for MatMul."""
        if self.kind not in ("Conv1d", "Conv2d", "Conv3d", "Linear") or not self.weights:
            return None
        rank = 0 if self.kind == "Linear" else int(self.kind[4])
        return self.neurons * self.weights // self.shape[-1 - rank]

    @property
    def parameter(self) -> str:
        """The name of the weights in the model's state dict; "" where they are computed."""
        return f"{self.layer.partition('#')[0]}.weight" if self.reads is None else self.reads

    @property
    def in_order(self) -> bool:
        """Whether the output's dimension 0 holds one image's share after the other's."""
        return self.dimension == 0 and self.outer == 1

    def by_image(self, output: Tensor, images: int) -> Tensor:
        """A view of the site's output for a batch, with the images in dimension 0.

        Parameters
        ----------
        output : Tensor
            The output, of any number of images.
        images : int
            How many.

        Returns
        -------
        Tensor
            [images, *shape], where it is written, so is the output.

        Raises
        ------
        UnsupportedModel
            The images have no shares of equal size.

        Examples
        --------
        >>> import torch
        >>> from textguard.faults.sites import Site
        >>> tokens_first = Site("mix", "Linear", position=0, shape=(5, 8), weights=64, dimension=1)
        >>> tokens_first.by_image(torch.zeros(5, 2, 8), images=2).shape
        torch.Size([2, 5, 8])
        """
        size = output.shape[self.dimension]
        if size == images and self.outer == 1:
            return output if self.dimension == 0 else output.movedim(self.dimension, 0)
        if size % (images * self.outer):
            raise UnsupportedModel(
                f"the output of {self.layer!r} has {size} rows for {images} images: what it computes depends on the images"
            )
        view = output.unflatten(self.dimension, (self.outer, images, -1)).movedim(self.dimension + 1, 0)
        return view.view(images, *self.shape)


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
        return weight_of(self.func, self.kind, self.args, self.kwargs)


class Calls(TorchFunctionMode):
    """A context in which every call of an injectable operation is shown to `visit`.

    Functions that hide several operations, such as torch's attention, are run operation by operation.

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
        kwargs = kwargs or {}
        inside = inside_of(func, args)
        if inside:
            return self.enter(inside, args, kwargs)
        output = func(*args, **kwargs)
        kind = kind_of(func, args, kwargs)
        if kind is None or not isinstance(output, Tensor):
            return self.see_other(func, args, kwargs, output)
        seen = self._visit(Call(func, kind, args, kwargs, output))
        # What an operation writes in place, others may hold already.
        return output.copy_(seen) if seen is not output and args and output is args[0] else seen

    def enter(self, inside: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a function whose operations are to be seen one by one."""
        with self:
            return inside(*args, **kwargs)

    def see_other(self, func: Callable, args: tuple, kwargs: dict, output: Any) -> Any:
        """Called after everything that is no operation. Returns what takes the place of the output."""
        return output


@dataclass
class Seen:
    """A call in a survey: what reads which parameters.

    call: the call. caller: the module that makes it. sources: names of all parameters that it reads, directly or in computed
    weights. weights: those of them that its weights are made of. reads: the parameter or buffer that its weights are, "" where
    they are computed. active: whether images flow into it. whole: whether its output is all of what its step gives.
    """

    call: Call
    caller: str
    sources: tuple[str, ...]
    weights: tuple[str, ...]
    reads: str
    active: bool
    whole: bool = False


class Survey(Calls):
    """A context that notes every call of an operation, and which parameters flow into it.

    What is computed from parameters and constants alone, such as normalised weights, counts as the parameters themselves.

    Parameters
    ----------
    model : nn.Module
        The model; its parameters have their names from it.
    caller : callable
        Names the module that is running.

    Attributes
    ----------
    seen : list of Seen
        The calls so far.
    others : dict of str to str
        Parameter -> what reads it that is none of KINDS.
    opened : bool
        Whether a function was run operation by operation.
    """

    def __init__(self, model: nn.Module, caller: Callable[[], str]) -> None:
        super().__init__(self._note)
        self.seen: list[Seen] = []
        self.others: dict[str, str] = {}
        self.opened = False
        self._caller = caller
        # Tensors that no image flows into -> the parameters that they are made of. All others are taken for activations.
        self._made_of = WeakTensorKeyDictionary()
        self._names = WeakTensorKeyDictionary()
        for name, tensor in model.named_buffers():
            self._made_of[tensor], self._names[tensor] = (), name
        for name, tensor in model.named_parameters():
            self._made_of[tensor], self._names[tensor] = (name,), name

    def enter(self, inside: Callable, args: tuple, kwargs: dict) -> Any:
        self.opened = True
        return super().enter(inside, args, kwargs)

    def see_other(self, func: Callable, args: tuple, kwargs: dict, output: Any) -> Any:
        sources, active = self._sources(args, kwargs)
        self._trace(args, output, sources, active)
        name = getattr(func, "__name__", "")
        if active and sources and name not in _LOOKS and any(isinstance(leaf, Tensor) for leaf in tree_leaves(output)):
            for source in sources:
                self.others.setdefault(source, resolve_name(func) or name)
        return output

    def _note(self, call: Call) -> Tensor:
        sources, active = self._sources(call.args, call.kwargs)
        self._trace(call.args, call.output, sources, active)
        weight = call.weight
        weights = self._made_of.get(weight, ()) if weight is not None else sources if call.kind == "MatMul" else ()
        reads = "" if weight is None else self._names.get(weight, "")
        self.seen.append(Seen(call, self._caller(), sources, weights or ((reads,) if reads else ()), reads, active))
        return call.output

    def _sources(self, args: tuple, kwargs: dict) -> tuple[tuple[str, ...], bool]:
        """The parameters that flow into a call, and whether images do."""
        sources: dict[str, None] = {}
        active = False
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                made_of = self._made_of.get(leaf)
                active |= made_of is None
                sources.update(dict.fromkeys(made_of or ()))
        return tuple(sources), active

    def _trace(self, args: tuple, output: Any, sources: tuple[str, ...], active: bool) -> None:
        """Note what a call's result is made of. What returns nothing has written its first argument."""
        results = [leaf for leaf in tree_leaves(args[:1] if output is None else output) if isinstance(leaf, Tensor)]
        for result in results:
            if not active:
                self._made_of[result] = sources
            elif result in self._made_of and not isinstance(result, nn.Parameter):
                del self._made_of[result]


@contextlib.contextmanager
def callers(model: nn.Module) -> Iterator[Callable[[], str]]:
    """A context that gives a function which names the innermost module whose forward is running; "" for none.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from textguard.faults.sites import Calls, callers
    >>> seen, model = [], nn.Sequential(nn.Linear(2, 2))
    >>> with callers(model) as caller, Calls(lambda call: seen.append(caller()) or call.output):
    ...     logits = model(torch.zeros(1, 2))
    >>> seen
    ['0']
    """
    running: list[str] = []
    hooks = []

    def leave(*_: object) -> None:
        running.pop()

    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # takes no hooks, and what it calls is not seen
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield lambda: running[-1] if running else ""
    finally:
        for hook in hooks:
            hook.remove()


def another_of(model: nn.Module) -> Tensor | None:
    """The second image that a model brings along, because its images have no other order of values; see `inputs.Adapted`."""
    return getattr(model, "another", None) if not isinstance(model, fx.GraphModule) else model.meta.get("another")


def own_name(model: nn.Module, name: str) -> str:
    """What the user calls a module or a parameter: `inputs.Adapted` holds their model as `model`. "" for all of a model.

    Examples
    --------
    >>> from torch import nn
    >>> from textguard.faults.sites import own_name
    >>> own_name(nn.Linear(2, 2), "model.weight")
    'model.weight'
    """
    if another_of(model) is None:
        return name
    return "" if name == "model" else name.removeprefix("model.")


def uncompiled(model: nn.Module) -> nn.Module:
    """The model with the original modules in the place of those that torch.compile made, whose calls are not seen.

    It is changed in place, but for the model itself, which may be one of these.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from textguard.faults.sites import uncompiled
    >>> [name for name, _ in uncompiled(nn.Sequential(torch.compile(nn.ReLU()))).named_modules()]
    ['', '0']
    """
    model = getattr(model, "_orig_mod", model)
    for module in list(model.modules()):
        module._compiled_call_impl = None
        for name, child in list(module.named_children()):
            if hasattr(child, "_orig_mod"):
                setattr(module, name, child._orig_mod)
    return model if not any(hasattr(module, "_orig_mod") for module in model.modules()) else uncompiled(model)


def survey_batches(model: nn.Module, image: Tensor) -> tuple[list[Seen], list[Seen], dict[str, str], Any]:
    """Run a model with both batch sizes of SURVEYED.

    Parameters
    ----------
    model : nn.Module
        The model.
    image : Tensor
        One image, [...].

    Returns
    -------
    small, large : list of Seen
        The calls of operations with each of the sizes.
    others : dict of str to str
        Parameter -> what else reads it.
    output : Any
        What the model returns.

    Raises
    ------
    UnsupportedModel
        The calls depend on the batch size.
    """
    surveys: list[Survey] = []
    with callers(model) as caller, torch.no_grad():
        for size in (*SURVEYED, SURVEYED[0]):
            surveys.append(Survey(model, caller))
            with surveys[-1]:
                output = model(image.expand(size, *image.shape).clone())
            if len(surveys) == len(SURVEYED) and len(surveys[0].seen) == len(surveys[1].seen):
                break  # else the first run filled a cache, which the others read, and is repeated
    small, large = surveys[0 if len(surveys) == len(SURVEYED) else -1].seen, surveys[1].seen
    if [seen.call.kind for seen in small] != [seen.call.kind for seen in large]:
        raise UnsupportedModel(f"{type(model).__name__} runs other operations for other batch sizes")
    kept = dict.fromkeys((name for seen in surveys[0].seen for name in seen.sources), "a value that is kept between runs")
    return small, large, kept | surveys[0].others, output


class SiteList:
    """The sites of a model, found call by call.

    A site's layer is the owner of its weights, or of all that they are computed from, else the module that makes the call.

    Parameters
    ----------
    model : nn.Module
        The model.
    kinds : sequence of str
        The wanted kinds of sites, out of KINDS.
    changed : mapping of int to Tensor
        What `changed_rows` found: number of a call -> the rows that change with the second of two images.

    Attributes
    ----------
    sites : list of Site
        The sites so far, in order of execution.
    skipped : list of (str, str)
        What computes and is no site: the layer, parameter or kind, and the reason.

    Raises
    ------
    UnknownName
        A kind is none of KINDS.
    UnsupportedModel
        The model normalises over the batch, so a fault on one image would change the others.
    """

    def __init__(self, model: nn.Module, kinds: Sequence[str], changed: Mapping[int, Tensor] | None = None) -> None:
        self.sites: list[Site] = []
        self._skipped: dict[tuple[str, str], None] = {}
        for kind in kinds:
            if kind not in (*KINDS, STORED_WEIGHT):
                raise UnknownName("kind of site", kind, KINDS, Setting("kinds"))
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                layer = own_name(model, name)
                raise UnsupportedModel(f"{layer} normalises over the batch: a fault on one image would change the others")
        self._model, self._kinds, self._changed = model, kinds, changed or {}
        self._calls: dict[str, int] = {}
        self._number = -1
        self._told: set[str] = set()  # the parameters that are a site's, or of which is said why not
        self._weightless: dict[str, int] = {}
        self._others: dict[str, str] = {}

    def _own(self, name: str) -> str:
        return own_name(self._model, name)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """What computes and is no site, each with the reason."""
        return list(self._skipped)

    def add(self, one: Seen, larger: Seen) -> Site | None:
        """Take the next call in order of execution.

        Parameters
        ----------
        one, larger : Seen
            The same call with the two batch sizes of SURVEYED.

        Returns
        -------
        Site or None
            The call as a site, None where it is none.
        """
        self._number += 1
        call = one.call
        if call.kind == STORED_WEIGHT:
            return self._stored_weight(one)
        if not one.active and call.kind in _MAKES_WEIGHTS and call.output.shape == larger.call.output.shape:
            return None  # a step on the way to computed weights, whose parameters are those of the layer that reads them
        if call.kind == "Add" and not all(_joins_branches(seen.call) for seen in (one, larger)):
            for source in one.sources:
                self._others.setdefault(source, "an addition of another shape")
            return None
        name = self._name(one)
        self._calls[name] = self._calls.get(name, 0) + 1
        first, name = name, name if self._calls[name] == 1 else f"{name}#{self._calls[name]}"
        if call.kind not in self._kinds:
            if not one.sources and call.kind in WEIGHTLESS:
                self._weightless[call.kind] = self._weightless.get(call.kind, 0) + 1
                return None
            return self._skip(one, first, f"{call.kind} {UNWANTED}")
        types = FLOATS | INTEGERS if call.kind == "Quantize" else FLOATS
        changed = self._changed.get(self._number)
        shape, dimension, outer, problem = _share_of_one_image(call.output, larger.call.output, changed, types)
        if problem:
            return self._skip(one, name, problem)
        self._told.update(one.sources)
        weight = call.weight
        site = Site(
            name,
            call.kind,
            len(self.sites),
            shape,
            0 if weight is None else weight.numel(),
            dimension,
            outer,
            types[call.output.dtype],
            "float32" if weight is None else FLOATS.get(weight.dtype, "float32"),
            None if weight is None or one.reads == f"{first}.weight" else one.reads,
        )
        self.sites.append(site)
        return site

    def _stored_weight(self, one: Seen) -> Site | None:
        """The integers that a weight is stored as, as a site; the output has no images, and is none."""
        weight, name = one.call.weight, self._own(one.reads)
        if one.active or not name or STORED_WEIGHT not in self._kinds:
            return None
        if weight.dtype not in INTEGERS:
            return self._skip(one, name, f"it is stored as {weight.dtype}; faults hit {' and '.join(INTEGERS.values())}")
        self._calls[name] = self._calls.get(name, 0) + 1
        layer = name if self._calls[name] == 1 else f"{name}#{self._calls[name]}"
        shape, kind = tuple(weight.shape), INTEGERS[weight.dtype]
        site = Site(layer, STORED_WEIGHT, len(self.sites), shape, weight.numel(), weight_dtype=kind, reads=one.reads)
        self.sites.append(site)
        return site

    def _skip(self, one: Seen, name: str, problem: str) -> None:
        self._told.update(one.sources)
        self._skipped[name, problem] = None

    def _name(self, one: Seen) -> str:
        """The layer of a call, without the number of the call."""
        owners, caller = {self._own(owner_of(name)) for name in one.weights}, self._own(one.caller)
        if len(owners) == 1 and (owner := owners.pop()):
            return f"{owner}.recurrent" if one.call.kind == "Recurrent" else owner  # beside the layer's other product
        if caller and isinstance(one.call.func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return caller  # which has packed its weights
        return ".".join(part for part in (caller, one.call.kind.lower()) if part)

    def finish(self, others: Mapping[str, str]) -> None:
        """Note what else reads parameters, and which of them nothing reads.

        Parameters
        ----------
        others : mapping of str to str
            Parameter -> the function that reads it and is none of KINDS; see `Survey`.

        Raises
        ------
        UnsupportedModel
            No site was found.
        """
        modules = dict(self._model.named_modules())
        unread: dict[tuple[str, str], list[str]] = {}
        others = {**others, **self._others}
        for name, _ in self._model.named_parameters():
            if name in self._told:
                continue
            if name in others:
                self._skipped[self._own(name), f"no kind of site covers {others[name]}, which reads it"] = None
                continue
            owner, _, own = name.rpartition(".")
            above = [".".join(owner.split(".")[:end]) for end in range(len(owner.split(".")) + 1)]
            scripted = any(isinstance(modules.get(one), torch.jit.ScriptModule) for one in above)
            reason = "TorchScript runs it, and what it calls is not seen" if scripted else ""
            unread.setdefault((owner, reason), []).append(own)
        for (owner, reason), names in unread.items():
            kind = type(modules[owner]).__name__
            layer = self._own(owner) or kind
            self._skipped[layer, reason or f"no operation reads the {' and '.join(names)} of this {kind}"] = None
        for kind, count in self._weightless.items():
            calls = "1 call" if count == 1 else f"{count} calls"
            self._skipped[kind, f"{calls}; {kind} {UNWANTED}"] = None
        if not self.sites:
            kinds = " or ".join(self._kinds)
            found = "; ".join(f"{layer}: {reason}" for layer, reason in self.skipped[:3])
            found = f" ({found})" if found else ""
            raise UnsupportedModel(f"the model has no {kinds} output to inject faults into{found}; change ", Setting("kinds"))


def owner_of(parameter: str) -> str:
    """The module that a parameter belongs to, also where a parametrization keeps it.

    Examples
    --------
    >>> from textguard.faults.sites import owner_of
    >>> owner_of("layer1.conv.weight"), owner_of("layer1.conv.parametrizations.weight.original0")
    ('layer1.conv', 'layer1.conv')
    """
    before, parametrized, _ = f".{parameter}".partition(".parametrizations.")
    return before[1:] if parametrized else parameter.rpartition(".")[0]


def _joins_branches(call: Call) -> bool:
    """Whether a call can be a site. An addition can where it adds two values of one shape, as a residual connection does."""
    return call.kind != "Add" or (len(call.args) == 2 and call.args[0].shape == call.args[1].shape)


def growing_dimension(small: torch.Size, large: torch.Size) -> int | None:
    """The one dimension that grows in proportion to the batch, from SURVEYED[0] to SURVEYED[1] images; None where none does."""
    if len(small) != len(large):
        return None
    grown = [dimension for dimension, sizes in enumerate(zip(small, large, strict=True)) if sizes[0] != sizes[1]]
    if len(grown) != 1:
        return None
    rows, rest = divmod(small[grown[0]], SURVEYED[0])
    return None if rest or large[grown[0]] != rows * SURVEYED[1] else grown[0]


def changed_rows(
    run: Callable[[Tensor], object], image: Tensor, small: Sequence[Call], large: Sequence[Call]
) -> dict[int, Tensor]:
    """Which rows of the calls' outputs are the second image's, where their shapes do not tell.

    Windows, heads and tokens of an image may follow each other, or stand between those of others. The model runs on two images
    that differ, and what differs shows whose it is.

    Parameters
    ----------
    run : callable
        Runs the model on images [B, ...], with the same calls as before.
    image : Tensor
        One image, [...].
    small, large : sequence of Call
        The calls with both batch sizes of SURVEYED.

    Returns
    -------
    dict of int to Tensor
        Number of a call -> bool, one per row of the dimension that grows. Empty where the model does not run on such images.
    """
    wanted = {}
    for number, (one, larger) in enumerate(zip(small, large, strict=True)):
        dimension = growing_dimension(one.output.shape, larger.output.shape)
        if dimension is not None and one.output.shape[dimension] > SURVEYED[0]:
            wanted[number] = dimension
    if not wanted:
        return {}
    other = torch.full_like(image, torch.nan) if image.is_floating_point() else torch.full_like(image, int(not image.any()))
    found: list[dict[int, Tensor]] = []
    for images in (torch.stack([image, other]), torch.stack([image, image])):
        found.append({})
        number = -1

        def visit(call: Call, here: dict[int, Tensor] = found[-1]) -> Tensor:
            nonlocal number
            number += 1
            if number in wanted and call.output.ndim > wanted[number]:
                rows = call.output.detach().movedim(wanted[number], 0)
                here[number] = rows.double().reshape(len(rows), -1).sum(dim=1)
            return call.output

        try:
            with torch.no_grad(), Calls(visit):
                run(images)
        except Exception:  # such as a model that refuses NaN; then images' shares are taken to follow each other
            return {}
        if number + 1 != len(small):
            return {}
    first, second = found
    return {at: rows.isnan() | (rows != second[at]) for at, rows in first.items() if len(rows) == len(second.get(at, ()))}


def _share_of_one_image(
    small: Tensor, large: Tensor, changed: Tensor | None, types: Mapping[torch.dtype, str]
) -> tuple[tuple[int, ...], int, int, str]:
    """The shape of one image's share of an output, its dimension and outer parts, or the reason why images have no shares.

    small, large: the output with the two batch sizes of SURVEYED. changed: which rows are the second image's, if that is known.
    types: which faults hit.
    """
    if small.dtype not in types:
        what = f"quantised ({small.dtype})" if small.is_quantized else str(small.dtype)
        return (), 0, 1, f"its output is {what}; faults hit {', '.join(types.values())}"
    if small.shape == large.shape:
        return (), 0, 1, "its output has no batch dimension: all images share its values"
    dimension = growing_dimension(small.shape, large.shape)
    if dimension is None:
        return (), 0, 1, f"its output of shape {list(small.shape)} does not grow with the batch in one dimension"
    rows, outer = small.shape[dimension] // SURVEYED[0], 1
    if rows > 1 and changed is not None and bool(changed.any()):
        at = torch.arange(len(changed), device=changed.device)[changed]
        parts = [part for part in range(1, rows + 1) if rows % part == 0]
        outer = next((part for part in parts if ((at // (rows // part)) % SURVEYED[0] == 1).all()), 0)
        if not outer:
            return (), 0, 1, "its images' shares cannot be told from each other"
    inside = [size for size in (outer, rows // outer) if size > 1]
    shape = (*small.shape[:dimension], *inside, *small.shape[dimension + 1 :])
    return shape, dimension, outer, ""
