"""The one training loop, on one device or many. It can be killed at any moment and goes on from its last checkpoint."""

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from textguard.artifacts import read_safetensors, write_safetensors
from textguard.errors import InvalidArtifact, InvalidParameter
from textguard.runtime import announce, environment_number, join_processes, progress
from textguard.vision.mixing import mix
from textguard.vision.optimisation import Ema, learning_rate_at, make_optimizer
from textguard.vision.order import epoch_order, steps_per_epoch
from textguard.vision.recipe import Recipe
from textguard.vision.transforms import TrainingView, image_loader

CHECKPOINTS = 2  # that are kept: where the last one is damaged, training goes on from the one before
AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Epoch:
    """One epoch's curve point. loss: mean training loss; accuracy: on augmented images; learning_rate: at its last step."""

    epoch: int
    loss: float
    accuracy: float
    learning_rate: float


@dataclass
class Position:
    """How far a training has come. step: optimiser steps done. loss, hits, seen: sums over the images of the epoch so far."""

    step: int = 0
    loss: float = 0.0
    hits: int = 0
    seen: int = 0
    history: list[Epoch] = field(default_factory=list)


def train(
    model: nn.Module,
    view: TrainingView,
    classes: int,
    recipe: Recipe,
    *,
    seed: int,
    work: Path,
    label: str,
    report: Callable[[Epoch], None] = lambda epoch: None,
    after_step: Callable[[int], None] = lambda step: None,
) -> list[Epoch]:
    """Train `model`, which lies on the device to use, in place: at the end it holds the average, where the recipe wants one.

    view: images by (index, visit), see `training_view`; their labels are below `classes`. With WORLD_SIZE in the environment
    (torchrun) each process trains on its part of every batch; gradients are averaged, BatchNorm's statistics are of the part,
    but with sync_batch_norm on GPUs.
    Checkpoints go to the folder `work`, after every epoch and every TEXTGUARD_CHECKPOINT seconds; where it holds some, training
    goes on from the last one, with the same result. report: called with every epoch, those before an interruption included;
    after_step: with the number of steps done, once it is safe to be killed.
    Returns one Epoch each. Raises InvalidParameter, also when the loss is no longer finite.
    """
    device = next(model.parameters()).device
    rank, processes = join_processes(device)
    images = len(view)
    batch_size = min(recipe.batch_size, images)
    if batch_size % processes:
        raise InvalidParameter(f"{label}: batches of {batch_size} images cannot be shared by {processes} processes alike")
    steps = steps_per_epoch(images, recipe)
    if recipe.sync_batch_norm and processes > 1:
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        elif rank == 0:
            announce(f"{label}: sync_batch_norm works on GPUs alone; BatchNorm's statistics are of each process's images")
    layout = torch.channels_last if environment_number("TEXTGUARD_CHANNELS_LAST", 0, 1) else torch.contiguous_format
    model.to(memory_format=layout)
    optimizer = make_optimizer(model, recipe)
    average = Ema(model, recipe) if recipe.ema else None
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
    position = _resume(work, model, optimizer, average, scaler, label) or Position()
    if position.step and rank == 0:
        announce(f"{label}: going on after epoch {position.step // steps} of {recipe.epochs}, step {position.step % steps}")
    runner = torch.compile(model) if environment_number("TEXTGUARD_COMPILE", 0, 1) else model
    if processes > 1:
        torch.distributed.barrier()  # nobody writes a checkpoint before all have read the last one
        runner = DistributedDataParallel(runner, device_ids=[device.index] if device.type == "cuda" else None)
    mixed_in = int(recipe.mixup > 0 or recipe.cutmix > 0)  # the image before a part's first, which is mixed with it
    every, saved = environment_number("TEXTGUARD_CHECKPOINT", 600), time.monotonic()

    def save() -> None:
        if rank == 0:
            _save(work, model, optimizer, average, scaler, position)

    for epoch in position.history:
        report(epoch)
    with progress(total=recipe.epochs * steps * batch_size, label=label, unit="img", shown=rank == 0) as bar:
        bar.update(position.step * batch_size)
        while position.step < recipe.epochs * steps:
            number, first = divmod(position.step, steps)
            looks = epoch_order(images, recipe, seed, number).view(steps, batch_size, 2)[first:]
            model.train()
            parts = _parts(looks, rank, processes, mixed_in)
            for pictures, labels in image_loader(view, batches=parts, pin_memory=device.type == "cuda"):
                step, rate = position.step, learning_rate_at(position.step, steps, recipe)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                # What is drawn in a step depends on it alone, and so not on where training went on.
                drawn = hashlib.sha256(f"textguard step {seed} {step}".encode()).digest()
                on_device = [part.to(device, non_blocking=True) for part in (pictures, labels)]
                mixed, mixed_targets = mix(*on_device, classes, recipe, np.random.default_rng(list(drawn)))
                batch, targets = mixed[mixed_in:], mixed_targets[mixed_in:]
                torch.manual_seed(int.from_bytes(drawn[:7]) + rank)
                with torch.autocast(device.type, AUTOCAST.get(recipe.precision), enabled=recipe.precision != "fp32"):
                    logits = runner(batch.contiguous(memory_format=layout))
                    loss = F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
                hits = (logits.detach().argmax(dim=1) == targets.argmax(dim=1)).sum()
                sums = torch.stack([loss.detach().float() * len(batch), hits.float()])
                if processes > 1:
                    torch.distributed.all_reduce(sums)
                batch_loss, batch_hits = sums.tolist()
                if not math.isfinite(batch_loss):
                    _stop(label, batch_loss / batch_size, number, step % steps, rate, work)
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                if recipe.clip_norm:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
                scaler.step(optimizer)
                scaler.update()
                if average:
                    average.after_step(model, step, steps)
                position.step += 1
                position.loss, position.hits = position.loss + batch_loss, position.hits + int(batch_hits)
                position.seen += batch_size
                bar.set_postfix_str(f"loss {position.loss / position.seen:.3g}", refresh=False)
                bar.update(batch_size)
                if position.step % steps and time.monotonic() - saved >= every:
                    save()
                    saved = time.monotonic()
                after_step(position.step)
            position.history.append(Epoch(number + 1, position.loss / position.seen, position.hits / position.seen, rate))
            position.loss, position.hits, position.seen = 0.0, 0, 0
            save()
            saved = time.monotonic()
            report(position.history[-1])
    if average:
        model.load_state_dict(average.module.state_dict())
    return position.history


def _parts(looks: Tensor, rank: int, processes: int, before: int) -> Iterator[list[list[int]]]:
    """This process's part of each batch [steps, B, 2], and `before` images before it, round the batch's end."""
    size = looks.shape[1] // processes
    for batch in looks:
        yield batch[torch.arange(rank * size - before, (rank + 1) * size)].tolist()


def _stop(label: str, loss: float, epoch: int, step: int, rate: float, work: Path) -> None:
    """Raise InvalidParameter, in every process."""
    kept = _checkpoints(work)
    last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
    raise InvalidParameter(
        f"{label}: the loss is {loss} in epoch {epoch + 1}, step {step + 1}, at learning rate {rate:.3g}; {last}; "
        "lower params.yaml backbones.*.learning_rate or raise warmup_epochs"
    )


def _checkpoints(work: Path) -> list[Path]:
    return sorted(work.glob("checkpoint-*.safetensors"))


def _save(
    work: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Ema | None,
    scaler: torch.amp.GradScaler,
    position: Position,
) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if average:
        tensors |= {f"average.{name}": tensor for name, tensor in average.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items() if value is not None}
    described = {"position": json.dumps(asdict(position)), "scaler": json.dumps(scaler.state_dict())}
    write_safetensors(work / f"checkpoint-{position.step:09d}.safetensors", tensors, described)
    for old in _checkpoints(work)[:-CHECKPOINTS]:
        old.unlink()


def _resume(
    work: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Ema | None,
    scaler: torch.amp.GradScaler,
    label: str,
) -> Position | None:
    """Load the last checkpoint that can be read, if there is one."""
    first = os.environ.get("RANK", "0") == "0"
    parts = [part for part in (model, optimizer, average) if part]
    start = [copy.deepcopy(part.state_dict()) for part in parts] if _checkpoints(work) else []
    for path in reversed(_checkpoints(work)):
        try:
            tensors, metadata = read_safetensors(path, "train")
            position = Position(**json.loads(metadata["position"]))
            position.history = [Epoch(**epoch) for epoch in position.history]
            _load(tensors, json.loads(metadata["scaler"]), model, optimizer, average, scaler)
        except (InvalidArtifact, KeyError, TypeError, ValueError, RuntimeError) as error:
            if first:
                announce(f"{label}: {path} cannot be read ({str(error)[:100]}); going back to the checkpoint before")
                path.unlink(missing_ok=True)
            for part, state in zip(parts, start, strict=True):  # of which it may have changed some
                part.load_state_dict(state)
            continue
        return position
    return None


def _load(
    tensors: dict[str, Tensor],
    scaler_state: dict,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Ema | None,
    scaler: torch.amp.GradScaler,
) -> None:
    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    model.load_state_dict(part("model."))
    if average:
        average.load_state_dict(part("average."))
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in part("optimizer.").items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    if scaler_state:
        scaler.load_state_dict(scaler_state)
