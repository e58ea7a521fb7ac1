"""Which faults to inject, and how many: uniformly, as in the paper, or by bit, from a pilot, up to a wanted precision."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
from torch.utils.data import DataLoader

from textguard.errors import InvalidParameter, Setting
from textguard.estimates.statistics import mean_interval, planned_half_width, planned_injections
from textguard.estimates.summary import LayerResult, summarise, without
from textguard.faults.checks import checked_name, confidence_level, folder_path, some_text, whole_number
from textguard.faults.damage import SINGLE_FLIP, FaultModel
from textguard.faults.engines import Engine
from textguard.faults.execution import measure_pace, run_campaign
from textguard.faults.guided import check_predictable, draw_guided
from textguard.faults.patterns import regions_of
from textguard.faults.plans import DRAWN_COLUMNS, PLAN_COLUMNS, Count, bits_at, draw_plan
from textguard.faults.sites import Site
from textguard.faults.task import CLASSES, Task, make_task
from textguard.runtime import announce

PLANS = ("uniform", "proportional", "neyman", "guided")
# Of Neyman's allocation this share goes evenly to all bits: a pilot that missed a bit's rare disasters must not silence it.
EVENLY = 0.3
GROWTH = 3  # times the injections so far, at most, in one go: half-widths from few injections promise too much


@dataclass(frozen=True)
class Design:
    """How a campaign spreads its injections.

    Parameters
    ----------
    plan : {"uniform", "proportional", "neyman", "guided"}
        `uniform` draws bits as it draws everything else. `proportional` gives every bit the same number of injections.
        `neyman` gives every bit a number in proportion to the standard deviation of its DeltaLoss. `guided` draws mostly the
        faults that are predicted to do most; see `draw_guided`.
    injections_per_layer : int
        Injections into each layer, at most.
    pilot : int
        Of them, those that are drawn evenly before the rest is planned, for `neyman` and for `stop_at`.
    stop_at : str
        `never`, or the half-width of a layer's DeltaLoss that ends it: in nats ("0.001"), or as a share of it ("10%").
    confidence : float
        Of that interval, 0.5 to 0.9999.
    seed : int
        Of the fault plan.
    share_images : bool, default False
        Whether all layers are hit on the same images. Where there are more images than injections, each image then has more
        faults, which makes a campaign faster. Means over layers are less precise, because their layers err together.

    Raises
    ------
    TextguardError
        A number has the wrong type or is out of range, or there is no such plan.

    References
    ----------
    Neyman, Journal of the Royal Statistical Society 97, 1934 (the allocation).

    Examples
    --------
    >>> from textguard.faults import Design
    >>> design = Design("neyman", injections_per_layer=1000, pilot=128, stop_at="10%", confidence=0.99, seed=0)
    >>> design.half_width(delta_loss=0.5)
    0.05
    """

    plan: str
    injections_per_layer: int
    pilot: int
    stop_at: str
    confidence: float
    seed: int
    share_images: bool = False

    def __post_init__(self) -> None:
        checked_name("plan", self.plan, PLANS, Setting("plan"))
        some_text(Setting("stop_at"), self.stop_at)
        object.__setattr__(self, "confidence", confidence_level(Setting("confidence"), self.confidence))
        for name, least in (("injections_per_layer", 1), ("pilot", 1), ("seed", 0)):
            object.__setattr__(self, name, whole_number(Setting(name), getattr(self, name), least))

    def strata(self, fault_model: FaultModel, engine: Engine) -> int:
        """How many strata the plan has: one for each bit, or 0. Raises UnknownName, InvalidParameter, for all of the design."""
        self.half_width(0.0)
        if self.plan == "guided":
            check_predictable(fault_model)
        by_bit = self.plan in ("proportional", "neyman")
        of_sites = {bits_at(site, fault_model, engine.number_format) for site in engine.sites} if by_bit else {0}
        if len(of_sites) > 1:
            found = " and ".join(map(str, sorted(of_sites)))
            raise InvalidParameter(
                Setting("plan"), f" is {self.plan!r}, by bit; but layers of this model have {found} bits; take uniform"
            )
        (bits,) = of_sites
        name = "pilot" if self.in_rounds and self.pilot < self.injections_per_layer else "injections_per_layer"
        least = getattr(self, name)
        if least < max(1, 2 * bits):
            needed = f"a plan by bit needs 2 for each of {bits} bits" if bits else "at least 1 is needed"
            raise InvalidParameter(Setting(name), f" is {least}; {needed}")
        return bits

    @property
    def in_rounds(self) -> bool:
        """Whether the pilot decides on the rest."""
        return self.plan == "neyman" or self.stop_at != "never"

    def half_width(self, delta_loss: float) -> float:
        """What ends a layer, in nats; 0 for nothing. Raises InvalidParameter."""
        if self.stop_at == "never":
            return 0.0
        number, percent, rest = self.stop_at.partition("%")
        try:
            wanted = float(number)
        except ValueError:
            wanted = math.nan
        if not 0 < wanted < math.inf or rest:
            raise InvalidParameter(
                Setting("stop_at"),
                f" is {self.stop_at!r}; allowed: never, a half-width in nats as 0.001, "
                "or in percent of the layer's DeltaLoss as 10%",
            )
        return wanted / 100 * delta_loss if percent else wanted


def run_design(
    engine: Engine,
    sites: Sequence[Site],
    loader: DataLoader,
    chances: np.ndarray,
    limits: Mapping[str, float],
    design: Design,
    *,
    image_batch: int,
    fault_model: FaultModel = SINGLE_FLIP,
    shard_dir: str | os.PathLike[str] | None = None,
    label: str = "inject",
    half_widths: Mapping[str, float] | None = None,
    guides: Sequence[Mapping[str, float]] = (),
    task: Task | str = CLASSES,
) -> pd.DataFrame:
    """Inject faults into some sites of an engine's model as designed.

    Under `neyman`, the bits of a layer get their shares from the pilots of the other layers. The layer's own pilot must not
    decide how often each bit is looked at again, because its injections would then be biased.

    Parameters
    ----------
    engine : Engine
        Runs the model with faults; see `make_engine`.
    sites : sequence of Site
        The layers to inject into, some of the engine's.
    loader : DataLoader
        Gives N images and labels, from a map-style data set.
    chances : numpy.ndarray
        float64 [N], of the images to be drawn, as `image_chances` gives them.
    limits : mapping of str to float
        Layer -> largest magnitude that the range detector lets pass.
    design : Design
        How many injections, and where.
    image_batch : int
        Images per golden run, and per shard.
    fault_model : FaultModel, default one flipped bit of one neuron
        What one injection is.
    shard_dir : str or path-like, optional
        A folder in which an interrupted campaign goes on; see `run_campaign`.
    label : str, default "inject"
        Names the campaign in progress lines.
    half_widths : mapping of str to float, optional
        Layer -> the half-width in nats that ends it, where it is not the same for all layers.
    guides : sequence of mappings of str to float, optional
        The limits of other range detectors that a guided plan shall serve too.
    task : Task or its name, default that of an ordinary classifier
        What batches and logits mean.

    Returns
    -------
    pandas.DataFrame
        The records, as `run_campaign` returns them, by layer and index.

    Raises
    ------
    TextguardError
        The design, or shard_dir, does not fit.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.faults import Design, image_chances, make_engine, run_design
    >>> model = nn.Linear(2, 2, bias=False)
    >>> model.weight.data = torch.eye(2)
    >>> images, labels = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 0])
    >>> engine, loader = make_engine("replay", model, images[0], batch_size=8), DataLoader(TensorDataset(images, labels))
    >>> design = Design("proportional", injections_per_layer=64, pilot=64, stop_at="never", confidence=0.99, seed=0)
    >>> chances, limits = image_chances(engine, loader), {site.layer: 3.0 for site in engine.sites}
    >>> records = run_design(engine, engine.sites, loader, chances, limits, design, image_batch=2)
    >>> records["bit"].value_counts().unique().tolist()  # of each of the 32 bits
    [2]
    """
    task, shard_dir = make_task(task), folder_path(Setting("shard_dir"), shard_dir)
    bits = design.strata(fault_model, engine)
    designs = {site.layer: replace(design, stop_at=str(half_widths[site.layer])) if half_widths else design for site in sites}
    most = design.injections_per_layer
    one = designs[sites[0].layer]  # apart from its half-width, as all others
    first = min(design.pilot, most) if one.in_rounds else most
    shares = dict.fromkeys((site.layer for site in sites), np.full(bits, 1 / bits) if bits else np.zeros(0))
    wanted = {site.layer: first for site in sites}
    counts: dict[str, Count] = {layer: spread_over_bits(first, shares[layer], None) for layer in wanted}
    found: dict[str, list[pd.DataFrame]] = {layer: [] for layer in wanted}
    going_on, number, guided = list(sites), 0, design.plan == "guided"
    while going_on:
        if guided:
            ranges = {site.layer: (sum(map(_count, found[site.layer])), wanted[site.layer]) for site in going_on}
            plan = draw_guided(
                engine,
                going_on,
                loader,
                chances,
                ranges,
                design.seed,
                fault_model,
                [limits, *guides],
                design.share_images,
                f"{label}, plan",
                task,
            )
        else:
            plan = draw_plan(going_on, chances, counts, design.seed, fault_model, engine.number_format, design.share_images)
            if number:
                plan = without(plan, pd.concat(part for site in going_on for part in found[site.layer]))
        if not number:
            _announce(engine, sites, loader, plan, limits, one, np.count_nonzero(chances), fault_model, label, task)
        records = run_campaign(
            engine,
            loader,
            plan,
            limits,
            image_batch=image_batch,
            fault_model=fault_model,
            shard_dir=shard_dir / f"round-{number}" if shard_dir else None,
            label=f"{label}, round {number + 1}" if one.in_rounds else label,
            same=DRAWN_COLUMNS if guided else PLAN_COLUMNS,
            task=task,
        )
        for layer, part in records.groupby("layer", sort=False):
            found[layer].append(part)
        results = {
            site.layer: summarise(pd.concat(found[site.layer]), {site.layer: site.neurons}, bits, guided=guided)[site.layer]
            for site in going_on
        }
        if not number and design.plan == "neyman":
            shares = neyman_shares({layer: result.strata["delta_loss"] for layer, result in results.items()})
        ends = {layer: next_total(result, wanted[layer], designs[layer]) for layer, result in results.items()}
        going_on = [site for site in going_on if ends[site.layer] > wanted[site.layer]]
        for layer in (site.layer for site in going_on):
            counts[layer], wanted[layer] = spread_over_bits(ends[layer], shares[layer], counts[layer]), ends[layer]
        number += 1
    in_order = sorted(sites, key=lambda site: site.position)
    return pd.concat((pd.concat(found[site.layer]).sort_values("index", kind="stable") for site in in_order), ignore_index=True)


def _count(records: pd.DataFrame) -> int:
    """How many injections these records are of."""
    return records["index"].nunique()


def rerun_changed(
    engine: Engine,
    loader: DataLoader,
    records: pd.DataFrame,
    limits: Mapping[str, float],
    *,
    image_batch: int,
    fault_model: FaultModel = SINGLE_FLIP,
    shard_dir: Path | None = None,
    label: str = "inject",
    task: Task = CLASSES,
) -> pd.DataFrame:
    """The records that differ under a range detector with other limits. Only these injections are run again.

    records: of a campaign under one detector. limits: layer -> largest magnitude that the other detector lets pass.
    """
    limit = records["layer"].map(limits).to_numpy(np.float32)
    with np.errstate(invalid="ignore"):  # some are NaN
        beyond = np.isfinite(limit) & ~(np.abs(records["faulty_value"].to_numpy(np.float32)) <= limit)
    # Of damaged metadata the records hold the codes, not the values that the detector sees; of a region, one value of many.
    differs = records["detected"].to_numpy(bool) | beyond | (fault_model.target == "metadata") | fault_model.shaped
    differs = records.assign(differs=differs).groupby(["layer", "index"])["differs"].transform("any").to_numpy(bool)
    plan = records.loc[differs, PLAN_COLUMNS].reset_index(drop=True)
    if not len(plan):
        return records.iloc[:0]
    return run_campaign(
        engine,
        loader,
        plan,
        limits,
        image_batch=image_batch,
        fault_model=fault_model,
        shard_dir=shard_dir,
        label=label,
        task=task,
    )


def spread_over_bits(total: int, shares: np.ndarray, before: Count | None) -> Count:
    """Spread a layer's injections over the bits.

    total: injections of the layer. shares: float [bits], of each bit, summing to 1; [0] where bits are drawn uniformly. before:
    int [bits], what each bit has had already, which it keeps; None for nothing. Every bit gets at least two injections, because
    fewer have no standard deviation. Returns int64 [bits], or `total` where bits are drawn uniformly.
    """
    if not len(shares):
        return total
    least = np.full(len(shares), 2) if before is None else np.asarray(before)
    kept = np.zeros(len(shares), dtype=bool)  # those that get no more, since they had more than their share before
    wanted = shares * total
    while (wanted < least).any():
        kept |= wanted < least
        rest = max(0, total - least[kept].sum())
        wanted = np.where(kept, least, shares * (rest / max(shares[~kept].sum(), 1e-300)))
    whole = np.floor(wanted + 1e-9).astype(np.int64)
    largest = np.argsort(whole - wanted, kind="stable")
    whole[largest[: max(0, total - whole.sum())]] += 1
    return whole


def neyman_shares(pilots: Mapping[str, Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
    """Layer -> share of each bit, float [bits], by Neyman's allocation.

    pilots: layer -> DeltaLoss of each bit's injections, float [n]. A layer's shares are the mean of the other layers' standard
    deviations by bit, each layer's scaled to sum 1, mixed with even shares (see EVENLY).
    """
    spreads = {layer: np.array([stratum.std(ddof=1) for stratum in strata]) for layer, strata in pilots.items()}
    spreads = {layer: spread / spread.sum() for layer, spread in spreads.items() if spread.sum() > 0}
    shares = {}
    for layer, strata in pilots.items():
        others = [spread for other, spread in spreads.items() if other != layer]
        even = np.full(len(strata), 1 / len(strata))
        if not others:
            shares[layer] = even
            continue
        # Faults in low bits change nothing but the last digits of a sum, and how depends on the batch size. Two decimals hide
        # these differences, so that the batch size changes no plan.
        mean = np.mean(others, axis=0).round(2)
        shares[layer] = EVENLY * even + (1 - EVENLY) * mean / mean.sum()
    return shares


def next_total(result: LayerResult, injections: int, design: Design) -> int:
    """How many injections a layer shall have had after the next round; as many as now where it is done.

    result: its estimates so far. injections: how many it has had.
    """
    most = design.injections_per_layer
    if injections >= most or design.stop_at == "never":
        return most
    found = mean_interval(result.delta_loss, design.confidence)
    half, wanted = (found.high - found.low) / 2, design.half_width(found.value)
    if half <= wanted and found.value > 0:  # while no fault has done anything, the spread is unknown
        return injections
    needed = injections * (half / wanted) ** 2 if wanted > 0 and math.isfinite(half) else math.inf
    return math.ceil(min(max(needed, injections * 1.25), injections * GROWTH, most))


def _announce(
    engine: Engine,
    sites: Sequence[Site],
    loader: DataLoader,
    plan: pd.DataFrame,
    limits: Mapping[str, float],
    design: Design,
    images: int,
    fault_model: FaultModel,
    label: str,
    task: Task,
) -> None:
    """Say what is planned, what it is worth, and how long it may take."""
    pace = measure_pace(engine, loader, plan, limits, fault_model=fault_model, task=task)
    most, confidence = design.injections_per_layer, f"{design.confidence:.0%}"
    regions = [regions_of(site, fault_model).count if fault_model.shaped else site.neurons for site in sites]
    population = images * min(
        count * bits_at(site, fault_model, engine.number_format) for count, site in zip(regions, sites, strict=True)
    )
    half = planned_half_width(population, most, design.confidence)
    duration = timedelta(seconds=round(most * len(sites) / pace))
    # The formula is of draws that are alike; what guided ones are worth, only their results tell.
    worth = (
        f"; any rate to +-{half:.2%} at {confidence}, "
        f"{planned_injections(population, 0.01, design.confidence):,} would to +-1 % (Leveugle et al., 2009)"
    )
    announce(
        f"{label}: {len(sites)} layers to sample, plan {design.plan}, {'at most ' if design.in_rounds else ''}{most:,} "
        f"injections each, {most * len(sites):,} in all, about {duration}{'' if design.plan == 'guided' else worth}"
    )
