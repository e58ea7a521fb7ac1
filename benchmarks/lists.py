"""An outside check: dnn-benchmarks' lists of weight faults, replayed, and compared with the outcomes that they publish.

Theirs are of CIFAR-10's 10,000 test images. Here are as many of them as fit into SECONDS for each list, drawn at random; and
where the folder holds JPEGs, these are other images, which the networks have wrong more often. So counts agree in size.
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.cifar_resnet import folder, published, some_images
from textguard.hardware.lists import read_fault_list
from textguard.hardware.persistent import run_persistent

NETWORKS = (20, 32, 44)
SECONDS = 120
IMAGES = 64  # at a time
SOME, SOME_IMAGES = 200, 2048  # faults that are evenly spread over the list, on many images
MOST = 0.5  # of images, from which on a fault is mostly critical


def measure(seconds: float = SECONDS) -> dict[str, Any]:
    """For each network: images, top-1, and how ours and the published counts agree."""
    files, pictures = folder("TEXTGUARD_FAULT_LISTS"), folder("TEXTGUARD_CIFAR10")
    if files is None or pictures is None:
        print("lists: TEXTGUARD_FAULT_LISTS and TEXTGUARD_CIFAR10 name no folders; left out", file=sys.stderr)
        return {}
    return {f"ResNet-{layers}": _agreement(layers, files, pictures, seconds) for layers in NETWORKS}


def _agreement(layers: int, files: Path, pictures: Path, seconds: float) -> dict[str, Any]:
    """The whole list on few images, and a few of its faults on many."""
    model = published(layers, files)
    plan = read_fault_list(files / f"ResNet{layers}_FL.csv.xz", model)
    images, labels = some_images(pictures, 10_000)
    some = plan.iloc[np.linspace(0, len(plan) - 1, SOME).astype(int)].reset_index(drop=True)
    return {
        "whole": _replayed(model, plan, images, labels, seconds),
        "some": _replayed(model, some, images[:SOME_IMAGES], labels[:SOME_IMAGES], seconds),
    }


def _replayed(model: nn.Module, plan: pd.DataFrame, images: Tensor, labels: Tensor, seconds: float) -> dict[str, Any]:
    """A list on as many of the images as fit into the time."""
    changed, right, seen = np.zeros(len(plan)), 0.0, 0
    start = time.perf_counter()
    while seen < len(images) and (not seen or (time.perf_counter() - start) * (1 + IMAGES / seen) < seconds):
        some = slice(seen, seen + IMAGES)
        loader = DataLoader(TensorDataset(images[some], labels[some]), batch_size=IMAGES)
        result = run_persistent(model, loader, plan, batch_size=64, image_batch=IMAGES, label="lists")
        changed += result.outcomes["changed"].to_numpy()
        right, seen = right + result.golden["correct"].sum(), seen + result.images
    took = time.perf_counter() - start
    return {"seconds": took, "top1": float(right / seen), **compare(plan, changed / seen, seen)}


def compare(plan: pd.DataFrame, ours: np.ndarray, images: int) -> dict[str, Any]:
    """How our shares of changed predictions agree with the published counts, fault by fault.

    plan: as `read_fault_list` returns it. ours: float [faults]. images: how many these are of.
    """
    theirs = (plan["critical"] / plan["n_injections"]).to_numpy()
    classes = [np.select([share == 0, share < MOST], [0, 1], 2) for share in (ours, theirs)]
    # One critical image in a thousand is not to be seen among hundreds: there a fault that is never critical for us may be
    # critical sometimes for them. So agreement is also told where theirs is at least what one image is of ours.
    shown = theirs >= 1 / images
    bits = pd.DataFrame({"bit": plan["bit"], "ours": ours, "theirs": theirs}).groupby("bit")
    return {
        "faults": len(plan),
        "images": images,
        "spearman": float(spearmanr(ours, theirs).statistic),
        "spearman_where_shown": float(spearmanr(ours[shown], theirs[shown]).statistic),
        "shown": int(shown.sum()),
        "pearson": float(pearsonr(ours, theirs).statistic),
        "same_class": float((classes[0] == classes[1]).mean()),
        "same_class_where_shown": float((classes[0] == classes[1])[shown].mean()),
        "mean_changed": [float(ours.mean()), float(theirs.mean())],
        "median_of_bit": {str(bit): [float(of["ours"].median()), float(of["theirs"].median())] for bit, of in bits},
        "mean_of_bit": {str(bit): [float(of["ours"].mean()), float(of["theirs"].mean())] for bit, of in bits},
    }
