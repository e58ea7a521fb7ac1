"""What a classifier is worth without faults, and what it costs."""

from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """parameters: trainable numbers. multiply_adds: of convolutions and matrix products, for one image."""

    parameters: int
    multiply_adds: int


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> pd.DataFrame:
    """Predict every image. images: float32 [N, 3, S, S]; labels: int64 [N].

    Returns one row per image: image (position), label, prediction, loss (cross entropy), top2diff (0 to 1).
    """
    model.eval()
    logits = torch.cat([model(batch) for batch in images.split(batch_size)])
    first, second = logits.softmax(dim=1).topk(2, dim=1).values.unbind(dim=1)
    return pd.DataFrame(
        {
            "image": range(len(images)),
            "label": labels.cpu(),
            "prediction": logits.argmax(dim=1).cpu(),
            "loss": F.cross_entropy(logits, labels, reduction="none").cpu(),
            "top2diff": (first - second).cpu(),
        }
    )


@torch.inference_mode()
def measure_cost(model: nn.Module, image: Tensor) -> Cost:
    """Count parameters and, by torch's own counter, the multiply-adds of one image of shape [3, S, S]."""
    model.eval()
    with FlopCounterMode(display=False) as counter:
        model(image[None])
    return Cost(sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2)


def accuracy_by_threshold(predictions: pd.DataFrame) -> pd.DataFrame:
    """Accuracy when correct predictions with a Top2Diff below a threshold count as wrong, for thresholds of 0 to 40 %.

    predictions: as `predict` returns them. Source: Wasim et al., NeurIPS 2023, section 7.4.
    """
    correct = predictions["prediction"] == predictions["label"]
    thresholds = range(41)
    accuracies = [100 * float((correct & (predictions["top2diff"] >= t / 100)).mean()) for t in thresholds]
    return pd.DataFrame({"threshold_percent": thresholds, "accuracy_percent": accuracies})
