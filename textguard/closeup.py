"""A classifier under faults, seen from near: where in an image it looks, and the values of its last layer."""

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy.special import stdtrit
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader

from textguard.errors import InvalidParameter, Setting, UnsupportedModel
from textguard.estimates.maps import overlap, rank_correlation
from textguard.estimates.statistics import CONFIDENCE, Estimate, rate_estimate
from textguard.faults.damage import SINGLE_FLIP, FaultModel, Faults, Storage, damage_output, make_storages
from textguard.faults.detectors import detector_limits
from textguard.faults.engines import Engine
from textguard.faults.formats import Format
from textguard.faults.graph import TracedModel, Visit
from textguard.faults.inputs import batches
from textguard.faults.plans import FAULT_COLUMNS, damaged_values
from textguard.faults.sites import Call, Site
from textguard.runtime import progress
from textguard.vision.transforms import EvaluationView

POWERS = np.arange(-40, 39)  # of ten, of the last layer's values; fp32 ends below 10^39
AT_ONCE = 8  # images
LOOKS = ["image", "label", "class", "state", "finite", "prediction", "predicted", "confidence", "map", "picture"]


@dataclass(frozen=True)
class Place:
    """Where maps are made: the output of step `index`, called `name`. side: places in a row and in a column.

    layout: `channels_first` for [B, K, side, side], `channels_last` for [B, side, side, K], `tokens` for [B, side * side, K],
    row by row, or with one token more in front.
    """

    index: int
    name: str
    side: int
    layout: str

    def channels(self, value: Tensor) -> Tensor:
        """A view [B, side, side, K] of the step's output, without a class token."""
        if self.layout == "channels_first":
            return value.permute(0, 2, 3, 1)
        if self.layout == "tokens":
            return value[:, -(self.side**2) :].unflatten(1, (self.side, self.side))
        return value


@dataclass(frozen=True)
class Looks:
    """What a classifier makes of N images: logits [N, C], and where it looks for the given classes, maps [N, side, side].

    A map's positive values speak for the class. Neither is finite where the classifier's values are not.
    """

    logits: Tensor
    maps: Tensor


@dataclass(frozen=True)
class OneFault:
    """One injection, which can happen on any image: `neurons` and `masks` are its damaged values and their bits, int64 [V].

    position: of the site. limit: what the range detector lets pass. The others as in textguard.faults.damage.Faults.
    """

    model: FaultModel
    position: int
    neurons: Tensor
    masks: Tensor
    limit: float

    def on(self, images: int) -> Faults:
        """The injection on every image of a batch."""
        values, device = len(self.neurons), self.neurons.device
        rows = torch.arange(images, device=device)
        return Faults(
            self.model,
            torch.full_like(rows, self.position),
            rows,
            torch.full((images,), self.limit, device=device),
            rows.repeat_interleave(values),
            self.neurons.repeat(images),
            self.masks.repeat(images),
        )


# How the weights are damaged while the context is open, and the fault in each inference.
State = tuple[Callable[[], AbstractContextManager[None]], OneFault | None]


class CamModel:
    """A classifier whose Ablation-CAM can be drawn while faults happen in it.

    model: any nn.Module from images [B, 3, S, S] to logits [B, C] that torch.fx can trace. kinds, number_format, profiled: as
    for an Engine. smallest: places that a map must have in a row. `place` is the step whose map is drawn: the last one with
    such a map from which alone all later steps can be computed. For a ResNet at 224 pixels it is the last block's output, with
    7 x 7 places. Raises UnsupportedModel.
    """

    def __init__(
        self,
        model: nn.Module,
        image: Tensor,
        kinds: Sequence[str],
        number_format: Format,
        profiled: Mapping[str, float],
        smallest: int,
    ) -> None:
        self._traced = TracedModel(model, image, kinds)
        self.sites, self.number_format, self.device = self._traced.sites, number_format, image.device
        _, self._outputs = make_storages(self._traced.model, self.sites, number_format, profiled, "neuron")
        with torch.inference_mode():
            self.place = find_place(self._traced, image, smallest)

    @torch.inference_mode()
    def look(self, images: Tensor, classes: Tensor, batch_size: int, fault: OneFault | None = None) -> Looks:
        """Where the classifier looks on images [N, 3, S, S] for classes int64 [N], every image with the same fault.

        A channel counts by how much the class's logit falls when that channel alone is zero; the map is the sum of the channels
        with these weights. Only what lies behind `place` is computed again, for batch_size images and channels at a time.
        Source: Ramaswamy and Desai, Ablation-CAM, WACV 2020, whose division by the logit is left out: it only scales a map, and
        would turn it over where the logit is negative.
        """
        step, traced = self._traced.steps[self.place.index], self._traced
        values = traced.inputs(images)
        visit = self._visit(len(images), fault)
        for index in range(self.place.index + 1):
            if traced.steps[index] not in values:
                values[traced.steps[index]] = traced.run_step(index, values, visit)
            traced.release(index, values)
        seen = values[step]
        logits = self._finish(seen, visit)
        score = logits.gather(1, classes[:, None])
        drops = []
        for channels in torch.arange(self.place.channels(seen).shape[-1]).split(max(1, batch_size // len(images))):
            ablated = seen.repeat(len(channels), *[1] * (seen.ndim - 1))
            for number, channel in enumerate(channels.tolist()):
                self.place.channels(ablated[number * len(images) : (number + 1) * len(images)])[..., channel] = 0
            found = self._finish(ablated, self._visit(len(ablated), fault))
            drops.append(score - found.gather(1, classes.repeat(len(channels))[:, None]).view(len(channels), -1).T)
        return Looks(logits, torch.einsum("nk,nhwk->nhw", torch.cat(drops, dim=1), self.place.channels(seen)))

    def _finish(self, value: Tensor, visit: Visit | None) -> Tensor:
        """The logits for a value of `place`."""
        traced = self._traced
        values = traced.constants | {traced.steps[self.place.index]: value}
        for index, step in enumerate(traced.steps[self.place.index + 1 :], self.place.index + 1):
            if step not in values:
                values[step] = traced.run_step(index, values, visit)
            traced.release(index, values)
        return values[traced.steps[-1]]

    def _visit(self, images: int, fault: OneFault | None) -> Visit | None:
        """What happens to the outputs of sites: they are stored in the number format, and one of them is damaged."""
        rounds = self.number_format.name != "fp32"
        if not (rounds or fault):
            return None

        def visit(position: int, call: Call) -> Tensor:
            output = self._outputs[position].round(call.output) if rounds else call.output
            if fault and position == fault.position:
                output = output.clone()
                damage_output(self._outputs[position], output, fault.on(images))
            return output

        return visit

    def draw_flips(self, weight_flips: int, without: int, seed: int) -> pd.DataFrame:
        """`weight_flips` single-bit flips in different weights, uniform over weights and bits.

        Only sites in front of the last `without` are drawn from, so that models that differ behind them get the same flips.

        Returns one row per flip: parameter, place (in the flattened parameter), mask; none where those sites have no weights.
        Raises InvalidParameter.
        """
        parameters = dict(self._traced.model.named_parameters())
        names = dict.fromkeys(
            site.parameter for site in self.sites[: len(self.sites) - without] if site.parameter in parameters
        )
        ends = np.cumsum([parameters[name].numel() for name in names])
        if not len(ends):
            return pd.DataFrame(columns=["parameter", "place", "mask"])
        if weight_flips > ends[-1]:
            raise InvalidParameter(Setting("weight_flips"), f" is {weight_flips}, and there are {ends[-1]} weights to flip")
        generator = np.random.default_rng(seed)
        drawn = np.sort(generator.choice(ends[-1], weight_flips, replace=False))
        owner = np.searchsorted(ends, drawn, side="right")
        starts = np.concatenate([[0], ends[:-1]])
        masks = np.left_shift(1, generator.integers(self.number_format.bits, size=weight_flips))
        return pd.DataFrame({"parameter": np.array(list(names))[owner], "place": drawn - starts[owner], "mask": masks})

    @contextmanager
    def flipped(self, flips: pd.DataFrame, detector: Callable[[Tensor], float]) -> Iterator[None]:
        """Inside, weights are damaged as `flips` says, with columns as `draw_flips` returns them; afterwards they are what they
        were, bit for bit. detector: from a parameter to the largest magnitude that its range detector lets pass.
        """
        parameters = dict(self._traced.model.named_parameters())
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        try:
            for name, own in flips.groupby("parameter", sort=False):
                weight = parameters[name].data.view(-1)
                storage = Storage(self.number_format, float(weight.abs().max()), len(weight), weight.device)
                places, masks = (torch.tensor(own[what].to_numpy(), device=weight.device) for what in ("place", "mask"))
                fault = OneFault(FaultModel(target="weight"), 0, places, masks, detector(weight))
                damage = storage.damage(fault.on(1), lambda row, place, weight=weight: weight[place])
                kept.append((weight, damage.neuron, weight[damage.neuron]))
                weight[damage.neuron] = damage.written
            yield
        finally:
            for weight, places, values in kept:
                weight[places] = values


def find_place(traced: TracedModel, image: Tensor, smallest: int) -> Place:
    """Find the last map that has `smallest` places in a row, and from which alone all later steps can be computed.

    Maps are square, as the images are. A map that is larger than an earlier one does not count, because its places no longer
    lie where the image's do.
    Raises UnsupportedModel where there is none.
    """
    place, needed, narrowest = None, -1, image.shape[-1]
    values = traced.inputs(image.expand(2, *image.shape).clone())
    for index in traced.walk(values):
        step = traced.steps[index]
        if not traced.depends_on_images(step):
            continue
        alone, needed = needed <= index, max(needed, traced.last_reader.get(step, -1))
        if not alone or step.op == "placeholder" or not isinstance(values[step], Tensor):
            continue
        if len(values[step]) != 2 or not traced.batch_first(step):
            continue
        layout, side = _layout(values[step].shape[1:])
        if 1 <= side <= narrowest:
            narrowest = side
            if side >= smallest:
                place = Place(index, _name(step), side, layout)
    if place is None:
        raise UnsupportedModel(f"no layer's output is a map of {smallest} x {smallest} places that the rest depends on alone")
    return place


def _name(step: fx.Node) -> str:
    """The module that a step is, or the one it is a part of and what it does there."""
    if step.op == "call_module":
        return str(step.target)
    callers = [str(entry[0]) for entry in (step.meta.get("nn_module_stack") or {}).values()]
    return ".".join([*callers[-1:], re.sub(r"_\d+$", "", step.name)])


def _layout(shape: Sequence[int]) -> tuple[str, int]:
    """How a map of one image lies in its tensor, and its side; 0 where the tensor is no square map."""
    if len(shape) == 3 and shape[1] == shape[2]:
        return "channels_first", shape[1]
    if len(shape) == 3 and shape[0] == shape[1]:
        return "channels_last", shape[0]
    if len(shape) == 2:
        for tokens in (shape[0], shape[0] - 1):
            if math.isqrt(max(tokens, 0)) ** 2 == tokens:
                return "tokens", math.isqrt(tokens)
    return "", 0


def worst_injection(records: pd.DataFrame) -> pd.DataFrame:
    """The rows of the injection with the largest finite DeltaLoss, the first of them; none where none is finite."""
    damage = (records["faulty_loss"] - records["golden_loss"]).abs()
    if not np.isfinite(damage).any():
        return records.iloc[:0]
    worst = records.loc[damage.where(np.isfinite(damage)).idxmax()]
    return records[(records["layer"] == worst["layer"]) & (records["index"] == worst["index"])]


def one_fault(rows: pd.DataFrame, model: FaultModel, position: int, limit: float, device: torch.device) -> OneFault:
    """An injection from its records, one row per damaged bit."""
    masks = np.left_shift(1, rows["bit"]).groupby(rows["neuron"], sort=False).sum()
    neurons, masks = (torch.tensor(column, device=device) for column in (masks.index.to_numpy(), masks.to_numpy()))
    return OneFault(model, position, neurons, masks, limit)


def _all_of_region(rows: pd.DataFrame, site: Site, model: FaultModel, number_format: Format) -> pd.DataFrame:
    """Every damaged bit of an injection into a region, of which the records name one value: columns layer, neuron, bit."""
    head = rows.iloc[:1].assign(mask=int(np.left_shift(1, rows["bit"]).sum()))
    _, neurons, masks = damaged_values(head[FAULT_COLUMNS], {site.layer: site}, model, number_format)
    value, bit = np.nonzero(masks[:, None] >> np.arange(64) & 1)
    return pd.DataFrame({"layer": site.layer, "neuron": neurons[value], "bit": bit})


def mean_over_images(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """The mean of numbers from -1 to 1, where 1 says that nothing changed, with Student's interval.

    Equal numbers have no spread to take an interval from. Their limits are NaN, but the upper limit is 1 where all are 1.
    """
    mean, count = float(np.mean(values)), len(values)
    if min(values) == max(values):
        return Estimate(mean, math.nan, 1.0 if mean == 1 else math.nan, count)
    half = float(stdtrit(count - 1, 0.5 + confidence / 2) * np.std(values, ddof=1)) / math.sqrt(count)
    return Estimate(mean, max(mean - half, -1.0), min(mean + half, 1.0), count)


def damaged_states(
    cam: CamModel,
    weights: pd.DataFrame,
    worst: pd.DataFrame,
    fault_model: FaultModel,
    detector: str,
    profiled: dict[str, float],
) -> dict[str, State]:
    """What is done to the classifier: the state's name, how its weights are damaged, and the fault in each inference.

    weights: as `CamModel.draw_flips` returns them. worst: the records of one injection, as `worst_injection` returns them.
    detector: that of the campaign. profiled: layer -> largest magnitude. Where weights or worst are empty, their state is
    missing.
    """

    def of_weights(weight: Tensor) -> float:
        return detector_limits(detector, ["weights"], {"weights": float(weight.abs().max())})["weights"]

    states: dict[str, State] = {"golden": (nullcontext, None)}
    if not weights.empty:
        states["weights"] = (lambda: cam.flipped(weights, of_weights), None)
    if worst.empty:
        return states
    site = next(site for site in cam.sites if site.layer == worst["layer"].iloc[0])
    if fault_model.shaped:
        worst = _all_of_region(worst, site, fault_model, cam.number_format)
    if fault_model.target == "weight":
        damaged = worst.groupby("neuron")["bit"].agg(lambda bits: int(np.left_shift(1, bits).sum()))
        flips = pd.DataFrame({"parameter": site.parameter, "place": damaged.index, "mask": damaged.to_numpy()})
        states["worst"] = (lambda: cam.flipped(flips, of_weights), None)
    else:
        limit = detector_limits(detector, [site.layer], profiled)[site.layer]
        states["worst"] = (nullcontext, one_fault(worst, fault_model, site.position, limit, cam.device))
    return states


def look_at(
    cam: CamModel, view: EvaluationView, positions: list[int], states: dict[str, State], batch_size: int, label: str
) -> pd.DataFrame:
    """One row per image and state, with LOOKS. positions: of the images in the view.

    map is [side * side]. picture is a PNG of what the classifier sees, in the rows of state `golden`, and empty in the others.
    """
    rows = []
    with progress(total=len(positions) * len(states), label=label, unit="map") as bar:
        for start in range(0, len(positions), AT_ONCE):
            part = positions[start : start + AT_ONCE]
            images, labels = zip(*view.__getitems__(part), strict=True)
            images, labels = torch.stack(images).to(cam.device), torch.tensor(labels, device=cam.device)
            for state, (damaged, fault) in states.items():
                with damaged():
                    looks = cam.look(images, labels, batch_size, fault)
                best = looks.logits.softmax(dim=1).max(dim=1)
                for number, position in enumerate(part):
                    rows.append(
                        {
                            "image": position,
                            "label": int(labels[number]),
                            "class": view.split.classes[int(labels[number])],
                            "state": state,
                            "finite": bool(looks.logits[number].isfinite().all() and looks.maps[number].isfinite().all()),
                            "prediction": int(best.indices[number]),
                            "predicted": view.split.classes[int(best.indices[number])],
                            "confidence": float(best.values[number]),
                            "map": looks.maps[number].flatten().tolist(),
                            "picture": _png(view, images[number]) if state == "golden" else b"",
                        }
                    )
                bar.update(len(part))
    return pd.DataFrame(rows)[LOOKS]


def _png(view: EvaluationView, image: Tensor) -> bytes:
    mean, std = (torch.tensor(values, device=image.device)[:, None, None] for values in (view.split.mean, view.split.std))
    pixels = (255 * (image * std + mean)).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def shifts(looks: pd.DataFrame, confidence: float = CONFIDENCE) -> dict[str, Any]:
    """State -> how far its maps are from the golden ones, with intervals over images. looks: as `look_at` returns them."""
    by_state = dict(iter(looks.groupby("state", sort=False)))
    golden = by_state.pop("golden")
    found = {}
    for state, faulty in by_state.items():
        pairs = [(np.array(before), np.array(after)) for before, after in zip(golden["map"], faulty["map"], strict=True)]
        same = (golden["prediction"].to_numpy() == faulty["prediction"].to_numpy()) & faulty["finite"].to_numpy()
        found[state] = {
            "finite": int(faulty["finite"].sum()),
            "rank_correlation": mean_over_images([rank_correlation(*pair) for pair in pairs], confidence).as_json(),
            "overlap": mean_over_images([overlap(*pair) for pair in pairs], confidence).as_json(),
            "changed": rate_estimate(int((~same).sum()), len(faulty), confidence).as_json(),
        }
    return found


def count_magnitudes(engine: Engine, loader: DataLoader, limit: float) -> dict[str, Any]:
    """How large the values of the last site are over a data set, and how large after one flip of a bit, each bit as likely.

    limit: the largest profiled magnitude of the site. Returns `powers` [P], ten to which begin the intervals of magnitudes, of
    which the first and last take all beyond; `golden` and `faulty` [P], the share of values in each; and of the faulty ones
    `not_finite` and, of finite ones, `beyond` limit.
    """
    storage = Storage(engine.number_format, limit, engine.sites[-1].neurons, engine.device)
    counts, lost, beyond = np.zeros((2, len(POWERS))), 0, 0
    last = len(engine.sites) - 1
    seen: list[Tensor] = []

    def see(position: int, output: Tensor) -> None:
        if position == last:
            seen.append(output.clone())

    for part, images, _ in batches(loader, engine.device):
        engine.observe(images, see)
        golden = seen.pop().reshape(len(part), -1)
        counts[0] += _count(golden)
        neurons = torch.arange(golden.shape[1], device=golden.device)
        for bit in range(engine.number_format.bits):
            every = OneFault(SINGLE_FLIP, last, neurons, torch.full_like(neurons, 1 << bit), math.inf)
            damage = storage.damage(every.on(len(part)), lambda row, neuron, golden=golden: golden[row, neuron])
            counts[1] += _count(damage.faulty)
            lost += int((~damage.faulty.isfinite()).sum())
            beyond += int((damage.faulty.isfinite() & (damage.faulty.abs() > limit)).sum())
    every_fault = counts[1].sum() + lost
    shares = counts / [[counts[0].sum()], [every_fault]]
    return {
        "powers": POWERS.tolist(),
        "golden": shares[0].tolist(),
        "faulty": shares[1].tolist(),
        "beyond": beyond / every_fault,
        "not_finite": lost / every_fault,
    }


def _count(values: Tensor) -> np.ndarray:
    finite = values[values.isfinite()].double().abs().clamp(min=1e-300)
    powers = finite.log10().floor().clamp(int(POWERS[0]), int(POWERS[-1])).long() - int(POWERS[0])
    return torch.bincount(powers.cpu(), minlength=len(POWERS)).numpy()
