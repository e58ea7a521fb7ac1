"""Three ways to carry out the same faults: our replay engine, one that runs any model whole, and PyTorchFI as the reference."""

import hashlib
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from textguard import __version__
from textguard.errors import Setting, UnknownName, UnsupportedModel
from textguard.faults.checks import whole_number
from textguard.faults.copying import copy_model
from textguard.faults.damage import (
    Damage,
    FaultModel,
    Faults,
    Storage,
    Target,
    damage_output,
    damage_stored,
    damage_weights,
    make_storages,
    round_call,
    round_others,
)
from textguard.faults.exported import evaluation, is_quantised
from textguard.faults.formats import FP32, Format
from textguard.faults.graph import TracedModel, Values, unwrapped
from textguard.faults.local import (
    LARGEST_SHARE,
    PRODUCTS,
    LocalFaults,
    LocalSteps,
    covers,
    in_batches,
    neuron_patch,
    paste_whole,
    region_patch,
    whole,
)
from textguard.faults.operations import STORED_WEIGHT
from textguard.faults.patterns import Window, window_of
from textguard.faults.prediction import Margin, Prediction, chains_of, foresee, straight_through
from textguard.faults.sites import (
    DEFAULT_KINDS,
    Call,
    Calls,
    Site,
    SiteList,
    changed_rows,
    own_name,
    survey_batches,
    uncompiled,
)
from textguard.faults.suffix import shortcuts
from textguard.faults.task import class_margin
from textguard.faults.weights import computed_weights, one_per_weight, stored_weights, weight_readers

See = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Outcomes:
    """What N faults with M damaged values did to B images.

    golden_value, faulty_value: float32 [M], before and after (behind the range detector). detected: bool [M]. masked: bool [N],
    true where the engine saw that the fault left no trace. logits: float32 [N, C]. golden_logits: float32 [B, C].
    """

    golden_value: Tensor
    faulty_value: Tensor
    detected: Tensor
    masked: Tensor
    logits: Tensor
    golden_logits: Tensor


class Engine(Protocol):
    """Runs faults on a batch of images.

    `sites` are the operations with injectable outputs, in order of execution; `skipped` those without, each with the reason;
    `settings` is what the results depend on, as text. `name` is the engine's in ENGINES; `reason` says why `make_engine` could
    not make the one asked for, and is empty where it could. `all_sites` also has the operations that read the weights of an
    earlier one, which are no sites of faults in weights. `sees_masked` says whether `Outcomes.masked` tells anything.
    `unrounded` are the matrices that stay in fp32 under another number format, and who reads them.
    """

    name: str
    sees_masked: bool
    unrounded: Sequence[tuple[str, str]]
    sites: Sequence[Site]
    all_sites: Sequence[Site]
    skipped: Sequence[tuple[str, str]]
    settings: Mapping[str, str]
    reason: str
    number_format: Format
    device: torch.device

    def run(self, images: Tensor, faults: Faults) -> Outcomes:
        """images: [B, ...]. Each of the N > 0 faults happens in an inference of its own, on its own image."""
        ...

    def observe(self, images: Tensor, see: See = lambda position, output: None) -> Tensor:
        """Run images [B, ...] without faults; `see` gets each site's position and output. Returns the logits [B, C]."""
        ...

    def predict(self, images: Tensor, labels: Tensor, margin: Margin = class_margin) -> Prediction:
        """Foresee what faults will do on images [B, ...] with labels [B]. margin: see `Task.margin`."""
        ...


class _Results:
    """Outcomes while they come in: every fault is masked, with the golden logits, until something else is known."""

    def __init__(self, faults: Faults) -> None:
        values = faults.neuron
        self._golden, self._faulty = (torch.empty(len(values), device=values.device) for _ in range(2))
        self._detected = torch.empty_like(values, dtype=torch.bool)
        self._left: list[tuple[Tensor, Tensor]] = []
        self._image = faults.image

    def damaged(self, values: Tensor, damage: Damage) -> None:
        self._golden[values], self._faulty[values] = damage.golden.float(), damage.faulty.float()
        self._detected[values] = damage.detected

    def reached(self, rows: Tensor, logits: Tensor) -> None:
        self._left.append((rows, logits))

    def outcomes(self, golden_logits: Tensor) -> Outcomes:
        golden_logits = golden_logits.float()
        logits, masked = golden_logits[self._image], torch.ones_like(self._image, dtype=torch.bool)
        for rows, found in self._left:
            logits[rows], masked[rows] = found.float(), False
        return Outcomes(self._golden, self._faulty, self._detected, masked, logits, golden_logits)


class _Engine:
    """What the engines have in common: what they are made from. `_set_up` gets a copy of the model, and finds its sites."""

    reason = ""
    sees_masked = False

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        image: Tensor,
        batch_size: int,
        *,
        kinds: Sequence[str] = DEFAULT_KINDS,
        number_format: Format = FP32,
        profiled: Mapping[str, float] | None = None,
        target: Target = "neuron",
    ) -> None:
        model = unwrapped(model)
        self.reason = ""
        if tuple(kinds) == DEFAULT_KINDS and is_quantised(model):
            kinds = ("Quantize",)
        if target == "weight":
            kinds = [STORED_WEIGHT if kind == "Quantize" else kind for kind in kinds]
        self._batch_size, self.number_format, self.device = batch_size, number_format, image.device
        self._shape = image.shape
        weights = hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            weights.update(name.encode() + _bytes(tensor))
        self.settings = {
            "engine": f"{type(self).__name__} {__version__}, torch {torch.__version__}",
            "model": weights.hexdigest()[:16],
            "kinds of sites": ", ".join(kinds),
            "number format": number_format.name,
            "target": target,
        }
        model = uncompiled(evaluation(copy_model(model)))
        self._rounds = number_format.name != "fp32"
        # Parameter or buffer -> who reads it.
        self._readers = weight_readers(model, image) if self._rounds or target == "weight" else {}
        self.unrounded: list[tuple[str, str]] = []
        self._set_up(model, image, kinds, profiled or {}, target)
        self.all_sites, self._shared = self.sites, {}
        if target == "weight":
            self.sites = one_per_weight(self.sites)
            weights = zip(self.sites, stored_weights(self._model, self.sites), strict=True)
            # Position of a site -> its weights, where an inference reads them more than once.
            # Stored integers are read by a step without images, which is not repeated image by image.
            self._shared = {
                site.position: weight
                for site, weight in weights
                if len(self._readers.get(site.parameter, ())) > 1 or site.kind == STORED_WEIGHT
            }

    def _store(self, profiled: Mapping[str, float], target: Target) -> tuple[list[Storage], list[Storage]]:
        """How the sites' values are stored, see `make_storages`; all weights of the engine's own copy are rounded."""
        storages = make_storages(self._model, self.sites, self.number_format, profiled, target)
        if self._rounds:
            self.unrounded = round_others(self._model, self.sites, self.number_format, self._readers)
        return storages

    @property
    def model(self) -> nn.Module:
        """The engine's own copy of the model, its weights as they are stored."""
        return self._model

    def storage(self, position: int) -> Storage:
        """How what the faults hit at a site is stored."""
        return self._storages[position]

    def _check_size(self, images: Tensor) -> None:
        """Sites have neurons of one image's size. Raises UnsupportedModel for images of another."""
        if images.shape[1:] != self._shape:
            raise UnsupportedModel(
                f"images come in shapes {list(self._shape)} and {list(images.shape[1:])}; bring all to one size"
            )


def _bytes(stored: Any) -> bytes:
    """What an entry of a state dict holds; those of quantised modules may be tuples, or no tensors at all."""
    if isinstance(stored, Tensor):
        stored = stored.detach().cpu()
        stored = stored.int_repr() if stored.is_quantized else stored
        return stored.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(stored, (tuple, list)):
        return b"".join(map(_bytes, stored))
    return b"" if isinstance(stored, torch.ScriptObject) else repr(stored).encode()


class ReplayEngine(_Engine):
    """One golden run per batch of images; each fault replays only what lies behind its site.

    Trace: the model becomes a list of steps. Cut: the golden run pauses behind every site, where the faults happen. Replay: as
    long as a fault has changed little, only that is computed, in step with the golden run; then the values that the rest of the
    network still reads are copied, one row per fault, and the rest runs on up to `batch_size` faults at a time. Drop: a
    fault that is bit-identical to the golden run behind an activation or pooling ends there, with the golden logits.
    Other formats than fp32 round every site's output, faults in several values or in weights change much at once: they are
    replayed without the shortcuts. Of regions, those that are windows of a map are no exception.
    """

    name = "replay"
    sees_masked = True

    def _set_up(
        self, model: nn.Module, image: Tensor, kinds: Sequence[str], profiled: Mapping[str, float], target: Target
    ) -> None:
        # On CPUs and GPUs alike, convolutions are faster in this memory format.
        for weight in model.parameters():
            if weight.ndim == 4:  # of 3-d convolutions it has 5
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        self._traced = TracedModel(model, image, kinds)
        self._model, self.sites, self.skipped = self._traced.model, self._traced.sites, self._traced.skipped
        if self._traced.exported and self.sites != WholeEngine(model, image, 1, kinds=kinds).sites:
            raise UnsupportedModel(f"{type(model).__name__}, as torch.export traces it, has other sites than the model")
        self._storages, outputs = self._store(profiled, target)
        if self._rounds:
            computed = computed_weights(self._model, self.sites)

            def rounded(position: int, call: Call) -> Tensor:
                output = round_call(self.number_format, call) if position in computed else call.output
                return outputs[position].round(output)

            self._traced.visit = rounded
        # Shortcuts add up in another order, which shows where values have few digits.
        odd = any(site.dtype != "float32" for site in self.sites)
        odd |= any(tensor.dtype.is_floating_point and tensor.dtype != torch.float32 for tensor in model.parameters())
        self._exact = self._rounds or odd
        self._shortcuts = {} if self._exact else shortcuts(self._traced)
        self._local = LocalSteps(self._traced)
        self._chains = {} if odd else chains_of(self._traced)

    @torch.inference_mode()
    def run(self, images: Tensor, faults: Faults) -> Outcomes:
        """Carry out N > 0 faults on a batch of images [B, ...], each in an inference of its own, on its own image."""
        self._check_size(images)
        traced = self._traced
        if images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        golden = traced.inputs(images)
        results = _Results(faults)
        local: list[LocalFaults] = []
        shared = {position: self._first_reader(weight) for position, weight in self._shared.items()}
        for index in traced.walk(golden):
            for position in (position for position, first in shared.items() if first == index):
                self._hit_stored(position, index, faults, golden, results)
            moved = [
                part
                for faults_of_site in local
                for part in self._local.advance(faults_of_site, index, golden, self._batch_size)
            ]
            local = [part for part, spread in moved if not spread]
            # Faults of several sites may have to go on from here: together they fill a batch.
            for start in (index, index + 1):
                self._replay([part for part, spread in moved if spread == start], start, golden, results)
            for position in traced.at.get(index, ()):
                rows = torch.where(faults.position == position)[0]
                if len(rows) and position not in shared:
                    local += self._start(position, index, rows, faults, golden, results)
        return results.outcomes(golden[traced.steps[-1]])

    @torch.inference_mode()
    def observe(self, images: Tensor, see: See = lambda position, output: None) -> Tensor:
        """Run images [B, ...] without faults; `see` gets each site's position and output. Returns the logits [B, C]."""
        self._check_size(images)
        return self._observe(images, see).float()

    def _observe(self, images: Tensor, see: See, keep: Callable[[fx.Node, Any], None] = lambda step, value: None) -> Tensor:
        """The same; `keep` gets each step and its value."""
        visit = self._traced.visit

        def watch(position: int, call: Call) -> Tensor:
            output = straight_through(call.output, visit(position, call)) if visit else call.output
            see(position, output)
            return output

        values = self._traced.inputs(images)
        for index, step in enumerate(self._traced.steps):
            if step not in values:
                values[step] = self._traced.run_step(index, values, watch)
            keep(step, values[step])
            self._traced.release(index, values)
        return values[self._traced.steps[-1]]

    def predict(self, images: Tensor, labels: Tensor, margin: Margin = class_margin) -> Prediction:
        """Foresee what faults will do on images [B, ...] with labels [B]. margin: see `Task.margin`."""
        return foresee(self._observe, self.sites, self._storages, images, labels, self._chains, self._local, margin)

    def _start(
        self, position: int, index: int, rows: Tensor, faults: Faults, golden: Values, results: _Results
    ) -> list[LocalFaults]:
        """Let the faults `rows` of a site happen. Returns those that are still local; the others are already done."""
        traced, storage = self._traced, self._storages[position]
        site, step = traced.sites[position], traced.steps[index]
        part, values = faults.select(rows)
        in_output = faults.model.target != "weight" and traced.is_whole(position)
        in_order = site.in_order and traced.batch_first(step) and not self._exact
        window = self._window(site, faults.model)
        local = in_output and in_order and (part.one_value_each or window) and golden[step].ndim in (2, 4)
        if local and golden[step].ndim == len(site.shape) + 1:
            output = golden[step]
            damage = storage.damage(
                part, lambda row, neuron: output[(part.image[row], *torch.unravel_index(neuron, output.shape[1:]))]
            )
            results.damaged(values, damage)
            if window:
                patch = region_patch(output, part.image, part.row, part.neuron, damage.faulty, window)
            else:
                patch = neuron_patch(site.shape, part.neuron, damage.faulty)
            return [LocalFaults(rows, part.image, {step: patch})]
        for chunk in torch.arange(len(rows), device=rows.device).split(self._batch_size):
            few, few_values = part.select(chunk)
            if in_output:
                copies = {live: traced.select(live, golden[live], few.image) for live in traced.live(golden, index + 1)}
                damage = damage_output(storage, copies[step], few)
            else:
                copies = {live: traced.select(live, golden[live], few.image) for live in traced.live(golden, index)}
                copies[step], damage = self._rerun(position, index, copies, few)
            results.damaged(values[few_values], damage)
            results.reached(rows[chunk], self._finish(copies, index + 1))
        return []

    @staticmethod
    def _window(site: Site, model: FaultModel) -> Window | None:
        """The window that faults in regions of a site start from; None where it does not pay, or there is none."""
        if not model.shaped or model.target == "weight":
            return None
        window = window_of(site, model)
        if window is None or window.one_channel:
            return window
        return window if window.height * window.width <= LARGEST_SHARE * prod(site.shape[1:]) else None

    def _first_reader(self, weight: Tensor) -> int:
        """The index of the first step that reads some weights, itself or in its module."""

        def reads(step: fx.Node) -> list[fx.Node]:
            if step.op == "call_module":
                return [step] if any(one is weight for one in self._traced.modules[step.target].parameters()) else []
            # Exported graphs fetch all that they read before the first step.
            return list(step.users) if step.op == "get_attr" and self._traced.call(step, (), {}) is weight else []

        return min(self._traced.index[reader] for step in self._traced.steps for reader in reads(step))

    def _hit_stored(self, position: int, start: int, faults: Faults, golden: Values, results: _Results) -> None:
        """Let faults in weights that several steps read happen: one after another, from their first reader on."""
        traced = self._traced
        rows = torch.where(faults.position == position)[0]
        if not len(rows):
            return
        part, values = faults.select(rows)

        def infer(number: int) -> Tensor:
            image = part.image[number : number + 1]
            # Without the constants behind `start`, which may be made of the weights.
            own = {step: traced.select(step, golden[step], image) for step in traced.live(golden, start)}
            for index, step in enumerate(traced.steps[start:], start):
                own[step] = traced.run_step(index, own, traced.visit)
                traced.release(index, own)
            return own[traced.steps[-1]]

        damage, logits = damage_stored(self._storages[position], self._shared[position], part, infer)
        results.damaged(values, damage)
        results.reached(rows, logits)

    def _replay(self, parts: list[LocalFaults], start: int, golden: Values, results: _Results) -> None:
        """Run all of the steps from `start` on for faults that are no longer local."""
        traced = self._traced
        for batch in in_batches(parts, self._batch_size):
            image = torch.cat([part.image for part in batch])
            values = {}
            for step in traced.live(golden, start):
                patches = [part.patches.get(step) for part in batch]
                if all(patch and covers(patch, golden[step]) for patch in patches):
                    values[step] = torch.cat([whole(patch, golden[step]) for patch in patches])
                    continue
                values[step] = traced.select(step, golden[step], image)
                end = 0
                for part, patch in zip(batch, patches, strict=True):
                    begin, end = end, end + len(part.rows)
                    if patch:
                        paste_whole(values[step][begin:end], patch)
            results.reached(torch.cat([part.rows for part in batch]), self._finish(values, start))

    def _rerun(self, position: int, index: int, values: Values, faults: Faults) -> tuple[Any, Damage]:
        """Run a step again, one row per fault, for faults in weights and in calls inside of it."""
        found: list[Damage] = []

        def visit(here: int, call: Call) -> Tensor:
            output = call.output
            if here == position and faults.model.target == "weight":
                damage, output = damage_weights(self._storages[position], call, faults)
                found.append(damage)
            if self._traced.visit:
                output = self._traced.visit(here, Call(call.func, call.kind, call.args, call.kwargs, output))
            if here == position and faults.model.target != "weight":
                output = output.clone()
                found.append(damage_output(self._storages[position], output, faults))
            return output

        return self._traced.run_step(index, values, visit), found[0]

    def factor_behind_last(self) -> float:
        """The number that turns the last site's output into the logits. Raises UnsupportedModel where more lies between
        them.
        """
        traced = self._traced
        last = max(traced.at)
        step, factor = traced.steps[last], 1.0
        while traced.is_whole(len(self.sites) - 1) and len(step.users) == 1:
            (reader,) = step.users
            if reader.op == "output":
                return factor
            others = [arg for arg in reader.args if arg is not step]
            if traced.operation(reader) not in PRODUCTS or len(others) != 1:
                break
            other = traced.constants.get(others[0]) if isinstance(others[0], fx.Node) else others[0]
            if other is None or (isinstance(other, Tensor) and other.numel() > 1):
                break
            factor, step = factor * float(other.detach() if isinstance(other, Tensor) else other), reader
        raise UnsupportedModel(f"behind the last layer, {self.sites[-1].layer!r}, lies more than a factor; sample it instead")

    def _finish(self, values: Values, start: int) -> Tensor:
        """Run from step `start` to the logits [N, C], without a look back at the golden run."""
        traced = self._traced
        values = traced.constants | values
        for index, step in enumerate(traced.steps[start:], start):
            if step not in values:
                end, run = self._shortcuts.get(step, (step, None))
                values[end] = run(values[step.args[0]]) if run else traced.run_step(index, values, traced.visit)
            traced.release(index, values)
        return values[traced.steps[-1]]


class WholeEngine(_Engine):
    """Any model: one whole inference per fault, `batch_size` faults at a time. The slow twin, and for models without a
    trace.
    """

    name = "whole"

    def _set_up(
        self, model: nn.Module, image: Tensor, kinds: Sequence[str], profiled: Mapping[str, float], target: Target
    ) -> None:
        self._model = model
        self._find_sites(image, kinds)
        self._storages, self._outputs = self._store(profiled, target)
        self._computed = computed_weights(self._model, self.sites) if self._rounds else set()

    def _find_sites(self, image: Tensor, kinds: Sequence[str]) -> None:
        small, large, others, logits = survey_batches(self._model, image)
        if not isinstance(logits, Tensor):
            raise UnsupportedModel(f"{type(self._model).__name__} returns a {type(logits).__name__}, not a tensor of logits")
        changed = changed_rows(self._model, image, [seen.call for seen in small], [seen.call for seen in large])
        found = SiteList(self._model, kinds, changed)
        sites = [found.add(seen, larger) for seen, larger in zip(small, large, strict=True)]
        found.finish(others)
        self._position = {number: site.position for number, site in enumerate(sites) if site}
        self._owner = {id(weight): name for name, weight in self._model.named_parameters()}
        self._called = [self._owner.get(id(seen.call.weight)) for seen in small]
        self.sites, self.skipped = found.sites, found.skipped

    @torch.inference_mode()
    def run(self, images: Tensor, faults: Faults) -> Outcomes:
        """Carry out N > 0 faults on a batch of images [B, ...], each in an inference of its own, on its own image."""
        self._check_size(images)
        results = _Results(faults)
        for position in faults.position.unique().tolist():
            for rows in torch.where(faults.position == position)[0].split(self._batch_size):
                part, values = faults.select(rows)
                if position in self._shared:
                    damage, logits = self._hit_stored(images, position, part)
                    results.damaged(values, damage)
                    results.reached(rows, logits)
                    continue
                found: list[Damage] = []
                results.reached(rows, self._infer(images[part.image], position, part, found))
                results.damaged(values, found[0])
        return results.outcomes(self._infer(images.clone()))

    def _hit_stored(self, images: Tensor, position: int, faults: Faults) -> tuple[Damage, Tensor]:
        """Let faults in weights that are read several times happen, each in its own inference. Returns damage and logits."""

        def infer(number: int) -> Tensor:
            return self._infer(images[faults.image[number : number + 1]])

        return damage_stored(self._storages[position], self._shared[position], faults, infer)

    @torch.inference_mode()
    def observe(self, images: Tensor, see: See = lambda position, output: None) -> Tensor:
        """Run images [B, ...] without faults; `see` gets each site's position and output. Returns the logits [B, C].

        What `see` writes into an output, the operations behind it read.
        """
        self._check_size(images)
        return self._infer(images.clone(), see=see).float()

    def predict(self, images: Tensor, labels: Tensor, margin: Margin = class_margin) -> Prediction:
        """Foresee what faults will do on images [B, ...] with labels [B], linearly from each site's output on."""

        def run(pictures: Tensor, see: See, keep: object) -> Tensor:
            return self._infer(pictures.clone(), see=see)

        return foresee(run, self.sites, self._storages, images, labels, {}, None, margin)

    def _infer(
        self,
        images: Tensor,
        position: int = -1,
        faults: Faults | None = None,
        found: list[Damage] | None = None,
        see: See = lambda position, output: None,
    ) -> Tensor:
        number = -1

        def visit(call: Call) -> Tensor:
            nonlocal number
            number += 1
            here, output = self._position.get(number), call.output
            if self._called[number : number + 1] != [self._owner.get(id(call.weight))]:
                raise UnsupportedModel(f"{type(self._model).__name__} runs other operations for other images")
            if here is None or self.all_sites[here].kind == STORED_WEIGHT:
                return output
            if output.numel() != len(images) * self.all_sites[here].neurons:
                layer = self.all_sites[here].layer
                raise UnsupportedModel(
                    f"{type(self._model).__name__} runs layer {layer!r} on some images of a batch only, as a mixture "
                    "of experts does; compute all experts for every image, and weigh their results"
                )
            weights = faults is not None and here == position and faults.model.target == "weight"
            if weights:
                damage, output = damage_weights(self._storages[here], call, faults)
                found.append(damage)
            if here in self._computed:
                output = straight_through(output, round_call(self.number_format, call))
            output = straight_through(output, self._outputs[here].round(output))
            if faults is not None and here == position and not weights:
                output = output.clone()
                found.append(damage_output(self._storages[here], output, faults))
            see(here, output)
            return output

        with Calls(visit):
            return self._model(images)


class PyTorchFIEngine(_Engine):
    """The reference: PyTorchFI 0.6.0 with a function of ours, one fault per element of the batch, whole network each time.

    model: as for PyTorchFI, every Conv2d and Linear called exactly once, as a module. Source: Mahmoud et al., DSN-W 2020.
    """

    name = "pytorchfi"
    _kinds = (nn.Conv2d, nn.Linear)

    def _set_up(
        self, model: nn.Module, image: Tensor, kinds: Sequence[str], profiled: Mapping[str, float], target: Target
    ) -> None:
        try:
            from pytorchfi.core import fault_injection
        except ImportError as error:
            raise UnsupportedModel(
                "PyTorchFI is not installed; run pip install 'textguard[pipeline]', or set ", Setting("engine"), " to replay"
            ) from error
        hit = set(kinds) in ({"Conv2d", "Linear"}, set(DEFAULT_KINDS))
        if not hit or self.number_format.name != "fp32" or target != "neuron":
            raise UnsupportedModel(
                "PyTorchFI flips bits of fp32 neurons of Conv2d and Linear; set ", Setting("engine"), " to replay"
            )
        if any(isinstance(module, (nn.Conv1d, nn.Conv3d)) for module in model.modules()):
            raise UnsupportedModel(
                "PyTorchFI hits Conv2d and Linear, and the model has others; set ", Setting("engine"), " to replay"
            )
        self._model = model
        self._injector = fault_injection(
            self._model, self._batch_size, input_shape=list(image.shape), layer_types=list(self._kinds), use_cuda=image.is_cuda
        )
        called: list[tuple[str, nn.Module]] = []
        with torch.inference_mode():
            _run_hooked(model, image[None], self._kinds, lambda name, module, output: called.append((name, module)))
        shapes = [tuple(shape[1:]) for shape in self._injector.output_size]
        names = [name for name, _ in called]
        if len(names) != len(shapes) or len(set(names)) < len(names):
            raise UnsupportedModel(
                "PyTorchFI needs every Conv2d and Linear to be called once; set ", Setting("engine"), " to replay"
            )
        self.skipped: list[tuple[str, str]] = []
        self.sites = []
        for position, ((name, module), shape) in enumerate(zip(called, shapes, strict=True)):
            layer = own_name(model, name)
            reads = None if layer == name else f"{name}.weight"
            self.sites.append(Site(layer, type(module).__name__, position, shape, module.weight.numel(), reads=reads))
        self._storages, _ = make_storages(model, self.sites, FP32, {}, target)
        # Declared once for all faults: a declaration copies the model. Where they happen is told to `_flip`, batch by batch.
        self._corrupted = self._injector.declare_neuron_fi(function=self._flip)

    @torch.inference_mode()
    def run(self, images: Tensor, faults: Faults) -> Outcomes:
        """Carry out N > 0 faults on a batch of images [B, ...], each in an inference of its own, on its own image."""
        results = _Results(faults)
        for rows in torch.arange(len(faults.image), device=images.device).split(self._batch_size):
            part, values = faults.select(rows)
            self._now = part, values, results
            self._injector.reset_current_layer()
            results.reached(rows, self._corrupted(images[part.image]))
        return results.outcomes(torch.cat([self._model(some.clone()) for some in images.split(self._batch_size)]))

    @torch.inference_mode()
    def observe(self, images: Tensor, see: See = lambda position, output: None) -> Tensor:
        """Run images [B, ...] without faults; `see` gets each site's position and output. Returns the logits [B, C]."""
        positions = itertools.count()
        return _run_hooked(self._model, images, self._kinds, lambda name, module, output: see(next(positions), output))

    def predict(self, images: Tensor, labels: Tensor, margin: Margin = class_margin) -> Prediction:
        """Foresee what faults will do on images [B, ...] with labels [B], linearly from each site's output on."""

        def run(pictures: Tensor, see: See, keep: object) -> Tensor:
            positions = itertools.count()
            return _run_hooked(self._model, pictures, self._kinds, lambda name, module, output: see(next(positions), output))

        return foresee(run, self.sites, self._storages, images, labels, {}, None, margin)

    def _flip(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """What PyTorchFI calls behind each layer."""
        faults, values, results = self._now
        position = self._injector.get_current_layer()
        here = torch.where(faults.position == position)[0]
        if len(here):
            part, part_values = faults.select(here)
            rows = output[here]
            results.damaged(values[part_values], damage_output(self._storages[position], rows, part))
            output[here] = rows
        self._injector.updateLayer()
        return output


def _run_hooked(
    model: nn.Module, images: Tensor, kinds: tuple[type, ...], see: Callable[[str, nn.Module, Tensor], None]
) -> Tensor:
    """Run the model; `see` gets name, module and output of each module of these kinds when it is called."""
    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: see(name, module, output))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    try:
        return model(images.clone())
    finally:
        for handle in handles:
            handle.remove()


ENGINES = {"replay": ReplayEngine, "whole": WholeEngine, "pytorchfi": PyTorchFIEngine}


def make_engine(name: str, model: nn.Module, image: Tensor, batch_size: int, **options: Any) -> Engine:
    """Build the engine that carries faults out in a model.

    Parameters
    ----------
    name : {"replay", "whole", "pytorchfi"}
        `replay` computes what lies behind the fault and takes the rest from one golden run per batch. `whole` runs the whole
        model for each fault; it takes the place of `replay`, and says so on stderr, where a model cannot be traced.
        `pytorchfi` is the reference, for fp32 neurons of Conv2d and Linear.
    model : torch.nn.Module
        From images [B, ...] to logits [B, C]. It is copied, and stays as it is.
    image : Tensor
        One image [...], on the model's device.
    batch_size : int
        Faults per forward pass.
    **options
        kinds (operations whose outputs are fault sites; default Conv1d, Conv2d, Conv3d and Linear), number_format (a `Format`;
        default fp32, which leaves values as the model stores them), profiled (layer -> largest magnitude, which some formats
        need), target (of the fault model; default "neuron").

    Returns
    -------
    Engine
        With `sites`, `run` and `observe`.

    Raises
    ------
    UnknownName
        There is no such engine, or no such kind of site.
    UnsupportedModel
        The engine cannot inject faults into the model.
    InvalidParameter
        The number format, or the target, does not fit the model.

    References
    ----------
    Mahmoud et al., PyTorchFI: A Runtime Perturbation Tool for DNNs, DSN-W 2020.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from textguard.faults import make_engine
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    >>> engine = make_engine("replay", model, torch.zeros(1, 4, 4), batch_size=16)
    >>> [(site.layer, site.kind, site.shape) for site in engine.sites]
    [('0', 'Conv2d', (2, 2, 2)), ('3', 'Linear', (3,))]
    """
    if name not in ENGINES:
        raise UnknownName("engine", name, ENGINES, Setting("engine"))
    batch_size = whole_number(Setting("batch_size"), batch_size, 1)
    try:
        return ENGINES[name](model, image, batch_size, **options)
    except UnsupportedModel as reason:
        if name != "replay":
            raise
        engine = WholeEngine(model, image, batch_size, **options)
        engine.reason = str(reason)
        print(f"engine 'replay' cannot be used, going on with 'whole', which is slower: {reason}", file=sys.stderr, flush=True)
        return engine
