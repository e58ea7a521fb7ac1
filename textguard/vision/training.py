"""The one training loop. It can be interrupted at any moment and goes on from the last finished epoch with the same result."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textguard.artifacts import read_safetensors, write_safetensors
from textguard.errors import InvalidArtifact, InvalidParameter
from textguard.runtime import progress
from textguard.vision.optimisation import learning_rate_at
from textguard.vision.recipe import Recipe


@dataclass(frozen=True)
class Epoch:
    """One epoch's curve point. loss: mean training cross entropy; learning_rate: at its last step."""

    epoch: int
    loss: float
    accuracy: float
    learning_rate: float


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    checkpoint: Path,
    label: str,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> list[Epoch]:
    """Train `model` in place with SGD and cross entropy.

    images: float32 [N, 3, S, S]; labels: int64 [N]; both on the model's device.
    After every epoch all state goes to `checkpoint` (safetensors); where that file exists, training goes on from it. The order
    of the images and the dropout of an epoch depend on (seed, epoch) alone. Returns one Epoch each. Raises InvalidParameter
    when the loss is no longer finite.
    """
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    batch_size = min(recipe.batch_size, len(images))
    # BatchNorm cannot be trained on a batch of one image: such a rest is left out of its epoch.
    steps_per_epoch = len(images) // batch_size + (len(images) % batch_size > 1)
    history = _resume(checkpoint, model, optimizer)
    if history:
        print(f"{label}: going on after epoch {len(history)} of {recipe.epochs}", file=sys.stderr, flush=True)
    with progress(total=recipe.epochs * len(images), label=label, unit="img") as bar:
        bar.update(len(history) * len(images))
        for epoch in range(len(history), recipe.epochs):
            epoch_seed = _derive_seed(seed, epoch)
            torch.manual_seed(epoch_seed)
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch_seed))
            model.train()
            loss_sum, hits, seen, rate = 0.0, 0, 0, 0.0
            for step, rows in enumerate(order.split(batch_size)[:steps_per_epoch]):
                rate = learning_rate_at(epoch * steps_per_epoch + step, steps_per_epoch, recipe)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                batch, targets = images[rows], labels[rows]
                logits = model(batch)
                loss = F.cross_entropy(logits, targets)
                if not torch.isfinite(loss):
                    raise InvalidParameter(
                        f"{label}: the loss is {loss.item()} in epoch {epoch + 1}, step {step + 1}; "
                        "lower params.yaml recipes.*.learning_rate or raise warmup_epochs"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                loss_sum += loss.item() * len(rows)
                hits += int((logits.argmax(dim=1) == targets).sum())
                seen += len(rows)
                bar.update(len(rows))
            history.append(Epoch(epoch + 1, loss_sum / seen, hits / seen, rate))
            _save(checkpoint, model, optimizer, history)
            after_epoch(epoch + 1)
    return history


def _derive_seed(seed: int, epoch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"textguard epoch {seed} {epoch}".encode()).digest()[:7])


def _save(checkpoint: Path, model: nn.Module, optimizer: torch.optim.SGD, history: list[Epoch]) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        momentum = optimizer.state[parameter].get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum.{name}"] = momentum
    write_safetensors(checkpoint, tensors, {"history": json.dumps([epoch.__dict__ for epoch in history])})


def _resume(checkpoint: Path, model: nn.Module, optimizer: torch.optim.SGD) -> list[Epoch]:
    """Load the checkpoint's state, if there is one. Raises InvalidArtifact when it is damaged."""
    if not checkpoint.exists():
        return []
    tensors, metadata = read_safetensors(checkpoint, "train")
    try:
        model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
        for name, parameter in model.named_parameters():
            if f"momentum.{name}" in tensors:
                optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum.{name}"].to(parameter.device)
        return [Epoch(**epoch) for epoch in json.loads(metadata["history"])]
    except (KeyError, TypeError, RuntimeError) as error:
        raise InvalidArtifact(f"{checkpoint} does not fit this training; delete it to start again") from error
