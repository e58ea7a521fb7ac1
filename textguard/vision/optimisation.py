"""Optimiser, parameter groups, learning rate and moving average of a recipe, as in torchvision's references/classification."""

import math

from torch import Tensor, nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from textguard.vision.recipe import Recipe
from textguard.vision.treating import last_linear

NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)
POSITION_TABLES = ("class_token", "position_embedding", "relative_position_bias_table")


def learning_rate_at(step: int, steps_per_epoch: int, recipe: Recipe) -> float:
    """The learning rate of optimiser step `step`, counted from 0 over the whole training.

    Over warmup_epochs it grows linearly, from warmup_start times the peak to the peak. Then it is multiplied by gamma every
    step_epochs (`step`) or every epoch (`exponential`), or follows half a cosine (`cosine`) that would reach min_learning_rate
    after the last epoch. schedule_per says whether it changes from epoch to epoch, as in torchvision's references, or from step
    to step. The recipe states peak and minimum for base_batch_size; both grow linearly with batch_size.
    """
    scale = recipe.batch_size / recipe.base_batch_size
    peak, lowest = scale * recipe.learning_rate, scale * recipe.min_learning_rate
    epochs = step / steps_per_epoch if recipe.schedule_per == "step" else step // steps_per_epoch
    if epochs < recipe.warmup_epochs:
        return peak * (recipe.warmup_start + (1 - recipe.warmup_start) * epochs / recipe.warmup_epochs)
    epochs -= recipe.warmup_epochs
    if recipe.schedule == "step":
        return peak * recipe.gamma ** (epochs // recipe.step_epochs)
    if recipe.schedule == "exponential":
        return peak * recipe.gamma**epochs
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * epochs / (recipe.epochs - recipe.warmup_epochs)))


def parameter_groups(model: nn.Module, recipe: Recipe, latent_weight_decay: float | None = None) -> list[dict]:
    """The trained parameters of a model for an optimiser, one group per weight decay.

    Biases, those of norm layers included, have bias_weight_decay. Position tables and class tokens have position_weight_decay.
    The other parameters of norm layers have norm_weight_decay. All other parameters have weight_decay, and so have those whose
    own value is null. latent_weight_decay: of the weight of the latent layer, the backbone's last; None for the recipe's.
    """
    latent = None if latent_weight_decay is None else last_linear(model.backbone, "treatments.*.latent_weight_decay").weight
    groups: dict[float, list[Tensor]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            own = [
                latent_weight_decay if parameter is latent else None,
                recipe.bias_weight_decay if name == "bias" else None,
                recipe.position_weight_decay if name in POSITION_TABLES else None,
                recipe.norm_weight_decay if isinstance(module, NORMS) else None,
            ]
            decay = next((value for value in own if value is not None), recipe.weight_decay)
            if parameter.requires_grad:
                groups.setdefault(decay, []).append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]


def make_optimizer(model: nn.Module, recipe: Recipe, latent_weight_decay: float | None = None) -> optim.Optimizer:
    """SGD with momentum or AdamW over the model's parameter groups, at the first step's learning rate."""
    groups, rate = parameter_groups(model, recipe, latent_weight_decay), learning_rate_at(0, 1, recipe)
    if recipe.optimizer == "sgd":
        return optim.SGD(groups, lr=rate, momentum=recipe.momentum)
    return optim.AdamW(groups, lr=rate, betas=recipe.betas, eps=recipe.eps)


class Ema(AveragedModel):
    """The exponential moving average of a model's parameters and buffers. It is what is evaluated and saved.

    `module` is the averaged model. Every ema_steps steps, the average moves towards the model by a share of
    (1 - ema_decay) * batch_size * ema_steps / epochs of their distance, or by all of it where that is more than 1.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        share = (1 - recipe.ema_decay) * recipe.batch_size * recipe.ema_steps / recipe.epochs
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(1 - min(1, share)), use_buffers=True)
        self.every, self.warmup_epochs = recipe.ema_steps, recipe.warmup_epochs

    def after_step(self, model: nn.Module, step: int, steps_per_epoch: int) -> None:
        """Move the average, if it is time to; to be called after each optimiser step, counted from 0 over the whole training.

        It is time after an epoch's first step and after every ema_steps steps from there. While the learning rate warms up, the
        average becomes a copy of the model.
        """
        epoch, place = divmod(step, steps_per_epoch)
        if place % self.every == 0:
            self.update_parameters(model)
            if epoch < self.warmup_epochs:
                self.n_averaged.zero_()
