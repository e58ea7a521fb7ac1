"""What a classifier is worth without faults, and what it costs."""

from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from textguard.errors import InvalidArtifact
from textguard.runtime import join_processes, progress
from textguard.vision.classifiers import TextGuidedClassifier
from textguard.vision.transforms import EvaluationView, image_loader


@dataclass(frozen=True)
class Cost:
    """parameters: trainable numbers. multiply_adds: of convolutions and matrix products, for one image."""

    parameters: int
    multiply_adds: int


@torch.inference_mode()
def predict(model: nn.Module, view: EvaluationView, batch_size: int, label: str = "evaluate") -> pd.DataFrame:
    """Predict every image of a view, on the model's device. With WORLD_SIZE in the environment, each process predicts a part.

    Returns, in every process, one row per image: image (position), label, prediction, loss (cross entropy, nats), top2diff
    (0 to 1). Raises InvalidArtifact for a classifier whose outputs are not finite.
    """
    model.eval()
    device = next(model.parameters()).device
    rank, processes = join_processes(device)
    rows = torch.arange(rank, len(view), processes)
    found = torch.zeros(len(view), 3, device=device)  # rows of other processes stay 0: the sum over processes holds all rows
    with progress(total=len(rows), label=label, unit="img", shown=rank == 0) as bar:
        batches = rows.split(batch_size)
        for part, (images, labels) in zip(
            batches, image_loader(view, batches=[part.tolist() for part in batches]), strict=True
        ):
            logits = model(images.to(device))
            first, second = logits.softmax(dim=1).topk(2, dim=1).values.unbind(dim=1)
            loss = F.cross_entropy(logits, labels.to(device), reduction="none")
            found[part] = torch.stack([logits.argmax(dim=1), loss, first - second], dim=1)
            bar.update(len(part))
    if processes > 1:
        torch.distributed.all_reduce(found)
    prediction, loss, top2diff = found.cpu().unbind(dim=1)
    if broken := int((~(loss.isfinite() & top2diff.isfinite())).sum()):
        raise InvalidArtifact(
            f"{label}: without any fault, the classifier's outputs are NaN or infinite for {broken} of {len(view)} images; "
            "train it with a lower params.yaml backbones.*.learning_rate, or mend the file that params.yaml weights names"
        )
    return pd.DataFrame(
        {
            "image": range(len(view)),
            "label": view.split.labels,
            "prediction": prediction.long(),
            "loss": loss,
            "top2diff": top2diff,
        }
    )


@torch.inference_mode()
def measure_cost(model: nn.Module, image: Tensor) -> Cost:
    """Count parameters and, by torch's own counter, the multiply-adds of one image of shape [3, S, S]."""
    model.eval()
    with FlopCounterMode(display=False) as counter:
        model(image[None])
    return Cost(sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2)


def score_scale(model: nn.Module) -> float:
    """The factor between the last layer's outputs and the logits. It is 1 for all heads but the text-guided one."""
    return model.logit_scale.exp().item() if isinstance(model, TextGuidedClassifier) else 1.0


def accuracy_by_threshold(predictions: pd.DataFrame) -> pd.DataFrame:
    """Accuracy when correct predictions with a Top2Diff below a threshold count as wrong, for thresholds of 0 to 40 %.

    predictions: as `predict` returns them. Source: Wasim et al., NeurIPS 2023, section 7.4.
    """
    correct = predictions["prediction"] == predictions["label"]
    thresholds = range(41)
    accuracies = [100 * float((correct & (predictions["top2diff"] >= t / 100)).mean()) for t in thresholds]
    return pd.DataFrame({"threshold_percent": thresholds, "accuracy_percent": accuracies})
