"""Dry run of a grid: say what every run takes, from speeds measured on this machine's device. Runs and writes nothing."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from stages.settings import campaign_settings
from textguard.faults import Campaign
from textguard.faults.profiling import loader_of
from textguard.params import BackboneParams, DatasetParams, Params, Run
from textguard.planning import Speeds, Workload, disk_size, duration
from textguard.runtime import announce, describe_device, pick_device
from textguard.text.encoders import encoder_width
from textguard.vision.classifiers import ClassifierSpec, build_classifier
from textguard.vision.datasets import data_root, expected_sizes, make_splits, read_source
from textguard.vision.order import steps_per_epoch
from textguard.vision.training import Trainer

SECONDS = 2.0  # that training, and classification, are measured for


def main(params: Params) -> None:
    device = pick_device()
    width = encoder_width(params.encoder)
    sizes = {name: _sizes(params.datasets[name], Path(params.root)) for name in params.datasets}
    measured: dict[tuple[str, int], tuple[Speeds, int]] = {}
    rows = []
    total = np.zeros(3)  # seconds, bytes, injections
    for key, run in params.runs.items():
        recipe = params.recipe(run)
        size = sizes[run.dataset]
        kind = (run.backbone, recipe.image_size)
        if kind not in measured:
            announce(f"plan: measuring {run.backbone} at {recipe.image_size} x {recipe.image_size}")
            measured[kind] = _measure(params, run, recipe, size[2], device)
        speeds, sites = measured[kind]
        work = _workload(params, run, recipe, size, sites, width)
        seconds = work.seconds(speeds)
        whole = sum(seconds.values())
        total += whole, work.disk_bytes, work.injections
        rows.append(
            {
                "run": key,
                "images": f"{work.train_images:,}+{work.test_images:,}",
                "epochs": 0 if run.weights_key in params.weights else recipe.epochs,
                "sites": work.sites,
                "injections": f"{work.injections:,}",
                "disk": disk_size(work.disk_bytes),
                "train": duration(seconds["train"]),
                "evaluate+ranges": duration(seconds["evaluate"] + seconds["ranges"]),
                "inject": duration(seconds["inject"]),
                "all": duration(whole),
            }
        )
    print(
        f"All {len(rows)} runs take {duration(total[0])} of one device like this ({describe_device(device)}); two such devices "
        f"halve it.\nThey make {total[2]:,.0f} injections and leave {disk_size(total[1])} on the disk.\n"
    )
    print(pd.DataFrame(rows).to_string(index=False))
    speeds = {f"{name} at {side}": asdict(speed) for (name, side), (speed, _) in measured.items()}
    print(f"\nMeasured just now, in images and injections per second:\n{pd.DataFrame(speeds).T.round(1).to_string()}")
    print(
        "\nAll times are device time, estimated from small batches, random images and untrained networks.\n"
        "Images are those to train on + those to test with; sizes of standard data sets are the published ones.\n"
        f"Class embeddings have E = {width} numbers.\n"
        "Not counted: reading and augmenting images, compiling, layers that are enumerated (the last), hardware,\n"
        "corruptions, closeup, stages without a network."
    )


def _sizes(dataset: DatasetParams, repository: Path) -> tuple[int, int, int]:
    """Images for training and testing, and classes: of a standard data set as published, of a folder as counted."""
    limits = {"limit_train": dataset.limit_train, "limit_test": dataset.limit_test}
    if dataset.source != "folder":
        return expected_sizes(dataset.source, test_share=dataset.test_share, **limits)
    content = read_source(dataset.source, data_root(dataset.source, dataset.folder, repository))
    how = {"test_share": dataset.test_share, "split_seed": dataset.split_seed, **limits}
    splits = make_splits(content, dataset.source, **how)
    return len(splits["train"].labels), len(splits["test"].labels), len(content.classes)


def _workload(params: Params, run: Run, recipe: BackboneParams, size: tuple[int, int, int], sites: int, width: int) -> Workload:
    """sites: of the baseline. Behind a latent layer there is one more: the head. The last one is enumerated, where any is."""
    train_images, test_images, classes = size
    treatment = params.treatment(run.variant)
    with torch.device("meta"):
        model = build_classifier(_spec(run, recipe, classes, width if treatment.width is None else treatment.width))
    batch = min(recipe.batch_size, train_images)
    return Workload(
        train_images,
        test_images,
        0 if run.weights_key in params.weights else recipe.epochs * steps_per_epoch(train_images, recipe) * batch,
        sites + treatment.latent - bool(params.inject.enumerate_up_to),
        params.inject.injections_per_layer,
        sum(parameter.numel() for parameter in model.parameters()),
        len(set(params.inject.compare_detectors) - {params.inject.detector}),
    )


def _spec(run: Run, recipe: BackboneParams, classes: int, width: int) -> ClassifierSpec:
    prepared = recipe.image_size, recipe.resize_size, recipe.interpolation
    return ClassifierSpec(run.dataset, recipe.network, run.variant, *prepared, width, tuple(map(str, range(classes))))


def _measure(params: Params, run: Run, recipe: BackboneParams, classes: int, device: torch.device) -> tuple[Speeds, int]:
    """Speeds of the baseline, to which a text-guided classifier is close, and its number of sites."""
    torch.manual_seed(0)
    side = recipe.image_size
    count = 64 if device.type == "cuda" or side <= 64 else 4
    model = build_classifier(_spec(run, recipe, classes, 0)).to(device)
    images, labels = torch.randn(count, 3, side, side, device=device), torch.randint(classes, (count,), device=device)
    # On CPUs half precision is slower than fp32 by orders of magnitude, and is no sensible choice there.
    trained = recipe if device.type == "cuda" else replace(recipe, precision="fp32")
    trainer = Trainer(model, count, classes, trained, seed=0, label="plan")
    training = (count - trainer.before) * _pace(lambda: trainer.step(images, labels), device)
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
