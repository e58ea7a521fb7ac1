"""Dry run of a grid: say what every run takes, from speeds measured on this machine's device. Runs and writes nothing."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from stages.settings import campaign_settings
from textguard.artifacts import read_json
from textguard.faults import Campaign
from textguard.faults.profiling import loader_of
from textguard.params import ENCODER_FILE, Params, RunParams
from textguard.planning import Speeds, Workload
from textguard.runtime import announce, describe_device, pick_device
from textguard.vision.classifiers import ClassifierSpec, build_classifier
from textguard.vision.datasets import expected_sizes
from textguard.vision.optimisation import make_optimizer
from textguard.vision.order import steps_per_epoch
from textguard.vision.recipe import Recipe

PAPERS_WIDTH = 512
SECONDS = 2.0  # that training, and classification, are measured for


def main(params: Params) -> None:
    device = pick_device()
    width = int(read_json(Path(ENCODER_FILE), "encoder")["width"]) if Path(ENCODER_FILE).exists() else PAPERS_WIDTH
    measured: dict[tuple[str, int], tuple[Speeds, int]] = {}
    rows = []
    for key, run in params.runs.items():
        recipe = params.recipes[run.recipe]
        size = _sizes(params, run)
        kind = (run.backbone, recipe.image_size)
        if kind not in measured:
            announce(f"plan: measuring {run.backbone} at {recipe.image_size} x {recipe.image_size}")
            measured[kind] = _measure(params, run, recipe, size[2], device)
        speeds, sites = measured[kind]
        work = _workload(params, run, recipe, size, sites, width)
        hours = work.hours(speeds)
        rows.append(
            {
                "run": key,
                "train images": work.train_images,
                "test images": work.test_images,
                "epochs": 0 if run.checkpoint else recipe.epochs,
                "sites": work.sites,
                "injections": work.injections,
                "disk (MB)": work.disk_bytes / 1e6,
                **{f"{stage} (h)": value for stage, value in hours.items()},
                "all (h)": sum(hours.values()),
            }
        )
    table = pd.DataFrame(rows).set_index("run")
    table.loc["total"] = table.drop(columns=["train images", "test images", "epochs", "sites"]).sum()
    shown = dict.fromkeys(table.columns, "{:,.0f}".format)
    shown |= {name: "{:,.3f}".format for name in table.columns if name.endswith("(h)")}
    print(table.to_string(formatters=shown, na_rep=""))
    speeds = {f"{name} at {side}": asdict(speed) for (name, side), (speed, _) in measured.items()}
    print(f"\n{pd.DataFrame(speeds).T.round(1).to_string()}")
    print(
        f"\nDevice-hours on {describe_device(device)}, from small batches, random images and untrained networks just now, in "
        "images and injections per second. Not counted: reading and augmenting images, compiling, layers that are enumerated "
        f"(the last), closeup, stages without a network. Sizes of data sets are the published ones, E = {width}."
    )


def _sizes(params: Params, run: RunParams) -> tuple[int, int, int]:
    dataset = params.datasets[run.dataset]
    limits = {"limit_train": dataset.limit_train, "limit_test": dataset.limit_test}
    return expected_sizes(dataset.source, test_share=dataset.test_share, **limits)


def _workload(params: Params, run: RunParams, recipe: Recipe, size: tuple[int, int, int], sites: int, width: int) -> Workload:
    """sites: of the baseline. A text-guided classifier has one more: the head. The last one is enumerated, where any is."""
    train_images, test_images, classes = size
    guided = run.variant != "baseline"
    with torch.device("meta"):
        model = build_classifier(_spec(run, recipe, classes, width if guided else 0))
    batch = min(recipe.batch_size, train_images)
    return Workload(
        train_images,
        test_images,
        0 if run.checkpoint else recipe.epochs * steps_per_epoch(train_images, recipe) * batch,
        sites + guided - bool(params.inject.enumerate_up_to),
        params.inject.injections_per_layer,
        sum(parameter.numel() for parameter in model.parameters()),
        len(set(params.inject.compare_detectors) - {params.inject.detector}),
    )


def _spec(run: RunParams, recipe: Recipe, classes: int, width: int) -> ClassifierSpec:
    prepared = recipe.image_size, recipe.resize_size, recipe.interpolation
    return ClassifierSpec(run.dataset, run.backbone, run.variant, *prepared, width, tuple(map(str, range(classes))))


def _measure(params: Params, run: RunParams, recipe: Recipe, classes: int, device: torch.device) -> tuple[Speeds, int]:
    """Speeds of the baseline, to which a text-guided classifier is close, and its number of sites."""
    torch.manual_seed(0)
    side = recipe.image_size
    count = 64 if device.type == "cuda" or side <= 64 else 4
    model = build_classifier(_spec(run, recipe, classes, 0)).to(device)
    images, labels = torch.randn(count, 3, side, side, device=device), torch.randint(classes, (count,), device=device)
    optimizer = make_optimizer(model, recipe)
    # On CPUs half precision is slower than fp32 by orders of magnitude, and is no sensible choice there.
    half = recipe.precision != "fp32" and device.type == "cuda"

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.float16 if recipe.precision == "fp16" else torch.bfloat16, enabled=half):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    training = count * _pace(step, device)
    model.eval()
    with torch.inference_mode():
        inference = count * _pace(lambda: model(images), device)
    inject = campaign_settings(params.inject)
    settings = replace(inject, detector="fixed:65536", compare_detectors=(), batch_size=min(inject.batch_size, 2 * count))
    campaign = Campaign(model, loader_of(images[:4], labels[:4], 4), settings)
    injections = campaign.pace(injections_per_layer=4, injections=4 * count)
    return Speeds(training, inference, injections), len(campaign.engine.sites)


def _pace(work: Callable[[], object], device: torch.device) -> float:
    """How often per second `work` is done, after once to warm up, by the median of three times or of SECONDS."""
    took: list[float] = []
    work()
    while not took or (sum(took) < SECONDS and len(took) < 3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - start)
    return 1 / float(np.median(took))
