"""The one training loop, on one device or many. It can be killed at any moment and goes on from its last checkpoint."""

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from textguard.artifacts import parse_json, read_safetensors, write_safetensors
from textguard.environment import environment_number
from textguard.errors import InvalidParameter
from textguard.runtime import announce, join_processes, progress
from textguard.vision.mixing import mix
from textguard.vision.optimisation import Ema, learning_rate_at, make_optimizer
from textguard.vision.order import epoch_order, steps_per_epoch
from textguard.vision.recipe import Recipe
from textguard.vision.transforms import TrainingView, image_loader
from textguard.vision.treatment import Treatment

AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Epoch:
    """A point of the training curve.

    Attributes
    ----------
    epoch : int
        Counted from 1.
    loss : float
        Mean over the epoch's augmented images, in nats.
    accuracy : float
        Share of these images that were classified correctly, 0 to 1.
    learning_rate : float
        At the epoch's last step.
    """

    epoch: int
    loss: float
    accuracy: float
    learning_rate: float


@dataclass
class TrainingProgress:
    """How far a training has come.

    Attributes
    ----------
    step : int
        Optimiser steps done.
    loss : float
        Sum over the images of the unfinished epoch, in nats.
    hits, seen : int
        Images of the unfinished epoch: those that were classified correctly, and all.
    history : list of Epoch
        The finished epochs.
    """

    step: int = 0
    loss: float = 0.0
    hits: int = 0
    seen: int = 0
    history: list[Epoch] = field(default_factory=list)


class Trainer:
    """A training under way: the model, all that changes beside it, and how one step changes them.

    With WORLD_SIZE in the environment (torchrun), each process trains on its part of every batch. Gradients are averaged over
    the processes. BatchNorm's statistics are those of the process's part, except on GPUs where the recipe has sync_batch_norm.

    Parameters
    ----------
    model : nn.Module
        Lies on the device to use, and is trained in place. Maps images [B, 3, S, S] to logits [B, C].
    images : int
        Size of the training set.
    classes : int
        C; labels are below it.
    recipe : Recipe
        Batch size, optimiser, learning rate, mixing, average and precision.
    seed : int
        What a step draws depends on it and the step's number alone.
    label : str
        What the training is called in messages.
    treatment : Treatment or None
        Its logit_penalty and latent_weight_decay; None for neither.

    Attributes
    ----------
    rank, processes : int
        This process's number, and how many share the training.
    batch_size, steps : int
        Images of one step in all processes together, and steps of one epoch.
    before : int
        How many images `step` takes in front of this process's part: mixing needs the one before the first.
    progress : TrainingProgress
        How far the training has come.

    Raises
    ------
    InvalidParameter
        For a batch that the processes cannot share alike, or that leaves each one image where BatchNorm needs two, and for bad
        settings in the environment.
    """

    def __init__(
        self,
        model: nn.Module,
        images: int,
        classes: int,
        recipe: Recipe,
        *,
        seed: int,
        label: str,
        treatment: Treatment | None = None,
    ) -> None:
        self.device = next(model.parameters()).device
        self.rank, self.processes = join_processes(self.device)
        self.images, self.classes, self.recipe, self.seed = images, classes, recipe, seed
        self.batch_size, self.steps = min(recipe.batch_size, images), steps_per_epoch(images, recipe)
        if self.batch_size % self.processes:
            raise InvalidParameter(
                f"{label}: batches of {self.batch_size} images cannot be shared by {self.processes} processes alike"
            )
        if self.batch_size == self.processes:
            _check_single_images(model, recipe, self.processes, label)
        self.before = int(recipe.mixup > 0 or recipe.cutmix > 0)
        if recipe.sync_batch_norm and self.processes > 1:
            if self.device.type == "cuda":
                model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            elif self.rank == 0:
                announce(f"{label}: sync_batch_norm works on GPUs alone; BatchNorm's statistics are of each process's images")
        if self.device.type == "cpu" and recipe.precision != "fp32" and self.rank == 0:
            announce(
                f"{label}: precision {recipe.precision} on a CPU, which can be slower than fp32 by orders of magnitude; "
                "for speed, set params.yaml backbones.*.precision to fp32, or use a GPU"
            )
        channels_last = environment_number("TEXTGUARD_CHANNELS_LAST", 0, 1)
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._compiles = bool(environment_number("TEXTGUARD_COMPILE", 0, 1))
        self.model = model.to(memory_format=self._layout)
        self.optimizer = make_optimizer(model, recipe, treatment.latent_weight_decay if treatment else None)
        self._logit_penalty = treatment.logit_penalty if treatment else 0.0
        self.average = Ema(model, recipe) if recipe.ema else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "fp16")
        self.progress = TrainingProgress()

    @property
    def done(self) -> bool:
        """Whether all epochs are finished."""
        return self.progress.step >= self.recipe.epochs * self.steps

    @property
    def learning_rate(self) -> float:
        """That of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    @cached_property
    def _runner(self) -> nn.Module:
        """The model as a batch runs through it. Made by the first step: a state must have been loaded by then."""
        runner = torch.compile(self.model) if self._compiles else self.model
        if self.processes == 1:
            return runner
        torch.distributed.barrier()  # nobody writes a checkpoint before all have read the last one
        return DistributedDataParallel(runner, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def batches(self, view: TrainingView) -> Iterator[tuple[Tensor, Tensor]]:
        """What is left of the current epoch, one batch for each `step`.

        Parameters
        ----------
        view : TrainingView
            The training images by (index, visit).

        Yields
        ------
        images : Tensor, float32 [before + B / processes, 3, S, S]
            This process's part of the batch, and `before` images in front of it, round the batch's end.
        labels : Tensor, int64 [before + B / processes]
            Theirs.
        """
        epoch, first = divmod(self.progress.step, self.steps)
        looks = epoch_order(self.images, self.recipe, self.seed, epoch).view(self.steps, self.batch_size, 2)[first:]
        share = self.batch_size // self.processes
        own = torch.arange(self.rank * share - self.before, (self.rank + 1) * share)
        yield from image_loader(view, batches=(batch[own].tolist() for batch in looks), pin_memory=self.device.type == "cuda")

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Take one step of the optimiser.

        Parameters
        ----------
        images : Tensor, float32 [before + B / processes, 3, S, S]
            This process's part of the batch, and `before` images in front of it, as `batches` yields them.
        labels : Tensor, int64 [before + B / processes]
            Theirs.

        Returns
        -------
        float
            The whole batch's mean loss without a penalty, in nats, the same in every process. If it is not finite, the model is
            spoilt.
        """
        recipe, step = self.recipe, self.progress.step
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, self.steps, recipe)
        # What is drawn in a step depends on it alone, and so not on where training went on.
        drawn = hashlib.sha256(f"textguard step {self.seed} {step}".encode()).digest()
        on_device = [part.to(self.device, non_blocking=True) for part in (images, labels)]
        mixed, mixed_targets = mix(*on_device, self.classes, recipe, np.random.default_rng(list(drawn)))
        batch, targets = mixed[self.before :], mixed_targets[self.before :]
        torch.manual_seed(int.from_bytes(drawn[:7]) + self.rank)
        with torch.autocast(self.device.type, AUTOCAST.get(recipe.precision), enabled=recipe.precision != "fp32"):
            logits = self._runner(batch.contiguous(memory_format=self._layout))
            loss = F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        penalised = loss + self._logit_penalty * logits.float().square().mean() if self._logit_penalty else loss
        self.scaler.scale(penalised).backward()
        if recipe.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self.average.after_step(self.model, step, self.steps)
        hits = (logits.detach().argmax(dim=1) == targets.argmax(dim=1)).sum()
        sums = torch.stack([loss.detach().float() * len(batch), hits.float()])
        if self.processes > 1:
            torch.distributed.all_reduce(sums)
        return self._count(*sums.tolist())

    def _count(self, loss: float, hits: float) -> float:
        """Add one batch's sums to the progress. Returns its mean loss."""
        self.progress.step += 1
        self.progress.loss += loss
        self.progress.hits += int(hits)
        self.progress.seen += self.batch_size
        return loss / self.batch_size

    def end_epoch(self) -> Epoch:
        """Move the sums over the epoch's images to the history, after the epoch's last step. Returns the epoch."""
        sums = self.progress
        loss, accuracy = sums.loss / sums.seen, sums.hits / sums.seen
        epoch = Epoch(sums.step // self.steps, loss, accuracy, self.learning_rate)
        self.progress = TrainingProgress(sums.step, history=[*sums.history, epoch])
        return epoch

    def end(self) -> None:
        """Give the model the average's weights, where the recipe wants an average."""
        if self.average:
            self.model.load_state_dict(self.average.module.state_dict())

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Everything that the next step depends on and that seed and recipe do not say.

        Returns
        -------
        dict
            Part ("model", "average", "optimizer", "scaler", "progress") -> name -> a tensor, or something that JSON holds.
            The optimiser's names are those of its state behind the parameter's number: "0.momentum_buffer".
        """
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average else {},
            "optimizer": {
                f"{number}.{name}": value
                for number, values in self.optimizer.state_dict()["state"].items()
                for name, value in values.items()
            },
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
        }

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Go back to a state that `state_dict` returned.

        Raises exceptions of many kinds for a state of another training; some of it may have been loaded.
        """
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.load_state_dict(state["average"])
        optimizer: dict[int, dict[str, Any]] = {}
        for name, value in state["optimizer"].items():
            number, _, key = name.partition(".")
            optimizer.setdefault(int(number), {})[key] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": optimizer})
        self.scaler.load_state_dict(state["scaler"])
        history = [Epoch(**epoch) for epoch in state["progress"]["history"]]
        found = TrainingProgress(**state["progress"] | {"history": history})
        if not len(history) * self.steps <= found.step <= self.recipe.epochs * self.steps:
            raise ValueError(f"step {found.step} with {len(history)} epochs behind it")
        self.progress = found


class Checkpoints:
    """The last two states of a training, as safetensors files in a folder: if one is damaged, the one before it is used.

    Parameters
    ----------
    folder : Path
        Where the files are; it exists.
    label : str
        What the training is called in messages.

    Raises
    ------
    InvalidParameter
        For a bad TEXTGUARD_CHECKPOINT in the environment.
    """

    KEPT = 2

    def __init__(self, folder: Path, label: str) -> None:
        self.folder, self.label = folder, label
        self._interval_s = environment_number("TEXTGUARD_CHECKPOINT", 600)
        self._saved_at = time.monotonic()

    @property
    def files(self) -> list[Path]:
        """The oldest first."""
        return sorted(self.folder.glob("checkpoint-*.safetensors"))

    @property
    def due(self) -> bool:
        """Whether TEXTGUARD_CHECKPOINT seconds have passed since the last one."""
        return time.monotonic() - self._saved_at >= self._interval_s

    def save(self, trainer: Trainer) -> None:
        """Write the state of a training, and delete all but the last two. The first process does it for all."""
        if trainer.rank == 0:
            state = trainer.state_dict()
            tensors, rest = {}, {part: {} for part in state}
            for part, values in state.items():
                for name, value in values.items():
                    if isinstance(value, Tensor):
                        tensors[f"{part}.{name}"] = value
                    else:
                        rest[part][name] = value
            path = self.folder / f"checkpoint-{trainer.progress.step:09d}.safetensors"
            write_safetensors(path, tensors, {"state": json.dumps(rest)})
            for old in self.files[: -self.KEPT]:
                old.unlink()
        self._saved_at = time.monotonic()

    def restore(self, trainer: Trainer) -> None:
        """Load the last state that can be read, if there is one. A file that cannot be read is named and deleted."""
        files = self.files
        start = copy.deepcopy(trainer.state_dict()) if files else {}
        for path in reversed(files):
            try:
                trainer.load_state_dict(_read_state(path))
            except Exception as error:  # whatever a damaged state makes of itself on its way into the optimiser
                if trainer.rank == 0:
                    announce(f"{self.label}: {path} cannot be read ({str(error)[:100]}); going back to the checkpoint before")
                    path.unlink(missing_ok=True)
                trainer.load_state_dict(start)  # of which the damaged one may have replaced some
            else:
                return


def _read_state(path: Path) -> dict[str, dict[str, Any]]:
    tensors, metadata = read_safetensors(path, "train")
    state = parse_json(metadata["state"])
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        state[part][name] = tensor
    return state


def train(
    model: nn.Module,
    view: TrainingView,
    classes: int,
    recipe: Recipe,
    *,
    seed: int,
    work: Path,
    label: str,
    treatment: Treatment | None = None,
    report: Callable[[Epoch], None] = lambda epoch: None,
    after_step: Callable[[int], None] = lambda step: None,
) -> list[Epoch]:
    """Train a model in place; at the end it holds the average, where the recipe wants one.

    There is a checkpoint after every epoch, and within an epoch every TEXTGUARD_CHECKPOINT seconds. From the last one, a
    training that was killed goes on to the bits that it would have ended with.

    Parameters
    ----------
    model : nn.Module
        Lies on the device to use. Maps images [B, 3, S, S] to logits [B, C].
    view : TrainingView
        The training images by (index, visit), see `training_view`; their labels are below `classes`.
    classes : int
        C.
    recipe : Recipe
        Batch size, epochs, optimiser, learning rate, and what is done to images and labels.
    seed : int
        Of the order of the images and of what the steps draw.
    work : Path
        The folder of the checkpoints.
    label : str
        What the training is called in messages.
    treatment : Treatment or None
        See `Trainer`.
    report : callable
        Called with every epoch that is finished, and first with those before an interruption.
    after_step : callable
        Called with the number of steps done, as soon as it is safe to be killed.

    Returns
    -------
    list of Epoch
        The training curve.

    Raises
    ------
    InvalidParameter
        When the loss or a weight is no longer finite, for a batch that the processes cannot share alike, or that leaves each
        one image where BatchNorm needs two, and for bad settings in the environment.
    """
    trainer = Trainer(model, len(view), classes, recipe, seed=seed, label=label, treatment=treatment)
    checkpoints = Checkpoints(work, label)
    checkpoints.restore(trainer)
    steps, batch_size, first = trainer.steps, trainer.batch_size, trainer.rank == 0
    if trainer.progress.step and first:
        epoch, step = divmod(trainer.progress.step, steps)
        announce(f"{label}: going on after epoch {epoch} of {recipe.epochs}, step {step}")
    for finished in trainer.progress.history:
        report(finished)
    with progress(total=recipe.epochs * steps * batch_size, label=label, unit="img", shown=first) as bar:
        bar.update(trainer.progress.step * batch_size)
        while not trainer.done:
            for images, labels in trainer.batches(view):
                loss = trainer.step(images, labels)
                if not math.isfinite(loss):
                    raise _diverged(f"the loss is {loss}", trainer, checkpoints)
                bar.set_postfix_str(f"loss {trainer.progress.loss / trainer.progress.seen:.3g}", refresh=False)
                bar.update(batch_size)
                if trainer.progress.step % steps and checkpoints.due:
                    checkpoints.save(trainer)
                after_step(trainer.progress.step)
            if broken := _not_finite(model):
                raise _diverged(f"{broken} is NaN or infinite", trainer, checkpoints)
            finished = trainer.end_epoch()
            checkpoints.save(trainer)
            report(finished)
    trainer.end()
    return trainer.progress.history


def _check_single_images(model: nn.Module, recipe: Recipe, processes: int, label: str) -> None:
    """Raises InvalidParameter where a network cannot be trained on one image at a time, as with BatchNorm behind a pooling."""
    if recipe.sync_batch_norm and next(model.parameters()).is_cuda:
        return  # statistics are of all processes' images
    shape = (1, 3, recipe.image_size, recipe.image_size)
    try:
        copy.deepcopy(model).to("meta").train()(torch.empty(shape, device="meta"))
    except ValueError as error:  # torch's, of a layer that normalises one value alone
        raise InvalidParameter(
            f"{label}: batches of {processes} images leave each of {processes} processes one, and BatchNorm cannot be trained "
            f"on it ({error}); raise params.yaml backbones.*.batch_size, or lower TEXTGUARD_PROCESSES"
        ) from error


def _not_finite(model: nn.Module) -> str:
    """The first parameter, or running mean or variance, that is not finite; empty where there is none."""
    running = [(name, value) for name, value in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    return next((name for name, value in [*model.named_parameters(), *running] if not torch.isfinite(value).all()), "")


def _diverged(problem: str, trainer: Trainer, checkpoints: Checkpoints) -> InvalidParameter:
    epoch, step = divmod(trainer.progress.step - 1, trainer.steps)
    kept = checkpoints.files
    last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
    return InvalidParameter(
        f"{checkpoints.label}: {problem} in epoch {epoch + 1}, step {step + 1}, "
        f"at learning rate {trainer.learning_rate:.3g}; {last}; "
        "lower params.yaml backbones.*.learning_rate or raise warmup_epochs"
    )
