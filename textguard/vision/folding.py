"""Classifiers as they are deployed: with the scale of a text-guided head in the head's weights."""

import copy

import torch
from torch import nn

from textguard.vision.classifiers import TextGuidedClassifier


@torch.no_grad()
def fold_scale(model: nn.Module) -> nn.Module:
    """Multiply a text-guided head's weights by its scale, exp(logit_scale), which becomes 1.

    The logits stay as they are, but for rounding. What faults hit does not: the head then puts out logits in place of cosines,
    so that its profiled range is larger, a fixed range detector lets less pass, and nothing multiplies a fault behind it.

    Parameters
    ----------
    model : torch.nn.Module
        Any classifier. It stays as it is.

    Returns
    -------
    torch.nn.Module
        A copy of a `TextGuidedClassifier` with its scale folded; any other model itself, as it has no scale.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from textguard.vision.classifiers import TextGuidedClassifier
    >>> from textguard.vision.folding import fold_scale
    >>> model = TextGuidedClassifier(nn.Flatten(), classes=3, width=4, class_embeddings=None)
    >>> folded, images = fold_scale(model), torch.rand(2, 1, 2, 2)
    >>> folded.logit_scale.item(), torch.allclose(folded(images), model(images))
    (0.0, True)
    >>> fold_scale(model.head) is model.head
    True
    """
    if not isinstance(model, TextGuidedClassifier):
        return model
    folded = copy.deepcopy(model)
    folded.head.weight.mul_(folded.logit_scale.exp())
    folded.logit_scale.zero_()
    return folded
