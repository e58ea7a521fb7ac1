"""What it takes to know every layer's DeltaLoss as well as from 4096 uniform injections with PyTorchFI."""

from typing import Any

import numpy as np
import torch

from benchmarks.common import SEED, alternating, digits_campaign
from textguard.estimates.statistics import CONFIDENCE, mean_interval
from textguard.estimates.summary import LayerResult, summarise
from textguard.faults.damage import SINGLE_FLIP
from textguard.faults.engines import make_engine
from textguard.faults.exact import affordable, enumerate_layer
from textguard.faults.execution import run_campaign
from textguard.faults.plans import draw_plan
from textguard.faults.profiling import image_chances
from textguard.faults.sampling import Design, run_design

RATIOS = ("times_fewer", "times_fewer_median", "times_fewer_worst", "times_faster")
BATCH = 256  # with channels last the best for PyTorchFI on this model, see benchmarks/injections.py


def measure(trainings: int = 3) -> dict[str, Any]:
    """How many times fewer injections, and how many times less time: median, smallest and largest over the trainings.

    trainings: classifiers that it is measured on.
    """
    each = [_measure(SEED + number) for number in range(trainings)]
    times = {name: [own[name] for own in each] for name in RATIOS}
    return {
        "trainings": trainings,
        **{name: [float(np.median(own)), min(own), max(own)] for name, own in times.items()},
        **{name: sum(own[name] for own in each) for name in ("sampled", "reached")},
        "each": each,
    }


def _measure(
    seed: int, injections: int = 4096, seeds: int = 5, subsample: int = 4096, pilot: int = 16, rounds: int = 3
) -> dict[str, float]:
    """Injections and seconds of both on one training, and their ratios.

    injections: uniform ones per layer, which set the half-widths to reach: the median over so many seeds, since one campaign's
    is itself uncertain. subsample: how many of all of them PyTorchFI really runs; its seconds are scaled up. pilot: ours.
    rounds: alternating runs of both, of which the medians count.
    Ours is guided, and stops a layer as soon as its half-width is reached, with as many injections as those at most; what it
    takes to predict faults counts. The last layer is enumerated: no injections, but seconds. Finding the eligible images and
    preparing both engines counts for neither.
    """
    setup = digits_campaign(BATCH, seed)
    engine, loader, limits = setup.engine, setup.loader, setup.limits
    neurons = {site.layer: site.neurons for site in engine.sites}
    plain = image_chances(engine, loader, "uniform")
    plan = draw_plan(engine.sites, plain, injections, SEED)
    # Whichever engine runs a plan, its half-widths are the same: take the fast one.
    halves: dict[str, list[float]] = {layer: [] for layer in neurons}
    for number in range(seeds):
        of_seed = draw_plan(engine.sites, plain, injections, SEED + number)
        records = run_campaign(engine, loader, of_seed, limits, image_batch=64, label=f"uniform {number + 1} of {seeds}")
        for layer, result in summarise(records, neurons).items():
            halves[layer].append(_half_width(result))
    wanted = {layer: float(np.median(found)) for layer, found in halves.items()}

    few = plan.iloc[:: max(1, len(plan) // subsample)]
    reference = make_engine("pytorchfi", setup.model.to(memory_format=torch.channels_last), loader.dataset[0][0], BATCH)
    # All images in one shard, for both: so few injections would not fill batches otherwise.
    at_once = len(plain)

    def theirs() -> None:
        run_campaign(reference, loader, few, limits, image_batch=at_once, label="pytorchfi")

    chances = image_chances(engine, loader, "guided")
    eligible = np.flatnonzero(chances).tolist()

    def ours() -> None:
        known = affordable(engine, len(eligible), SINGLE_FLIP, 1)
        faults = sum(enumerate_layer(engine, loader, eligible, site, limits[site.layer]).faults.sum() for site in known)
        sites = [site for site in engine.sites if site not in known]
        design = Design("guided", injections, pilot, "never", CONFIDENCE, SEED)
        records = run_design(engine, sites, loader, chances, limits, design, image_batch=at_once, half_widths=wanted)
        results = summarise(records, {site.layer: site.neurons for site in sites}, guided=True)
        outcome.update(records=records, found=results, faults=int(faults), sampled=len(sites))

    outcome: dict[str, Any] = {}
    times = alternating({"theirs": theirs, "ours": ours}, rounds)
    their_seconds, our_seconds = times["theirs"] * len(plan) / len(few), times["ours"]
    records, found = outcome["records"], outcome["found"]
    return {
        "layers": len(neurons),
        "sampled": outcome["sampled"],
        "uniform_per_layer": injections,
        "pytorchfi_injections": len(plan),
        "pytorchfi_timed": len(few),
        "pytorchfi_seconds": their_seconds,
        "injections": len(records),
        "enumerated": outcome["faults"],
        "seconds": our_seconds,
        "reached": sum(_half_width(result) <= wanted[layer] for layer, result in found.items()),
        "most_injections": max(result.injections for result in found.values()),
        # Of the sampled layers alone: the exact one needs none.
        "times_fewer": injections * outcome["sampled"] / len(records),
        "times_fewer_median": injections / float(np.median([result.injections for result in found.values()])),
        "times_fewer_worst": injections / max(result.injections for result in found.values()),
        "times_faster": their_seconds / our_seconds,
    }


def _half_width(result: LayerResult) -> float:
    found = mean_interval(result.delta_loss)
    return (found.high - found.low) / 2
