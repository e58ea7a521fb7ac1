"""A classifier as a list of steps: where faults can be injected, and which values later steps still read."""

import copy
import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from textguard.errors import UnsupportedModel
from textguard.faults.copying import copy_model
from textguard.faults.detectors import Bound
from textguard.faults.sites import DEFAULT_KINDS, SURVEYED, Call, Calls, SiteList

Values = dict[fx.Node, Any]  # step -> its value
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


class Scaling:
    """How one step's value grows with the number of images in the batch.

    A tensor holds `rows` rows per image along dimension 0, such as windows or tokens. A number is `rows` times the number of
    images. Where `rows` is 0, the value does not depend on the batch. A tuple or list has a Scaling for each of its items, in
    `parts`.

    Parameters
    ----------
    small, large : Any
        The step's value with the two batch sizes of SURVEYED.

    Raises
    ------
    UnsupportedModel
        The value is a dictionary, or does not grow along dimension 0 in proportion to the batch.
    """

    def __init__(self, small: Any, large: Any) -> None:
        self.rows = 0
        self.parts: list[Scaling] = []
        if isinstance(small, Tensor):
            if small.shape[1:] != large.shape[1:]:
                raise UnsupportedModel(f"a value of shape {list(small.shape)} has its batch outside dimension 0")
            if small.shape != large.shape:
                self.rows = self._per_image(small.shape[0], large.shape[0])
        elif isinstance(small, (tuple, list)):
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
            return type(value)(part.select(item, images) for part, item in zip(self.parts, value, strict=True))
        if not self.rows:
            return value
        if not isinstance(value, Tensor):
            return self.rows * len(images)
        if self.rows > 1:
            return value.unflatten(0, (-1, self.rows)).index_select(0, images).flatten(0, 1)
        if value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last):
            # index_select alone would write the rows in the default memory format, which takes seven times as long.
            return value.permute(0, 2, 3, 1).index_select(0, images).permute(0, 3, 1, 2)
        return value.index_select(0, images)


class TracedModel:
    """A traced copy of a classifier in evaluation mode.

    Parameters
    ----------
    model : nn.Module
        Any classifier that torch.fx can trace, from images [B, ...] to logits [B, C].
    image : Tensor
        One image, shape [...].
    kinds : sequence of str
        The wanted kinds of sites.

    Attributes
    ----------
    steps : list of fx.Node
        The steps, in order of execution.
    index : dict of fx.Node to int
        Step -> its index in `steps`.
    modules : dict of str to nn.Module
        Name -> module of the traced copy, which is `model`.
    shapes : dict of fx.Node to tuple
        Step -> the shape of its value without dimension 0, where the value is a tensor.
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
        model = copy_model(model).eval()
        for module in model.modules():
            # In-place activations would overwrite the golden values that later replays start from.
            if getattr(module, "inplace", False):
                module.inplace = False
        try:
            # A traced model, such as a protected one, still knows which module made each call.
            graph = copy.deepcopy(model.graph) if isinstance(model, fx.GraphModule) else _Tracer().trace(model)
            traced = fx.GraphModule(model, graph)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise UnsupportedModel(f"{type(model).__name__} cannot be traced ({reason})") from error
        self.steps: list[fx.Node] = list(traced.graph.nodes)
        for step in self.steps:
            if step.kwargs.get("inplace"):
                step.kwargs = {**step.kwargs, "inplace": False}
            _write_elsewhere(step)
        self.model = traced
        self.modules = dict(traced.named_modules())
        self.visit: Visit | None = None
        self.index = {step: index for index, step in enumerate(self.steps)}
        self.last_reader = {read: index for index, step in enumerate(self.steps) for read in step.all_input_nodes}
        self._read_last_by: dict[int, list[fx.Node]] = {}
        for read, index in self.last_reader.items():
            self._read_last_by.setdefault(index, []).append(read)
        try:
            (small, small_calls), (large, large_calls) = (self._survey(image, size) for size in SURVEYED)
            expected = model(image.expand(SURVEYED[0], *image.shape).clone())
        except UnsupportedModel:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise UnsupportedModel(f"{type(model).__name__} does not run on batches of other sizes ({reason})") from error
        if not isinstance(expected, Tensor):
            raise UnsupportedModel(f"{type(model).__name__} returns a {type(expected).__name__}, not a tensor of logits")
        # torch.fx traces `x += y` as `x = x + y`. Only the former changes x for whoever else holds it, so the two can differ.
        if not torch.allclose(small[-1], expected, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise UnsupportedModel(
                f"{type(model).__name__}, when traced, gives other outputs than the model; write `x = x + y` for `x += y`"
            )
        self._scalings = {step: Scaling(a, b) for step, a, b in zip(self.steps, small, large, strict=True)}
        self.shapes = {step: tuple(value.shape[1:]) for step, value in zip(self.steps, small, strict=True) if is_tensor(value)}
        self._find_sites(model, kinds, small_calls, large_calls)

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
            return self.call(step, *fx.map_arg((step.args, step.kwargs), values.__getitem__))
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
        return args[0] if step.op == "output" else operator.attrgetter(step.target)(self.model)

    def inputs(self, images: Tensor) -> Values:
        """The values that a run over images [B, ...] starts with."""
        return self.constants | {step: images for step in self.steps if step.op == "placeholder"}

    @functools.cached_property
    def constants(self) -> Values:
        """The values of the steps that no image flows into, such as Swin's position biases."""
        values: Values = {}
        with torch.inference_mode(False), torch.no_grad():
            for index, step in enumerate(self.steps):
                if step.op not in ("placeholder", "output") and all(read in values for read in step.all_input_nodes):
                    values[step] = self.run_step(index, values)
        return values

    def live(self, values: Values, start: int) -> list[fx.Node]:
        """The steps before index `start` whose values are among `values` and are read by a step from `start` on."""
        return [step for step in values if self.index[step] < start <= self.last_reader.get(step, -1)]

    def select(self, step: fx.Node, value: Any, images: Tensor) -> Any:
        """A copy of a step's value, as it would be for a batch of these images.

        images: int64 [N], indices of images in the batch of `value`; they may repeat.
        """
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
        return bool(self._scalings[step].rows or self._scalings[step].parts)

    def is_whole(self, position: int) -> bool:
        """Whether a site's output is its step's value, and not only that of a call inside the step."""
        return self._whole[position]

    def _survey(self, image: Tensor, size: int) -> tuple[list[Any], list[list[Call]]]:
        """Every step's value and calls for a batch of `size` images.

        The tensors are on the meta device, without their contents. Only the output keeps them.
        """
        images = image.expand(size, *image.shape).clone()
        values: Values = {step: images for step in self.steps if step.op == "placeholder"}
        found, calls = [], []
        for index, step in enumerate(self.steps):
            versions = {read: values[read]._version for read in step.all_input_nodes if is_tensor(values[read])}
            calls.append([])
            with Calls(lambda call, here=calls[-1]: here.append(call) or call.output):
                if step not in values:
                    values[step] = self.run_step(index, values)
            for read, version in versions.items():
                if values[read]._version != version:
                    raise UnsupportedModel(f"step {step.name} changes a value in place")
            calls[-1] = [_without_contents(call, values[step]) for call in calls[-1]]
            found.append(values[step] if step.op == "output" else _on_meta(values[step]))
            for read in self._read_last_by.get(index, ()):
                values.pop(read, None)
        return found, calls

    def _find_sites(self, model: nn.Module, kinds: Sequence[str], small: list[list], large: list[list]) -> None:
        """Find the sites in the surveyed calls of all steps, at both batch sizes."""
        found = SiteList(model, kinds)  # not the traced model, which lacks the modules that it does not call
        self.at: dict[int, list[int]] = {}
        self._number: list[int] = []
        self._whole: list[bool] = []
        for index, calls in enumerate(zip(small, large, strict=True)):
            stack = self.steps[index].meta.get("nn_module_stack") or {}
            caller = next((str(entry[0]) for entry in reversed(stack.values())), "")
            for number, ((call, whole), (larger, _)) in enumerate(zip(*calls, strict=True)):
                site = found.add(call, larger, caller)
                if site:
                    self.at.setdefault(index, []).append(site.position)
                    self._number.append(number)
                    self._whole.append(whole)
        found.finish()
        self.sites, self.skipped = found.sites, found.skipped


class _Tracer(fx.Tracer):
    """A tracer that takes a mitigation's Bound for one step, as it does torch's own modules."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Bound) or super().is_leaf_module(m, module_qualified_name)


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


def _on_meta(value: Any) -> Any:
    """The value without the contents of its tensors."""
    if isinstance(value, (tuple, list)):
        return type(value)(_on_meta(item) for item in value)
    return value.to("meta") if isinstance(value, Tensor) else value


def _without_contents(call: Call, value: Any) -> tuple[Call, bool]:
    """The call with its weights but without its activations, and whether its output is the step's value."""
    args = tuple(arg.to("meta") for arg in call.args[:2]) if call.kind == "Add" else (None, call.weight)
    return Call(call.func, call.kind, args, {}, call.output.to("meta")), call.output is value
