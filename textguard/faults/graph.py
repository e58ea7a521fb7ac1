"""A classifier as a list of steps: where faults can be injected, and which values later steps still read."""

import copy
import functools
import inspect
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from textguard.errors import UnsupportedModel, printable
from textguard.faults.copying import copy_model
from textguard.faults.detectors import Bound
from textguard.faults.exported import evaluation, export, in_functions, is_exported
from textguard.faults.sites import (
    DEFAULT_KINDS,
    SURVEYED,
    Call,
    Calls,
    Seen,
    SiteList,
    Survey,
    another_of,
    callers,
    changed_rows,
    uncompiled,
)

Values = dict[fx.Node, Any]  # step -> its value
SAME = 1e-3  # of a value's largest magnitude: what rounding may change where images change places in their batch
Visit = Callable[[int, Call], Tensor]  # position of a site and its call -> what takes the place of its output

# Elementwise functions between the layers, as modules, as functions and as methods.
ACTIVATIONS = (
    *(
        nn.ReLU,
        nn.ReLU6,
        nn.Hardtanh,
        nn.LeakyReLU,
        nn.ELU,
        nn.SiLU,
        nn.GELU,
        nn.Sigmoid,
        nn.Tanh,
        nn.Hardswish,
        nn.Hardsigmoid,
    ),
    *(F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.silu, F.gelu, F.hardswish, F.hardsigmoid),
    *(torch.relu, torch.sigmoid, torch.tanh, "relu", "sigmoid", "tanh"),
)

# Activations that overwrite their input -> the same that do not.
OVERWRITING: dict[Any, Any] = {
    getattr(home, f"{name}_"): getattr(home, name)
    for home in (torch, F)
    for name in ("relu", "elu", "hardtanh", "leaky_relu", "celu", "selu", "rrelu", "threshold", "sigmoid", "tanh", "clamp")
    if hasattr(home, f"{name}_")
}
OVERWRITING |= {f"{name}_": name for name in ("relu", "sigmoid", "tanh", "clamp", "clamp_min", "clamp_max", "clip")}
ACTIVATION_FUNCTIONS = tuple(one for one in ACTIVATIONS if callable(one) and not isinstance(one, type))


class Scaling:
    """How one step's value grows with the number of images in the batch.

    A tensor holds `rows` rows per image along dimension `dim`, such as windows or tokens: one image's rows after those of
    another or, where it is `interleaved`, all images' first rows before their second ones. A number is `rows` times the number
    of images. Where `rows` is 0, the value does not depend on the batch. A tuple or list has a Scaling for each of its items,
    in `parts`.

    Parameters
    ----------
    small, large : Any
        The step's value with the two batch sizes of SURVEYED.

    Raises
    ------
    UnsupportedModel
        The value is a dictionary, or does not grow along one dimension in proportion to the batch.
    """

    def __init__(self, small: Any, large: Any) -> None:
        self.rows, self.dim, self.interleaved = 0, 0, False
        self.parts: list[Scaling] = []
        if isinstance(small, Tensor):
            grown = [dim for dim, sizes in enumerate(zip(small.shape, large.shape, strict=False)) if sizes[0] != sizes[1]]
            if small.ndim != large.ndim or len(grown) > 1:
                raise UnsupportedModel(
                    f"a value of shape {list(small.shape)} grows along more than one dimension with its batch"
                )
            if grown:
                self.dim = grown[0]
                self.rows = self._per_image(small.shape[self.dim], large.shape[self.dim])
        elif isinstance(small, (tuple, list)):
            if len(small) != len(large):
                raise UnsupportedModel("a step returns more values for a larger batch")
            self.parts = [Scaling(a, b) for a, b in zip(small, large, strict=True)]
        elif isinstance(small, dict):
            raise UnsupportedModel("a step returns a dictionary; steps may return tensors, numbers, tuples and lists")
        elif isinstance(small, int) and small != large:
            self.rows = self._per_image(small, large)

    @staticmethod
    def _per_image(small: int, large: int) -> int:
        """How many rows one image has, where a dimension grows from `small` to `large`."""
        rows, rest = divmod(small, SURVEYED[0])
        if rest or large != rows * SURVEYED[1]:
            raise UnsupportedModel(
                f"a size grows from {small} to {large} when the batch grows from {SURVEYED[0]} to {SURVEYED[1]}"
            )
        return rows

    @property
    def depends(self) -> bool:
        """Whether the value grows with the batch."""
        return bool(self.rows or self.parts)

    @property
    def batch_first(self) -> bool:
        """Whether no other dimension than the first one grows with the batch, image by image."""
        return not (self.dim or self.interleaved or any(not part.batch_first for part in self.parts))

    def select(self, value: Any, images: Tensor) -> Any:
        """The value that the step would have for some images of its batch.

        Parameters
        ----------
        value : Any
            The step's value for the whole batch.
        images : Tensor
            int64 [N], indices of images in the batch; they may repeat.

        Returns
        -------
        Any
            The value for these N images: a copy where it depends on the batch, else `value` itself.
        """
        if self.parts:
            return like(value, [part.select(item, images) for part, item in zip(self.parts, value, strict=True)])
        if not self.rows:
            return value
        if not isinstance(value, Tensor):
            return self.rows * len(images)
        if self.rows > 1:
            sizes, dim = ((self.rows, -1), self.dim + 1) if self.interleaved else ((-1, self.rows), self.dim)
            return value.unflatten(self.dim, sizes).index_select(dim, images).flatten(self.dim, self.dim + 1)
        if self.dim == 0 and value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last):
            # index_select alone would write the rows in the default memory format, which takes seven times as long.
            return value.permute(0, 2, 3, 1).index_select(0, images).permute(0, 3, 1, 2)
        return value.index_select(self.dim, images)

    def settle(self, value: Any, swapped: Any, swap: Tensor) -> bool:
        """Find out in which order the images' rows are.

        Parameters
        ----------
        value, swapped : Any
            The step's value for two different images, and for the same two the other way round.
        swap : Tensor
            int64 [2], 1 and 0.

        Returns
        -------
        bool
            Whether `select` finds an image's share of the value.
        """
        if self.parts:
            return all(part.settle(*items, swap) for part, *items in zip(self.parts, value, swapped, strict=True))
        if not isinstance(value, Tensor):
            return True
        gaps = [_gap(self.select(value, swap), swapped)]
        if self.rows > 1:
            self.interleaved = True
            gaps.append(_gap(self.select(value, swap), swapped))
            self.interleaved = gaps[1] < gaps[0]
        return min(gaps) <= SAME


class TracedModel:
    """A traced copy of a classifier in evaluation mode.

    Parameters
    ----------
    model : nn.Module
        Any classifier that torch.fx or torch.export can trace, from images [B, ...] to logits [B, C].
    image : Tensor
        One image, shape [...].
    kinds : sequence of str
        The wanted kinds of sites.

    Attributes
    ----------
    exported : bool
        Whether torch.export traced it, because torch.fx could not. It is slower by seconds.
    steps : list of fx.Node
        The steps, in order of execution.
    index : dict of fx.Node to int
        Step -> its index in `steps`.
    modules : dict of str to nn.Module
        Name -> module of the traced copy, which is `model`.
    shapes : dict of fx.Node to tuple
        Step -> the shape of its value without the dimension of the batch (dimension 0 where it has none), for tensors.
    last_reader : dict of fx.Node to int
        Step -> the index of the last step that reads its value.
    sites : list of Site
        The operations of the wanted kinds.
    skipped : list of (str, str)
        The layers that have weights and are no sites, each with the reason.
    at : dict of int to list of int
        Index of a step -> the positions of the sites in it.
    visit : callable or None
        Where it is set, `walk` shows it every site's position and call, and puts what it returns in the place of the output.

    Raises
    ------
    UnsupportedModel
        The model cannot be traced, does something else when it is traced, does not return a tensor of logits, or has no sites.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from textguard.faults.graph import TracedModel
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
    >>> traced = TracedModel(model, torch.zeros(1, 4, 4))
    >>> [step.name for step in traced.steps]
    ['input_1', '_0', '_1', '_2', '_3', 'output']
    >>> [(site.layer, site.shape) for site in traced.sites], traced.at
    ([('0', (2, 2, 2)), ('3', (3,))], {1: [0], 4: [1]})
    """

    @torch.inference_mode(False)  # Tensors of inference mode do not count their versions, which the survey compares.
    @torch.no_grad()
    def __init__(self, model: nn.Module, image: Tensor, kinds: Sequence[str] = DEFAULT_KINDS) -> None:
        model = uncompiled(evaluation(copy_model(unwrapped(model))))
        for module in model.modules():
            # In-place activations would overwrite the golden values that later replays start from.
            if getattr(module, "inplace", False):
                module.inplace = False
        self._name, self.exported = type(model).__name__, False
        images = image.expand(SURVEYED[0], *image.shape).clone()
        try:
            expected = model(images.clone())
        except Exception as error:
            raise UnsupportedModel(f"{self._name} does not run on batches of other sizes ({in_a_line(error)})") from error
        if not isinstance(expected, Tensor):
            raise UnsupportedModel(f"{self._name} returns a {type(expected).__name__}, not a tensor of logits")
        try:
            small, large = self._take(functools.partial(_trace, model), model, image, expected)
        except UnsupportedModel as reason:
            if isinstance(model, fx.GraphModule):
                raise
            self.exported = True
            try:
                small, large = self._take(functools.partial(_export, model, image), model, image, expected)
            except UnsupportedModel:
                raise reason from None
        self.shapes = {
            step: shape[: scaling.dim] + shape[scaling.dim + 1 :]
            for step, scaling, shape in zip(self.steps, self._scalings.values(), self._shapes, strict=True)
            if shape is not None
        }
        both = ([seen.call for step in calls for seen in step] for calls in (small, large))
        found = SiteList(model, kinds, changed_rows(self.model, image, *both))  # the traced model lacks what it does not call
        self._find_sites(found, small, large, self._others)

    def _take(
        self, trace: Callable[[], fx.GraphModule], model: nn.Module, image: Tensor, expected: Tensor
    ) -> tuple[list[list[Seen]], list[list[Seen]]]:
        """Take over a traced model, if it does what the model does. Returns the calls of each step, for both batch sizes.

        expected: the model's logits for SURVEYED[0] copies of the image.
        """
        try:
            traced = trace()
        except UnsupportedModel:
            raise
        except Exception as error:
            raise UnsupportedModel(f"{self._name} cannot be traced ({in_a_line(error)})") from error
        self.steps: list[fx.Node] = list(traced.graph.nodes)
        for step in self.steps:
            if step.kwargs.get("inplace"):
                step.kwargs = {**step.kwargs, "inplace": False}
            _write_elsewhere(step)
        self.model = traced
        self.modules = dict(traced.named_modules())
        self.visit: Visit | None = None
        self._opened: set[int] = set()  # the steps whose functions are run operation by operation
        self.at: dict[int, list[int]] = {}
        self.index = {step: index for index, step in enumerate(self.steps)}
        self.last_reader = {read: index for index, step in enumerate(self.steps) for read in step.all_input_nodes}
        self._read_last_by: dict[int, list[fx.Node]] = {}
        for read, index in self.last_reader.items():
            self._read_last_by.setdefault(index, []).append(read)
        self.__dict__.pop("constants", None)
        self._made: tuple[int, Values] = (0, {})
        try:
            (small, small_calls, self._others), (large, large_calls, _) = (
                self._survey(model, image, size) for size in SURVEYED
            )
        except UnsupportedModel:
            raise
        except Exception as error:
            raise UnsupportedModel(f"{self._name} does not run on batches of other sizes ({in_a_line(error)})") from error
        if not is_tensor(small[-1]) or not _alike(small[-1], expected):
            raise self._differs()
        self._scalings = {step: Scaling(a, b) for step, a, b in zip(self.steps, small, large, strict=True)}
        self._shapes = [tuple(value.shape) if is_tensor(value) else None for value in small]
        self._numbers = {step: value for step, value in zip(self.steps, small, strict=True) if _is_number(value)}
        self._sized = dict.fromkeys(self._find_sized())
        self._settle(model, image)
        return small_calls, large_calls

    def _differs(self) -> UnsupportedModel:
        """torch.fx traces `x += y` as `x = x + y`, which does not change x for whoever else holds it: the two can differ."""
        return UnsupportedModel(
            f"{self._name}, when traced, gives other outputs than the model; write `x = x + y` for `x += y`"
        )

    def _find_sized(self) -> list[fx.Node]:
        """The steps that depend on how many images there are, but on none of them, such as their numbers 0, 1, 2 ..."""
        known = {*self.constants, *self._numbers}
        for step in self.steps:
            if step not in known and step.all_input_nodes and step.op != "output" and known.issuperset(step.all_input_nodes):
                known.add(step)
        return [step for step in self.steps if step in known and step not in self.constants and step not in self._numbers]

    def _made_for(self, count: int) -> Values:
        """The values of these steps for a batch of `count` images."""
        if self._made[0] != count:
            images = torch.arange(count)
            values = self.constants | {step: self.select(step, value, images) for step, value in self._numbers.items()}
            with torch.inference_mode(False), torch.no_grad():
                for step in self._sized:
                    values[step] = self.run_step(self.index[step], values)
            self._made = count, values
        return self._made[1]

    def _settle(self, model: nn.Module, image: Tensor) -> None:
        """Run two images both ways round, to learn in which order each step's value holds the rows of images."""
        other = another_of(model)
        pairs = [
            torch.stack(pair) for pair in itertools.permutations((image, another_image(image) if other is None else other))
        ]
        runs = [self.inputs(pair) for pair in pairs]
        swap = torch.tensor([1, 0], device=image.device)
        for index, _ in zip(*map(self.walk, runs), strict=True):
            step = self.steps[index]
            if step not in self._sized and not self._scalings[step].settle(*(values[step] for values in runs), swap):
                raise UnsupportedModel(f"what step {step.name} makes of an image depends on its place in the batch")
        if not _alike(runs[0][self.steps[-1]], model(pairs[0].clone())):
            raise self._differs()
        if not self._scalings[self.steps[-1]].batch_first:
            raise UnsupportedModel(f"{self._name} returns logits whose batch is not dimension 0")

    def walk(self, values: Values, start: int = 0) -> Iterator[int]:
        """Run the steps from `start` on, and yield each one's index when it is done.

        `values` gets the value of each step. A step whose value it holds already is not run again. At a yield, `values` holds
        that step's value, those that it was made from, and those of earlier steps that later ones still read.

        Parameters
        ----------
        values : dict of fx.Node to Any
            The values so far, such as those of `inputs`; changed in place.
        start : int
            Index of the first step.

        Yields
        ------
        int
            The index of the step that is done.
        """
        for index, step in enumerate(self.steps[start:], start):
            if step not in values:
                values[step] = self.run_step(index, values, self.visit)
            yield index
            self.release(index, values)

    def release(self, index: int, values: Values) -> None:
        """Forget the values that no step after step `index` reads."""
        for read in self._read_last_by.get(index, ()):
            values.pop(read, None)

    def run_step(self, index: int, values: Values, visit: Visit | None = None) -> Any:
        """Run one step.

        Parameters
        ----------
        index : int
            Its index.
        values : dict of fx.Node to Any
            At least the values that it reads.
        visit : callable, optional
            Gets the position and the Call of each of its sites, and returns what takes the place of the output.

        Returns
        -------
        Any
            The step's value.
        """
        step = self.steps[index]
        if visit is None or index not in self.at:
            arguments = fx.map_arg((step.args, step.kwargs), values.__getitem__)
            if index not in self._opened:
                return self.call(step, *arguments)
            with Calls(lambda call: call.output):  # not with the fused kernels, whose last digits are others
                return self.call(step, *arguments)
        seen = -1
        positions = {self._number[position]: position for position in self.at[index]}

        def visit_sites(call: Call) -> Tensor:
            nonlocal seen
            seen += 1
            return visit(positions[seen], call) if seen in positions else call.output

        with Calls(visit_sites):
            return self.run_step(index, values)

    def call(self, step: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What a step makes of these arguments.

        fx.Interpreter does the same, but takes as long for it as a small layer takes to run.
        """
        if step.op == "call_module":
            return self.modules[step.target](*args, **kwargs)
        if step.op == "call_function":
            return step.target(*args, **kwargs)
        if step.op == "call_method":
            return getattr(args[0], step.target)(*args[1:], **kwargs)
        return args[0] if step.op in ("output", "placeholder") else operator.attrgetter(step.target)(self.model)

    def inputs(self, images: Tensor) -> Values:
        """The values that a run over images [B, ...] starts with. All arguments but the first have their defaults."""
        return self.constants | {self._input: images}

    @property
    def _input(self) -> fx.Node:
        """The step whose value are the images."""
        return next(step for step in self.steps if step.op == "placeholder")

    @functools.cached_property
    def constants(self) -> Values:
        """The values of the steps that no image flows into, such as Swin's position biases."""
        values: Values = {}
        with torch.inference_mode(False), torch.no_grad():
            for index, step in enumerate(self.steps):
                if step is not self._input and step.op != "output" and all(read in values for read in step.all_input_nodes):
                    values[step] = self.run_step(index, values)
        return values

    def live(self, values: Values, start: int) -> list[fx.Node]:
        """The steps before index `start` whose values are among `values` and are read by a step from `start` on."""
        return [step for step in values if self.index[step] < start <= self.last_reader.get(step, -1)]

    def select(self, step: fx.Node, value: Any, images: Tensor) -> Any:
        """A copy of a step's value, as it would be for a batch of these images.

        images: int64 [N], indices of images in the batch of `value`; they may repeat.
        """
        if step in self._sized:
            return self._made_for(len(images))[step]
        return self._scalings[step].select(value, images)

    def operation(self, step: fx.Node) -> object:
        """What a step does: the type of its module, its function, or the name of its method."""
        return type(self.modules[step.target]) if step.op == "call_module" else step.target

    def is_plain(self, step: fx.Node) -> bool:
        """Whether a step only applies its operation to the value of one step: it has no hooks, and reads no other step."""
        if step.op == "call_module":
            module = self.modules[step.target]
            return len(step.args) == 1 and not (step.kwargs or module._forward_hooks or module._forward_pre_hooks)
        return step.all_input_nodes == [*step.args[:1]]

    def depends_on_images(self, step: fx.Node) -> bool:
        """Whether the step's value grows with the batch."""
        return self._scalings[step].depends

    def batch_first(self, step: fx.Node) -> bool:
        """Whether the step's value has the batch in dimension 0, image by image, or does not depend on it."""
        return self._scalings[step].batch_first

    def is_whole(self, position: int) -> bool:
        """Whether a site's output is its step's value, and not only that of a call inside the step."""
        return self._whole[position]

    def _survey(self, model: nn.Module, image: Tensor, size: int) -> tuple[list[Any], list[list[Seen]], dict[str, str]]:
        """Every step's value and calls for a batch of `size` images, and what else reads parameters.

        The tensors are on the meta device, without their contents. Only the output keeps them.
        """
        values: Values = {self._input: image.expand(size, *image.shape).clone()}
        found, calls = [], []
        with callers(self.model) as running:
            step = self.steps[0]
            survey = Survey(model, lambda: running() or _caller(step))
            for index, step in enumerate(self.steps):
                versions = {read: values[read]._version for read in step.all_input_nodes if is_tensor(values[read])}
                survey.seen, survey.opened = [], False
                with survey:
                    if step not in values:
                        values[step] = self.run_step(index, values)
                if survey.opened:
                    self._opened.add(index)
                for read, version in versions.items():
                    if values[read]._version != version:
                        raise UnsupportedModel(f"step {step.name} changes a value in place")
                calls.append([_without_contents(seen, values[step]) for seen in survey.seen])
                found.append(values[step] if step.op == "output" else _on_meta(values[step]))
                for read in self._read_last_by.get(index, ()):
                    values.pop(read, None)
        return found, calls, survey.others

    def _find_sites(self, found: SiteList, small: list[list[Seen]], large: list[list[Seen]], others: dict[str, str]) -> None:
        """Find the sites in the surveyed calls of all steps, at both batch sizes."""
        self._number: list[int] = []
        self._whole: list[bool] = []
        for index, calls in enumerate(zip(small, large, strict=True)):
            for number, (seen, larger) in enumerate(zip(*calls, strict=True)):
                site = found.add(seen, larger)
                if site:
                    self.at.setdefault(index, []).append(site.position)
                    self._number.append(number)
                    self._whole.append(seen.whole)
        found.finish(others)
        self.sites, self.skipped = found.sites, found.skipped


class _Tracer(fx.Tracer):
    """A tracer that takes a mitigation's Bound for one step, as it does torch's own modules."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Bound) or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Callable, is_module: bool, concrete_args: Any = None) -> tuple[Callable, list]:
        """Only the first argument is traced; the others have their defaults, so that `if targets is None` is decided."""
        first = list(inspect.signature(root_fn).parameters)[1]
        return root_fn, [self.root, self.create_proxy("placeholder", first, (), {})]


def _trace(model: nn.Module) -> fx.GraphModule:
    """The model as torch.fx traces it."""
    # A traced model, such as a protected one, still knows which module made each call.
    return fx.GraphModule(model, copy.deepcopy(model.graph) if isinstance(model, fx.GraphModule) else _Tracer().trace(model))


def _export(model: nn.Module, image: Tensor) -> fx.GraphModule:
    """The model as torch.export traces it."""
    images = image.expand(SURVEYED[1], *image.shape).clone()
    return export(model, images, ACTIVATION_FUNCTIONS, _Tracer().is_leaf_module)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what only passes images on to it, with the layers' own names.

    `nn.DataParallel`, `DistributedDataParallel`, `AveragedModel` and what `torch.compile` makes hold it as a module. The module
    of an exported program comes back in torch's functions. Another model comes back itself.

    Raises
    ------
    UnsupportedModel
        The model is a scripted one, an exported program of several inputs, or holds tensors of a class with its own storage, as
        torchao's `quantize_` leaves them.

    Examples
    --------
    >>> from torch import nn
    >>> from textguard.faults.graph import unwrapped
    >>> unwrapped(nn.DataParallel(nn.Linear(2, 3)))
    Linear(in_features=2, out_features=3, bias=True)
    """
    while inner := _inside(model):
        model = inner
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModel("a scripted model (torch.jit) hides its operations; give the model that it was made from")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_traceable_wrapper_subclass(tensor):
            raise UnsupportedModel(
                f"{name!r} is a tensor of class {type(tensor).__name__}, which stores its bits in its own way; give a model of "
                "plain tensors, such as one that torchao's convert_pt2e made"
            )
    return in_functions(model, ACTIVATION_FUNCTIONS) if is_exported(model) else model


def _inside(model: nn.Module) -> nn.Module | None:
    """The model that a wrapper holds; None where it is none."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)):
        return model.module
    return getattr(model, "_orig_mod", None)


def another_image(image: Tensor) -> Tensor:
    """An image that differs from this one, of the same shape and of similar values: the same values in another order."""
    other = image.flatten().flip(0).reshape(image.shape)
    if not torch.equal(other, image):
        return other
    if not image.is_floating_point():
        return (image == 0).to(image.dtype)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    return image + noise.to(image)


def in_a_line(error: Exception) -> str:
    """An exception of torch's, as its name and the first line of its message; where there is a cure, as that."""
    if "'len' is not supported in symbolic tracing" in str(error):
        return "write `x.shape[0]` for `len(x)`"
    return f"{type(error).__name__}: {printable(str(error).strip().partition(chr(10))[0])}"


def like(value: tuple | list, items: list) -> tuple | list:
    """Other items in a tuple or list of the same kind."""
    return type(value)._make(items) if hasattr(value, "_make") else type(value)(items)


def _gap(a: Tensor, b: Tensor) -> float:
    """How far two tensors are apart, as a share of their largest finite magnitude. NaN and infinities have to be the same."""
    if a.shape != b.shape:
        return math.inf
    a, b = (torch.view_as_real(one) if one.is_complex() else one for one in (a, b))
    a, b = a.detach().double(), b.detach().double()
    differ = ~((a == b) | (a.isnan() & b.isnan()))
    if not differ.any():
        return 0.0
    gap = (a - b)[differ].abs().max()
    largest = torch.stack([a, b]).nan_to_num(0.0, 0.0, 0.0).abs().max()
    return float((gap / largest).nan_to_num(math.inf))


def _write_elsewhere(step: fx.Node) -> None:
    """Let an activation that overwrites its input, which nobody else reads, return a new value instead."""
    sources = step.all_input_nodes
    if step.op not in ("call_function", "call_method") or len(sources) != 1 or len(sources[0].users) > 1:
        return
    if step.target in OVERWRITING:
        step.target = OVERWRITING[step.target]
    elif isinstance(step.target, FunctionType) and step.target.__module__ == F.__name__:
        names = list(inspect.signature(step.target).parameters)
        step.args = tuple(False if name == "inplace" else arg for name, arg in zip(names, step.args, strict=False))


def is_tensor(value: Any) -> bool:
    """Whether the value of a step is a single tensor."""
    return isinstance(value, Tensor)


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two logits are the same but for rounding."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)


def _is_number(value: Any) -> bool:
    """Whether a step's value is a number, or several, such as a shape."""
    return all(map(_is_number, value)) if isinstance(value, (tuple, list)) else isinstance(value, (int, float))


def _on_meta(value: Any) -> Any:
    """The value without the contents of its tensors."""
    if isinstance(value, (tuple, list)):
        return like(value, [_on_meta(item) for item in value])
    return value.to("meta") if isinstance(value, Tensor) else value


def _caller(step: fx.Node) -> str:
    """The module whose forward a step is part of, as far as the trace knows it."""
    stack = step.meta.get("nn_module_stack") or {}
    return next((str(entry[0]) for entry in reversed(stack.values())), "")


def _without_contents(seen: Seen, value: Any) -> Seen:
    """The call with its weights but without its activations, and whether its output is the step's value."""
    call = seen.call
    args = tuple(arg if arg is call.weight else _on_meta(arg) if is_tensor(arg) else arg for arg in call.args)
    kwargs = {name: arg if arg is call.weight else _on_meta(arg) for name, arg in call.kwargs.items()}
    lean = Call(call.func, call.kind, args, kwargs, call.output.to("meta"))
    return replace(seen, call=lean, whole=call.output is value)
