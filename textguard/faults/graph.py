"""A classifier as a list of steps: where faults can be injected, and what is still needed behind each step."""

import copy
import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from textguard.errors import UnsupportedModel

INJECTABLE = (nn.Conv2d, nn.Linear)
# Behind these a fault may have left no trace: they send different inputs to the same output.
MASKING_MODULES = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.MaxPool2d)
MASKING_FUNCTIONS = (torch.relu, F.relu, F.relu6, F.hardtanh, F.hardswish, F.max_pool2d)


@dataclass(frozen=True)
class Site:
    """The output of one layer. position: its place in the order of execution; shape: one image's share of the output."""

    layer: str
    kind: str
    position: int
    shape: tuple[int, ...]

    @property
    def neurons(self) -> int:
        """The number of values in one image's share."""
        return torch.Size(self.shape).numel()


class Scaling:
    """How one step's value grows with the number of images in the batch, found by running two batch sizes.

    A tensor holds `rows` rows per image along dimension 0 (windows, tokens), or does not depend on the batch (rows = 0). A
    number is proportional to the batch, or does not depend on it.
    """

    def __init__(self, small: Any, large: Any, sizes: tuple[int, int]) -> None:
        self.rows = 0
        self.parts: list[Scaling] = []
        if isinstance(small, Tensor):
            if small.shape != large.shape:
                self.rows = self._per_image(small.shape[0], large.shape[0], sizes)
                if small.shape[1:] != large.shape[1:]:
                    raise UnsupportedModel(f"a value of shape {list(small.shape)} has its batch outside dimension 0")
        elif isinstance(small, (tuple, list)):
            self.parts = [Scaling(a, b, sizes) for a, b in zip(small, large, strict=True)]
        elif isinstance(small, dict):
            raise UnsupportedModel("a step returns a dictionary; steps may return tensors, numbers, tuples and lists")
        elif isinstance(small, int) and small != large:
            self.rows = self._per_image(small, large, sizes)

    @staticmethod
    def _per_image(small: int, large: int, sizes: tuple[int, int]) -> int:
        rows, rest = divmod(small, sizes[0])
        if rest or large != rows * sizes[1]:
            raise UnsupportedModel(f"a size grows from {small} to {large} when the batch grows from {sizes[0]} to {sizes[1]}")
        return rows

    def select(self, value: Any, images: Tensor) -> Any:
        """The value that the step would have for these images of its batch (int64 [N]); a copy where it depends on them."""
        if self.parts:
            return type(value)(part.select(item, images) for part, item in zip(self.parts, value, strict=True))
        if not self.rows:
            return value
        if not isinstance(value, Tensor):
            return self.rows * len(images)
        if self.rows > 1:
            return value.unflatten(0, (-1, self.rows)).index_select(0, images).flatten(0, 1)
        if value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last):
            # index_select would spread the rows out in the default memory format, seven times slower.
            return value.permute(0, 2, 3, 1).index_select(0, images).permute(0, 3, 1, 2)
        return value.index_select(0, images)

    def differs(self, values: Any, golden: Any, images: Tensor) -> Tensor | bool:
        """Where the values of N images differ in any bit from the golden ones of their images (int64 [N]): bool [N]."""
        if self.parts:
            parts = zip(self.parts, values, golden, strict=True)
            return functools.reduce(operator.or_, (part.differs(value, twin, images) for part, value, twin in parts))
        if not self.rows or not isinstance(values, Tensor):
            return False
        bits = _as_bits(values) != _as_bits(self.select(golden, images))
        return bits.reshape(len(images), -1).any(dim=1)


def _as_bits(values: Tensor) -> Tensor:
    """Floating point values as integers, so that NaN equals itself and 0 does not equal -0."""
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.view(sizes[values.element_size()]) if values.is_floating_point() else values


class TracedModel:
    """A traced copy of a classifier in evaluation mode.

    model: any nn.Module from images [B, ...] to logits [B, C] that torch.fx can trace. image: one image, shape [...].
    `steps` run in order; `sites` maps the indices of the injectable ones to their Site. Raises UnsupportedModel.
    """

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        model = copy.deepcopy(model).eval()
        for module in model.modules():
            # In-place activations would overwrite the golden values that later replays start from.
            if getattr(module, "inplace", False):
                module.inplace = False
        try:
            traced = fx.symbolic_trace(model)
        except Exception as error:
            raise UnsupportedModel(
                f"{type(model).__name__} cannot be traced ({type(error).__name__}: {error}); use inject.engine: pytorchfi"
            ) from error
        self._interpreter = fx.Interpreter(traced, garbage_collect_values=False)
        self.steps: list[fx.Node] = list(traced.graph.nodes)
        last_reader = {read: step for step in self.steps for read in step.all_input_nodes}
        self._read_last_by: dict[fx.Node, list[fx.Node]] = {}
        for read, step in last_reader.items():
            self._read_last_by.setdefault(step, []).append(read)
        sizes = (2, 3)
        with torch.inference_mode():
            try:
                small, large, single = (self._all_values(image, size) for size in (*sizes, 1))
                expected = model(image.expand(sizes[0], *image.shape).clone())
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                raise UnsupportedModel(f"{type(model).__name__} does not run on batches of other sizes ({reason})") from error
        # torch.fx traces `x += y` as `x = x + y`; where another name holds x, that is another model.
        if not torch.allclose(small[self.steps[-1]], expected, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise UnsupportedModel(
                f"{type(model).__name__}, when traced, gives other outputs than the model; write `x = x + y` for `x += y`"
            )
        self._scalings = {step: Scaling(small[step], large[step], sizes) for step in self.steps}
        self._storage = {step: value.untyped_storage().data_ptr() for step, value in small.items() if isinstance(value, Tensor)}
        self.sites = self._find_sites(single)

    def walk(self, values: dict[fx.Node, Any], start: int = 0, end: int | None = None) -> Iterator[int]:
        """Run the steps from `start` up to `end` (excluded), adding to `values`, and yield each one's index when it is done.

        A step whose value is given is not run again. At a yield, `values` holds that step's value and those of earlier
        steps that later ones still read.
        """
        for index, step in enumerate(self.steps[start:end], start):
            if step not in values:
                self._interpreter.env = values
                values[step] = self._interpreter.run_node(step)
            for read in self._read_last_by.get(step, ()):
                values.pop(read, None)
            yield index

    def logits(self, values: dict[fx.Node, Any], start: int) -> Tensor:
        """Run from step `start` to the end. Returns the model's output, shape [B, C]."""
        for _ in self.walk(values, start):
            pass
        return values[self.steps[-1]]

    def next_mask(self, index: int) -> tuple[int, list[fx.Node]] | None:
        """The first step behind step `index` that may hide a fault of its value, and all that can still carry it there.

        Returns the step's index, and the values affected by the fault that steps behind it read. None where there is none.
        """
        affected = self._sharing_memory(self.steps[index])
        for later, step in enumerate(self.steps[index + 1 :], index + 1):
            if affected.isdisjoint(step.all_input_nodes):
                continue
            affected |= self._sharing_memory(step)
            if self._is_masking(step):
                read_behind = {read for reader in self.steps[later + 1 :] for read in reader.all_input_nodes}
                return later, [done for done in self.steps[: later + 1] if done in affected & read_behind]
        return None

    def _sharing_memory(self, step: fx.Node) -> set[fx.Node]:
        """The step, and all others whose values are views of the same memory: an in-place operation changes them all."""
        return {step} | {other for other, pointer in self._storage.items() if pointer == self._storage.get(step)}

    def _is_masking(self, step: fx.Node) -> bool:
        if step.op == "call_module":
            return isinstance(self._interpreter.submodules[step.target], MASKING_MODULES)
        return step.op == "call_function" and step.target in MASKING_FUNCTIONS

    def trace_left(self, values: dict, golden: dict, carriers: list[fx.Node], images: Tensor) -> Tensor:
        """Which of N replays still differ from the golden run in any value that carries their fault: bool [N]."""
        differing = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        for step in carriers:
            differing |= self._scalings[step].differs(values[step], golden[step], images)
        return differing

    def inputs(self, images: Tensor) -> dict[fx.Node, Any]:
        """The values that a run over these images starts with."""
        return {step: images for step in self.steps if step.op == "placeholder"}

    def select(self, values: dict[fx.Node, Any], images: Tensor) -> dict[fx.Node, Any]:
        """Copies of the values as a batch of these images would have them. images: positions in the batch, int64 [N]."""
        return {step: self._scalings[step].select(value, images) for step, value in values.items()}

    def _all_values(self, image: Tensor, size: int) -> dict[fx.Node, Any]:
        values = self.inputs(image.expand(size, *image.shape).clone())
        kept = {}
        for index in self.walk(values):
            kept[self.steps[index]] = values[self.steps[index]]
        return kept

    def _find_sites(self, values: dict[fx.Node, Any]) -> dict[int, Site]:
        """The sites, from every step's value for a single image."""
        sites: dict[int, Site] = {}
        calls: dict[str, int] = {}
        for index, (step, value) in enumerate(values.items()):
            if step.op != "call_module" or not isinstance(self._interpreter.submodules[step.target], INJECTABLE):
                continue
            calls[step.target] = calls.get(step.target, 0) + 1
            name = step.target if calls[step.target] == 1 else f"{step.target}#{calls[step.target]}"
            if self._scalings[step].rows:
                shape = value.shape[1:] if self._scalings[step].rows == 1 else value.shape
                kind = type(self._interpreter.submodules[step.target]).__name__
                sites[index] = Site(name, kind, len(sites), tuple(shape))
        if not sites:
            raise UnsupportedModel("the model has no Conv2d or Linear output to inject faults into")
        return sites
