"""Recipes: every field of every family's, and what they mean, beside torch's and torchvision's own."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn, optim
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel

from textguard.errors import UnknownName
from textguard.runtime import import_torchvision
from textguard.vision.backbones import build_backbone
from textguard.vision.mixing import box, cutmix, mix, mixup
from textguard.vision.optimisation import Ema, learning_rate_at, make_optimizer, parameter_groups
from textguard.vision.order import epoch_order, steps_per_epoch
from textguard.vision.recipe import LIBRARY, Recipe, load_recipe

import_torchvision()
from torchvision.transforms import v2  # noqa: E402 (as import_torchvision imports it)

FAMILIES = sorted(path.stem for path in LIBRARY.glob("*.yaml"))
PLAIN = load_recipe("resnet", {"epochs": 7, "batch_size": 6, "base_batch_size": 6})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_recipe_of_the_library_has_every_field_in_the_order_of_the_dataclass(name):
    lines = (LIBRARY / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    keys = [line.partition(":")[0] for line in lines if not line.startswith("#")]
    assert keys == list(Recipe.__dataclass_fields__)
    assert lines[0].startswith("# ")
    load_recipe(name, {})


def test_overrides_replace_fields_and_are_checked():
    assert load_recipe("resnet", {"epochs": 3}) == replace(load_recipe("resnet", {}), epochs=3)
    with pytest.raises(UnknownName, match=r"recipe 'lenet'.*known: .*resnet"):
        load_recipe("lenet", {})
    for wrong in ({"epoch": 3}, {"epochs": 3.5}, {"epochs": "3"}, {"ema": 1}, {"betas": [0.9]}, {"schedule": "linear"}):
        with pytest.raises(ValidationError):
            load_recipe("resnet", wrong)


def torchs_learning_rates(recipe: Recipe, steps_per_epoch: int) -> list[float]:
    """The learning rate of every step, from torch's schedulers, put together as in torchvision's references."""
    per_epoch = steps_per_epoch if recipe.schedule_per == "step" else 1  # schedule's steps in an epoch
    optimizer = optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.learning_rate)
    warmup = recipe.warmup_epochs * per_epoch
    main = {
        "step": lambda: lr_scheduler.StepLR(optimizer, recipe.step_epochs * per_epoch, recipe.gamma),
        "exponential": lambda: lr_scheduler.ExponentialLR(optimizer, recipe.gamma ** (1 / per_epoch)),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(
            optimizer, recipe.epochs * per_epoch - warmup, recipe.min_learning_rate
        ),
    }
    schedule = main[recipe.schedule]()
    if warmup:
        linear = lr_scheduler.LinearLR(optimizer, recipe.warmup_start, total_iters=warmup)
        schedule = lr_scheduler.SequentialLR(optimizer, [linear, schedule], [warmup])
    rates = []
    for step in range(recipe.epochs * steps_per_epoch):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % (steps_per_epoch // per_epoch) == 0:
            schedule.step()
    return rates


@pytest.mark.parametrize("schedule_per", ["epoch", "step"])
@pytest.mark.parametrize("warmup_epochs", [0, 1, 3])
@pytest.mark.parametrize("schedule", ["step", "exponential", "cosine"])
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")  # SequentialLR's own
def test_learning_rates_are_those_of_torchs_schedulers(schedule, warmup_epochs, schedule_per):
    recipe = replace(
        PLAIN,
        schedule=schedule,
        warmup_epochs=warmup_epochs,
        schedule_per=schedule_per,
        step_epochs=2,
        gamma=0.3,
        min_learning_rate=0.002,
    )
    ours = [learning_rate_at(step, 5, recipe) for step in range(recipe.epochs * 5)]
    assert ours == pytest.approx(torchs_learning_rates(recipe, 5), rel=1e-9)
    if schedule_per == "epoch":
        assert ours[::5] == ours[4::5]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
def test_learning_rates_of_the_library_are_those_of_torchs_schedulers(name):
    recipe = load_recipe(name, {})
    assert recipe.batch_size == recipe.base_batch_size
    ours = [learning_rate_at(step, 2, recipe) for step in range(recipe.epochs * 2)]
    assert ours == pytest.approx(torchs_learning_rates(recipe, 2), rel=1e-9)


def test_the_learning_rate_grows_with_the_batch():
    recipe = replace(load_recipe("swin", {}), batch_size=256)
    for step in (0, 19, 20, 150, 299):
        assert learning_rate_at(step, 1, recipe) == pytest.approx(learning_rate_at(step, 1, load_recipe("swin", {})) / 4)


class Attention(nn.Module):
    """A parameter of every sort."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 1)
        self.batch_norm = nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(2, 2))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.frozen = nn.Parameter(torch.zeros(()), requires_grad=False)


@pytest.mark.parametrize("apart", [True, False])
def test_norms_biases_and_position_tables_have_a_weight_decay_of_their_own(apart):
    model = Attention()
    own = {"norm_weight_decay": 0.1, "bias_weight_decay": 0.2, "position_weight_decay": 0.3} if apart else {}
    groups = parameter_groups(model, replace(PLAIN, weight_decay=0.4, **own))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[parameter]: group["weight_decay"] for group in groups for parameter in group["params"]}
    norm, bias, position = (0.1, 0.2, 0.3) if apart else (0.4, 0.4, 0.4)
    assert found == {
        "convolution.weight": 0.4,
        "convolution.bias": bias,
        "batch_norm.weight": norm,
        "batch_norm.bias": bias,
        "block.0.weight": norm,
        "block.0.bias": bias,
        "block.1.weight": 0.4,
        "block.1.bias": bias,
        "relative_position_bias_table": position,
        "logit_scale": 0.4,
    }
    assert len(groups) == (4 if apart else 1)


@pytest.mark.parametrize(
    ("name", "backbone"), [("resnet", "resnet18"), ("maxvit", "maxvit_t"), ("swin", "swin_v2_t"), ("focalnet", "focalnet_t")]
)
def test_groups_of_the_real_networks_hold_each_parameter_once(name, backbone):
    with torch.device("meta"):
        model = build_backbone(backbone, 10, 224)
    recipe = load_recipe(name, {})
    groups = make_optimizer(model, recipe).param_groups
    assert Counter(parameter for group in groups for parameter in group["params"]) == Counter(model.parameters())
    free = {id(parameter) for group in groups if group["weight_decay"] == 0 for parameter in group["params"]}
    names = {parameter_name for parameter_name, parameter in model.named_parameters() if id(parameter) in free}
    expected = {
        "resnet": set(),
        "maxvit": {n for n, _ in model.named_parameters() if n.endswith("relative_position_bias_table")},
        # What is a vector is a norm's or a bias.
        "swin": {n for n, p in model.named_parameters() if p.ndim == 1},
        "focalnet": {n for n, p in model.named_parameters() if p.ndim == 1},
    }
    assert names == expected[name]
    assert names or name == "resnet"


@pytest.mark.parametrize("name", ["resnet", "swin"])
def test_optimisers_take_the_steps_of_torchs(name):
    recipe = replace(load_recipe(name, {}), weight_decay=0.1, norm_weight_decay=None, bias_weight_decay=None, warmup_epochs=0)
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
    for model in (ours, theirs):
        nn.init.zeros_(model.weight).data += start
    rate = recipe.learning_rate
    expected = {
        "resnet": lambda: optim.SGD(theirs.parameters(), rate, momentum=0.9, weight_decay=0.1),
        "swin": lambda: optim.AdamW(theirs.parameters(), rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1),
    }[name]()
    optimizer = make_optimizer(ours, recipe)
    for _ in range(3):
        for model, stepping in ((ours, optimizer), (theirs, expected)):
            stepping.zero_grad()
            model(start).square().sum().backward()
            stepping.step()
    assert not torch.equal(ours.weight, start)
    assert torch.equal(ours.weight, theirs.weight)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 12, 20, generator=generator), torch.tensor([0, 1, 2, 3, 3, 0])


def test_mixup_is_torchvisions():
    images, labels = batch()
    ours = mixup(images, F.one_hot(labels, 4).float(), 0.3)
    theirs = v2.MixUp(num_classes=4)
    params = {"labels": labels, "batch_size": 6, "lam": 0.3}
    torch.testing.assert_close(ours[0], theirs.transform(images, params))
    torch.testing.assert_close(ours[1], theirs.transform(labels, params))


@pytest.mark.parametrize("seed", range(20))
def test_cutmix_is_torchvisions(seed):
    images, labels = batch()
    theirs = v2.CutMix(num_classes=4)
    torch.manual_seed(seed)
    drawn = theirs.make_params([images])
    torch.manual_seed(seed)  # the same draws again: share, column, row
    share = float(theirs._dist.sample(()))
    column, row = int(torch.randint(20, (1,))), int(torch.randint(12, (1,)))
    cut = box(12, 20, (row, column), share)
    assert (cut[1].start, cut[0].start, cut[1].stop, cut[0].stop) == tuple(int(edge) for edge in drawn["box"])
    ours = cutmix(images, F.one_hot(labels, 4).float(), cut)
    params = {"labels": labels, "batch_size": 6, **drawn}
    assert torch.equal(ours[0], theirs.transform(images, params))
    torch.testing.assert_close(ours[1], theirs.transform(labels, params))


def test_a_batch_is_mixed_in_one_of_the_recipes_ways_by_shares_of_their_distributions():
    images, labels = batch()
    images = torch.arange(6.0)[:, None, None, None].expand(6, 3, 64, 64)
    generator = np.random.default_rng(0)
    shares = {"mixup": [], "cutmix": []}
    for _ in range(600):
        mixed, targets = mix(images, labels, 4, replace(PLAIN, mixup=0.8, cutmix=1.0), generator)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))
        # The second image is of class 1, its partner of class 0; both are constant, 1 and 0.
        share = float(targets[1, 1])
        assert share == pytest.approx(float(mixed[1].mean()), abs=1e-5)
        cut = set(mixed[1].unique().tolist()) <= {0.0, 1.0}
        shares["cutmix" if cut else "mixup"].append(share)
    assert 240 < len(shares["mixup"]) < 360
    assert np.mean(shares["mixup"]) == pytest.approx(0.5, abs=0.06)
    assert np.var(shares["mixup"]) == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.15)  # of a Beta(0.8, 0.8)
    only = [mix(images, labels, 4, replace(PLAIN, cutmix=1.0), generator)[0][1] for _ in range(30)]
    assert all(set(image.unique().tolist()) <= {0.0, 1.0} for image in only)


def test_without_mixing_only_the_labels_change():
    images, labels = batch()
    same, targets = mix(images, labels, 4, PLAIN, np.random.default_rng(0))
    assert torch.equal(same, images)
    assert torch.equal(targets, F.one_hot(labels, 4).float())


@pytest.mark.parametrize("seed", range(6))
def test_a_process_with_a_part_of_a_batch_mixes_as_one_with_the_whole(seed):
    images, labels = batch()
    recipe = replace(PLAIN, mixup=0.8, cutmix=1.0)
    whole = mix(images, labels, 4, recipe, np.random.default_rng(seed))
    for rows in ([0, 1, 2], [3, 4, 5]):
        with_previous = [rows[0] - 1, *rows]
        part = mix(images[with_previous], labels[with_previous], 4, recipe, np.random.default_rng(seed))
        for ours, theirs in zip(part, whole, strict=True):
            assert torch.equal(ours[1:], theirs[rows])


@pytest.mark.parametrize("warmup_epochs", [0, 2])
def test_the_moving_average_is_that_of_torchvisions_references(warmup_epochs):
    recipe = replace(
        PLAIN, epochs=4, batch_size=8, ema=True, ema_steps=3, ema_decay=0.95, warmup_epochs=warmup_epochs, learning_rate=0.01
    )
    decay = 1 - (1 - 0.95) * 8 * 3 / 4
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    ours = Ema(model, recipe)
    theirs = AveragedModel(model, avg_fn=lambda average, now, _: decay * average + (1 - decay) * now, use_buffers=True)
    optimizer = make_optimizer(model, recipe)
    for epoch in range(4):
        for i in range(5):
            optimizer.zero_grad()
            model(torch.randn(8, 3)).square().sum().backward()
            optimizer.step()
            ours.after_step(model, epoch * 5 + i, 5)
            if i % 3 == 0:
                theirs.update_parameters(model)
                if epoch < warmup_epochs:
                    theirs.n_averaged.fill_(0)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
    assert not torch.allclose(ours.module[0].weight, model[0].weight)
    resumed = Ema(model, recipe)
    resumed.load_state_dict(ours.state_dict())
    for average in (ours, resumed):
        average.after_step(model, 20, 5)
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in ours.state_dict().items())


def test_a_moving_average_over_more_than_everything_is_the_model():
    model = nn.Linear(2, 2)
    average = Ema(model, replace(PLAIN, ema_decay=0.9, ema_steps=100))
    for step in (0, 100):
        nn.init.constant_(model.weight, step)
        average.after_step(model, step, 1000)
    assert torch.equal(average.module.weight, model.weight)


def test_an_epoch_sees_each_image_once_but_for_a_rest_that_changes():
    recipe = replace(PLAIN, batch_size=6)
    assert steps_per_epoch(20, recipe) == 3
    epochs = [epoch_order(20, recipe, 3, epoch) for epoch in range(4)]
    for epoch, order in enumerate(epochs):
        assert order.shape == (18, 2)
        assert len(set(order[:, 0].tolist())) == 18
        assert set(order[:, 1].tolist()) == {epoch}
    left_out = {frozenset(range(20)) - set(order[:, 0].tolist()) for order in epochs}
    assert len(left_out) > 1
    assert torch.equal(epoch_order(20, recipe, 3, 2), epochs[2])
    assert not torch.equal(epoch_order(20, recipe, 4, 2), epochs[2])
    assert sorted(epoch_order(4, recipe, 3, 0)[:, 0].tolist()) == [0, 1, 2, 3]


def test_repeated_augmentation_gives_each_step_as_many_images_as_torchvisions_sampler():
    samples, world, share, times = 40, 4, 3, 3
    recipe = replace(PLAIN, batch_size=world * share, repeated_augmentation=times)
    order = epoch_order(samples, recipe, 0, 5)
    steps = order.view(3, 12, 2)
    # The sampler of torchvision's references: each image `times` times in a row, then every world-th for a process.
    repeated = torch.arange(samples).repeat_interleave(times)
    sampled = [repeated[rank::world][: samples // 12 * 12 // world].view(-1, share) for rank in range(world)]
    theirs = [Counter(Counter(torch.cat(step).tolist()).values()) for step in zip(*sampled, strict=True)]
    assert [Counter(Counter(step[:, 0].tolist()).values()) for step in steps] == theirs == [{times: 4}] * 3
    looks = {tuple(look) for look in order.tolist()}
    assert len(looks) == len(order)
    assert {visit for _, visit in looks} == {15, 16, 17}
    for step in steps:
        assert (step[:, 0] != step[:, 0].roll(1)).all()
    assert not {tuple(look) for look in epoch_order(samples, recipe, 0, 6).tolist()} & looks
