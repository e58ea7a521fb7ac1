"""What a treatment does to a classifier: before its training to what is trained, afterwards to the trained weights."""

import math

import torch
from torch import Tensor, nn

from textguard.errors import InvalidParameter
from textguard.vision.classifiers import PlainHeadClassifier, TextGuidedClassifier
from textguard.vision.folding import fold_scale
from textguard.vision.treatment import Treatment, library_treatment


def before_training(model: nn.Module, treatment: Treatment) -> None:
    """Set the start of the scale, and keep what is fixed or frozen out of the training, in place.

    Parameters
    ----------
    model : nn.Module
        As `build_classifier` builds it.
    treatment : Treatment
        What is done to it.
    """
    if isinstance(model, TextGuidedClassifier):
        if treatment.scale_start != library_treatment()["scale_start"]:
            with torch.no_grad():
                model.logit_scale.fill_(math.log(treatment.scale_start))
        model.logit_scale.requires_grad_(treatment.scale == "learned")
    if isinstance(model, TextGuidedClassifier | PlainHeadClassifier):
        model.head.requires_grad_(not treatment.frozen)


@torch.no_grad()
def after_training(model: nn.Module, treatment: Treatment, image: Tensor) -> nn.Module:
    """Divide the logits by the treatment's temperature, and fold the scale into the head where it asks for that.

    The temperature goes into the scale; where there is none, into weight and bias of the last layer. The scale goes into the
    head's weights, and is 1 then: see textguard.vision.folding.fold_scale.

    Parameters
    ----------
    model : nn.Module
        The trained classifier. It may be changed.
    treatment : Treatment
        What is done to it.
    image : Tensor, float32 [3, S, S]
        Any, to make sure that the last layer's values are the logits.

    Returns
    -------
    nn.Module
        The classifier to save.

    Raises
    ------
    InvalidParameter
        Where the network ends in something else than a fully connected layer.
    """
    model.eval()
    if treatment.temperature != 1:
        images = image[None].to(next(model.parameters()).device)
        wanted = model(images) / treatment.temperature
        if isinstance(model, TextGuidedClassifier):
            model.logit_scale.sub_(math.log(treatment.temperature))
        else:
            for parameter in last_linear(model, "treatments.*.temperature").parameters():
                parameter.div_(treatment.temperature)
        if not torch.allclose(model(images), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())):
            raise InvalidParameter(
                "params.yaml treatments.*.temperature cannot go into this network's last layer, whose values are no logits; "
                "set it to 1"
            )
    return fold_scale(model) if treatment.fold_scale else model


def last_linear(network: nn.Module, needed_by: str) -> nn.Linear:
    """The last fully connected layer of a network, as it is defined. Raises InvalidParameter where it has none."""
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise InvalidParameter(f"params.yaml {needed_by} needs a network with a fully connected layer, and this one has none")
    return layers[-1]
