"""Persistent faults: how much faster than the loop that users write, and than PyTorchFI's weight injection.

The loop flips the value in place, runs all images under inference_mode, and puts it back, in the memory format and with the
batch size that a short trial finds fastest. PyTorchFI 0.6.0 copies the model for each fault (`declare_weight_fi`), and then
runs all images the same way. Neither's pace depends on the fault, so both run a few, and ours all. Rounds alternate, so that
whatever else the machine does hits all three.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.cifar_resnet import ResNet, folder, published, some_images
from benchmarks.common import SEED, alternating, seconds
from benchmarks.injections import FORMATS, Way
from textguard.faults.inputs import device_of
from textguard.hardware.persistent import run_persistent
from textguard.hardware.stored import StoredTensor, draw_persistent, stored_tensors, tensors_of
from textguard.runtime import import_torchvision

ROUNDS = 3
GOAL = 5.0  # times the loop, on ResNet-20
BATCHES = (8, 16, 32)
FEW = 8  # faults of the loop and of PyTorchFI in a round


@dataclass(frozen=True)
class Case:
    """A model and what it is measured with. make: gives the model. side: of images. faults: of each plan. images: how many."""

    make: Callable[[], nn.Module]
    side: int
    faults: int
    images: int


def _torchvision(name: str) -> nn.Module:
    import_torchvision()
    from torchvision import models

    return models.get_model(name, weights=None, num_classes=10)


def _vit(side: int) -> nn.Module:
    import_torchvision()
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=side, num_classes=10)


def _resnet20() -> nn.Module:
    files = folder("TEXTGUARD_FAULT_LISTS")
    return published(20, files) if files else ResNet(20)


CASES = {
    "ResNet-20 at 32 x 32": Case(_resnet20, 32, 970, 32),
    "ResNet-18 at 64 x 64": Case(partial(_torchvision, "resnet18"), 64, 620, 16),
    "MobileNet-V2 at 64 x 64": Case(partial(_torchvision, "mobilenet_v2"), 64, 780, 16),
    "ViT-tiny at 64 x 64": Case(partial(_vit, 64), 64, 600, 16),
}


def measure(names: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """For each case: inferences/s of the loop, PyTorchFI and ours, for faults uniform over tensors and over stored bits."""
    return {name: _measure(CASES[name]) for name in names or CASES}


def _model_and_images(case: Case) -> tuple[nn.Module, Tensor]:
    """The model; random weights get running statistics from random images. Images of CIFAR-10, where these are known."""
    torch.manual_seed(SEED)
    model, files = case.make(), folder("TEXTGUARD_CIFAR10")
    if case.side == 32 and files:
        images, _ = some_images(files, case.images)
    else:
        images = torch.randn(case.images, 3, case.side, case.side)
    if not isinstance(model, ResNet):
        with torch.no_grad():
            for _ in range(3):
                model.train()(torch.randn(32, *images.shape[1:]))
    return model.eval(), images


def _by_bits(tensors: list[StoredTensor], count: int) -> dict[str, int]:
    """How many of `count` faults strike each tensor where all stored bits are as likely."""
    bits = np.array([tensor.values * tensor.stored_as().bits for tensor in tensors], dtype=float)
    drawn = np.random.default_rng(SEED).multinomial(count, bits / bits.sum())
    return {tensor.name: int(number) for tensor, number in zip(tensors, drawn, strict=True)}


def _measure(case: Case) -> dict[str, Any]:
    model, images = _model_and_images(case)
    with torch.inference_mode():
        labels = model(images).argmax(1)
    loader = DataLoader(TensorDataset(images, labels), batch_size=case.images)
    tensors = stored_tensors(model, images[0])
    plans = {
        "tensors": draw_persistent(tensors, case.faults // len(tensors), SEED),
        "bits": draw_persistent(tensors, _by_bits(tensors, case.faults), SEED),
    }
    weights = plans["bits"][plans["bits"]["layer"].str.endswith("weight")]
    few = weights.iloc[np.linspace(0, len(weights) - 1, FEW).astype(int)]
    way = min(
        (Way(name, size) for name in FORMATS for size in BATCHES if size <= case.images),
        key=lambda way: min(seconds(partial(_infer, *way.arrange(model, images), way.batch)) for _ in range(3)),
    )
    batch = min((32, 64, 128), key=lambda size: seconds(partial(run_persistent, model, loader, few, batch_size=size)))
    found: dict[str, Any] = {}

    def ours(name: str, foresee: bool) -> None:
        result = run_persistent(model, loader, plans[name], batch_size=batch, image_batch=case.images, foresee=foresee)
        found[name] = {"changed": float(result.outcomes["changed"].sum() / result.outcomes["images"].sum())}
        found[name]["masked"] = float(result.outcomes["masked"].sum() / result.outcomes["images"].sum())

    runs: dict[str, Callable[[], object]] = {
        "loop": partial(_loop, *way.arrange(model, images), way.batch, few),
        **{name: partial(ours, name, True) for name in plans},
        "tensors, run": partial(ours, "tensors", False),
    }
    theirs = _pytorchfi(*way.arrange(model, images), way.batch, few)
    if theirs:
        runs["pytorchfi"] = theirs
    times = alternating(runs, ROUNDS)
    per_fault = {"loop": times["loop"] / FEW, "pytorchfi": times.get("pytorchfi", float("nan")) / FEW}
    sizes = {"tensors": len(plans["tensors"]), "bits": len(plans["bits"]), "tensors, run": len(plans["tensors"])}
    result = {"loop": str(way), "batch": batch, "loop_per_s": case.images / per_fault["loop"]}
    for name, size in sizes.items():
        own = times[name] / size
        result[name] = {"faults": size, "per_s": case.images / own, "times_loop": per_fault["loop"] / own}
        if theirs:
            result[name]["times_pytorchfi"] = per_fault["pytorchfi"] / own
        result[name] |= found.get(name, {})
    return result


@torch.inference_mode()
def _infer(model: nn.Module, images: Tensor, batch: int) -> Tensor:
    return torch.cat([model(some) for some in images.split(batch)])


def _loop(model: nn.Module, images: Tensor, batch: int, plan: pd.DataFrame) -> list[Tensor]:
    """What users write: flip, run all images, flip back."""
    known, found = tensors_of(model), []
    for layer, neuron, bit in zip(plan["layer"], plan["neuron"], plan["bit"], strict=True):
        value = known[layer].data[np.unravel_index(neuron, known[layer].shape)]
        mask = torch.tensor(-(2**31) if bit == 31 else 1 << bit, dtype=torch.int32)
        value.view(torch.int32).bitwise_xor_(mask)
        found.append(_infer(model, images, batch).argmax(1))
        value.view(torch.int32).bitwise_xor_(mask)
    return found


def _pytorchfi(model: nn.Module, images: Tensor, batch: int, plan: pd.DataFrame) -> Callable[[], object] | None:
    """PyTorchFI's run of faults in weights of convolutions and linear layers; None where it cannot hit them."""
    from pytorchfi.core import fault_injection

    logging.getLogger().setLevel(logging.WARNING)
    kinds = (nn.Conv2d, nn.Linear)
    layers = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    known = tensors_of(model)
    try:
        injector = fault_injection(
            copy.deepcopy(model),
            batch,
            input_shape=list(images.shape[1:]),
            layer_types=list(kinds),
            use_cuda=device_of(model).type == "cuda",
        )
    except Exception as error:  # of whatever it does to the model
        print(f"PyTorchFI: {error}")
        return None
    places = []
    for layer, neuron, bit in zip(plan["layer"], plan["neuron"], plan["bit"], strict=True):
        owner = layer.removesuffix(".weight")
        if owner not in layers:
            continue
        place = [*map(int, np.unravel_index(neuron, known[layer].shape)), None, None][:4]
        places.append((layers.index(owner), place, bit))

    def flip(bit: int, weight: Tensor, place: tuple[Any, ...]) -> Tensor:
        mask = torch.tensor(-(2**31) if bit == 31 else 1 << bit, dtype=torch.int32)
        return (weight[place].reshape(1).view(torch.int32) ^ mask).view(torch.float32).reshape(weight[place].shape)

    def run() -> None:
        for number in range(FEW):  # as many as the loop runs, whatever of them are in norms
            layer, (k, c, h, w), bit = places[number % len(places)]
            where = {"layer_num": [layer], "k": [k], "dim1": [c], "dim2": [h], "dim3": [w]}
            _infer(injector.declare_weight_fi(function=partial(flip, bit), **where), images, batch)

    return run
