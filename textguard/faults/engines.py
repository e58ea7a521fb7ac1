"""Two ways to carry out the same faults: our replay engine, and PyTorchFI as the reference."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from textguard.errors import UnknownName, UnsupportedModel
from textguard.faults.bits import clamp_to_range, flip_bit
from textguard.faults.graph import INJECTABLE, Site, TracedModel


@dataclass(frozen=True)
class Faults:
    """N faults on a batch of images. position: of the site; image: position in the batch; all int64 [N]. limit: float32 [N]."""

    position: Tensor
    image: Tensor
    neuron: Tensor
    bit: Tensor
    limit: Tensor

    def __getitem__(self, rows: Tensor) -> "Faults":
        return Faults(self.position[rows], self.image[rows], self.neuron[rows], self.bit[rows], self.limit[rows])


@dataclass(frozen=True)
class Outcomes:
    """What N faults did. golden_value, faulty_value: float32 [N], before and after (behind the range detector).

    detected: bool [N]. logits: float32 [N, C]. golden_logits: float32 [B, C], of the fault-free images.
    """

    golden_value: Tensor
    faulty_value: Tensor
    detected: Tensor
    logits: Tensor
    golden_logits: Tensor


class Engine(Protocol):
    """Runs faults on a batch of images. `sites` are the injectable layers in order of execution."""

    sites: Sequence[Site]

    def run(self, images: Tensor, faults: Faults) -> Outcomes:
        """images: [B, ...]. Each of the N > 0 faults happens in an inference of its own, on its own image."""
        ...


def corrupt(output: Tensor, images: int, row: Tensor, faults: Faults) -> tuple[Tensor, Tensor, Tensor]:
    """Flip one bit in each named neuron of a layer's output, in place, and let the range detector look at the result.

    output: float32, the layer's output for `images` images; row: which of them each of the N faults is on, int64 [N].
    Returns golden values, injected values and the detected mask, each [N].
    """
    share = output if len(output) == images else output.unflatten(0, (images, -1))
    place = (row, *torch.unravel_index(faults.neuron, share.shape[1:]))
    golden = share[place]
    faulty, detected = clamp_to_range(flip_bit(golden, faults.bit), faults.limit)
    share[place] = faulty
    return golden, faulty, detected


class ReplayEngine:
    """One golden run per batch of images; each fault replays only what lies behind its layer.

    The golden run pauses at every site. The values that the rest of the network still reads are copied, one row per
    fault, the bits are flipped, and the rest runs on up to `batch_size` faults at a time. Behind the next activation or
    pooling, replays that are bit-identical to the golden run end: their logits are the golden ones.
    """

    def __init__(self, model: nn.Module, image: Tensor, batch_size: int) -> None:
        # On CPUs and GPUs alike, convolutions are faster in this memory format.
        self._traced = TracedModel(copy.deepcopy(model).to(memory_format=torch.channels_last), image)
        self._batch_size = batch_size
        self._next_mask = {index: self._traced.next_mask(index) for index in self._traced.sites}
        self.sites = list(self._traced.sites.values())

    @torch.inference_mode()
    def run(self, images: Tensor, faults: Faults) -> Outcomes:
        """Carry out N > 0 faults on a batch of images [B, ...], each in an inference of its own, on its own image."""
        traced = self._traced
        if images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        values = traced.inputs(images)
        replays: list[_Replay] = []
        waiting: dict[int, list[_Replay]] = {}
        for index in traced.walk(values):
            for replay in waiting.pop(index, ()):
                replay.finish(values)
            if index not in traced.sites:
                continue
            mask = self._next_mask[index]
            for rows in torch.where(faults.position == traced.sites[index].position)[0].split(self._batch_size):
                if not len(rows):
                    continue
                replay = _Replay(traced, index, mask, rows, faults[rows], values)
                replays.append(replay)
                if mask:
                    waiting.setdefault(mask[0], []).append(replay)
                else:
                    replay.finish(values)
        golden_logits = values[traced.steps[-1]]
        logits = golden_logits[faults.image]
        golden, faulty = torch.empty_like(faults.limit), torch.empty_like(faults.limit)
        detected = torch.empty_like(faults.image, dtype=torch.bool)
        for replay in replays:
            golden[replay.rows], faulty[replay.rows], detected[replay.rows] = replay.injected
            if replay.logits is not None:
                logits[replay.left] = replay.logits
        return Outcomes(golden, faulty, detected, logits, golden_logits)


class _Replay:
    """The faults of one site on one batch of images, from the flip to the logits."""

    def __init__(self, traced: TracedModel, index: int, mask: tuple | None, rows: Tensor, faults: Faults, golden: dict) -> None:
        self._traced, self._start, self._mask, self._image = traced, index, mask, faults.image
        self.rows = self.left = rows
        self._values = traced.select(golden, faults.image)
        each = torch.arange(len(rows), device=rows.device)
        self.injected = corrupt(self._values[traced.steps[index]], len(rows), each, faults)

    def finish(self, golden: dict) -> None:
        """Run to the end, without the faults that left no trace behind the mask, where the golden run now stands."""
        if self._mask:
            end, carriers = self._mask
            for _ in self._traced.walk(self._values, self._start, end + 1):
                pass
            left = self._traced.trace_left(self._values, golden, carriers, self._image).nonzero()[:, 0]
            self.left, self._start = self.rows[left], end + 1
            if len(left) < len(self.rows):
                self._values = self._traced.select(self._values, left)
        self.logits = self._traced.logits(self._values, self._start) if len(self.left) else None
        self._values = None


class PyTorchFIEngine:
    """The reference: PyTorchFI 0.6.0's batched declaration, one fault per element, whole network each time.

    model: as for PyTorchFI, every Conv2d and Linear called exactly once, as a module. Source: Mahmoud et al., DSN-W 2020.
    """

    def __init__(self, model: nn.Module, image: Tensor, batch_size: int) -> None:
        from pytorchfi.core import fault_injection

        self._model = model.eval()
        self._batch_size = batch_size
        self._injector = fault_injection(
            self._model, batch_size, input_shape=list(image.shape), layer_types=list(INJECTABLE), use_cuda=image.is_cuda
        )
        names = [name for name, module in _called_in_order(self._model, image)]
        shapes = [tuple(shape[1:]) for shape in self._injector.output_size]
        kinds = [kind.__name__ for kind in self._injector.layers_type]
        if len(names) != len(shapes) or len(set(names)) < len(names):
            raise UnsupportedModel("PyTorchFI needs every Conv2d and Linear to be called once; use inject.engine: replay")
        self.sites = [Site(*found) for found in zip(names, kinds, range(len(names)), shapes, strict=True)]

    @torch.inference_mode()
    def run(self, images: Tensor, faults: Faults) -> Outcomes:
        parts = [self._run_batch(images, faults[rows]) for rows in torch.arange(len(faults.image)).split(self._batch_size)]
        golden, faulty, detected, logits = (torch.cat(column) for column in zip(*parts, strict=True))
        return Outcomes(golden, faulty, detected, logits, self._model(images))

    def _run_batch(self, images: Tensor, faults: Faults) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count = len(faults.image)
        golden, faulty = torch.empty_like(faults.limit), torch.empty_like(faults.limit)
        detected = torch.empty_like(faults.image, dtype=torch.bool)

        def flip(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            here = torch.where(faults.position == self._injector.get_current_layer())[0]
            golden[here], faulty[here], detected[here] = corrupt(output, count, here, faults[here])
            self._injector.updateLayer()
            return output

        shapes = [self.sites[position].shape for position in faults.position.tolist()]
        places = [np.unravel_index(neuron, shape) for neuron, shape in zip(faults.neuron.tolist(), shapes, strict=True)]
        dims = [[int(place[d]) if d < len(place) else None for place in places] for d in range(3)]
        corrupted = self._injector.declare_neuron_fi(
            function=flip,
            batch=list(range(count)),
            layer_num=faults.position.tolist(),
            dim1=dims[0],
            dim2=dims[1],
            dim3=dims[2],
        )
        logits = corrupted(images[faults.image])
        self._injector.fi_reset()
        return golden, faulty, detected, logits


def _called_in_order(model: nn.Module, image: Tensor) -> list[tuple[str, nn.Module]]:
    """The injectable modules' names as a forward pass calls them."""
    called: list[tuple[str, nn.Module]] = []
    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: called.append((name, module)))
        for name, module in model.named_modules()
        if isinstance(module, INJECTABLE)
    ]
    with torch.inference_mode():
        model(image[None])
    for handle in handles:
        handle.remove()
    return called


ENGINES = {"replay": ReplayEngine, "pytorchfi": PyTorchFIEngine}


def make_engine(name: str, model: nn.Module, image: Tensor, batch_size: int) -> Engine:
    """Build the engine called `name` for a model and the shape of one image. Raises UnknownName, UnsupportedModel."""
    if name not in ENGINES:
        raise UnknownName("engine", name, ENGINES, "params.yaml inject.engine")
    return ENGINES[name](model, image, batch_size)
