"""What fault-free inferences tell: images by their positions, which of them are eligible, and the extremes of layers."""

import functools
import itertools
import multiprocessing
import os

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from small_campaign import SmallCampaign, assert_same_records
from textguard.assessment import assess
from textguard.errors import CampaignMismatch, InvalidParameter, UnsupportedModel
from textguard.faults import Campaign, CampaignSettings, inputs
from textguard.faults.engines import make_engine
from textguard.faults.execution import run_campaign
from textguard.faults.inputs import batches
from textguard.faults.mitigations import protect
from textguard.faults.plans import PLAN_COLUMNS, draw_plan
from textguard.faults.profiling import eligible_images, loader_of, profile_activations, profile_ranges
from textguard.faults.task import top2diff


class Pictures(Dataset):
    """Images with their labels in front, as Python ints."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels.tolist()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        return self.labels[number], self.images[number]


class Swapped(Pictures):
    """The other way round, as the campaign wants it."""

    def __getitem__(self, number):
        return self.images[number], self.labels[number]


def swap(pairs):
    """A collate function: stacked images, and the labels as a list of ints."""
    return torch.stack([image for _, image in pairs]), [label for label, _ in pairs]


class Halves:
    """A sampler of one half of the images, then of the other."""

    turn = 0

    def __iter__(self):
        self.turn += 1
        return iter(range(6 * (self.turn % 2), 6 * (self.turn % 2) + 6))


class Stream(IterableDataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return (self.dataset[number] for number in range(len(self.dataset)))


def loaders(images, labels):
    generator = torch.Generator().manual_seed(0)
    return {
        "shuffled": DataLoader(Swapped(images, labels), batch_size=5, shuffle=True, generator=generator),
        "one worker": DataLoader(Swapped(images, labels), batch_size=5, shuffle=True, num_workers=1),
        "custom collate_fn": DataLoader(Pictures(images, labels), batch_size=5, collate_fn=swap),
        "drop_last": DataLoader(Swapped(images, labels), batch_size=5, drop_last=True),
        "batch sampler": DataLoader(Swapped(images, labels), batch_sampler=[[3, 1], [0], [2, *range(4, 12)]]),
        "single images": DataLoader(Swapped(images, labels), batch_size=None),
    }


@pytest.mark.parametrize("name", loaders(torch.zeros(1), torch.zeros(1)))
def test_positions_are_those_in_the_data_set_however_it_is_loaded(resnet, images, labels, loader, name):
    expected = SmallCampaign(resnet, loader)
    other = loaders(images, labels)[name]
    pd.testing.assert_frame_equal(profile_ranges(resnet, other), profile_ranges(resnet, loader), rtol=1e-5)
    assert eligible_images(expected.engine, other) == [0, 1, 3, 4, 5, 6, 8, 9, 10, 11]
    records = run_campaign(expected.engine, other, expected.plan, expected.limits, image_batch=4)
    assert_same_records(records, expected.run())


REFUSED = {
    "images twice": ({"sampler": [*range(11), 0]}, "reads images more than once"),
    "all of them, and one twice": ({"sampler": [*range(12), 0]}, "reads images more than once"),
    "endless": ({"sampler": itertools.cycle([0])}, "reads images more than once"),
    "an unseen position": ({"sampler": [0, 12]}, "reads position 12 of a data set of 12 images"),
    "none": ({"sampler": []}, "reads no image"),
    "no positions": ({"sampler": ["first"]}, "gives no positions"),
    "by weight": ({"sampler": WeightedRandomSampler([1.0] * 12, 12)}, "WeightedRandomSampler that reads other images each"),
    "with replacement": ({"sampler": RandomSampler(range(12), replacement=True)}, "reads other images each time"),
    "fewer": ({"sampler": RandomSampler(range(12), num_samples=5)}, "reads other images each time"),
    "others each time": ({"sampler": Halves()}, "reads other images each time"),
    "a share of a process": ({"sampler": DistributedSampler(range(12), 2, 0)}, "gives each process other images"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_sampler_that_does_not_read_each_image_once_is_refused(resnet, images, labels, name):
    sampling, words = REFUSED[name]
    some = DataLoader(Swapped(images, labels), **sampling)
    for use in (lambda: profile_ranges(resnet, some), lambda: assess(resnet, some, injections_per_layer=2)):
        with pytest.raises(InvalidParameter, match=rf"{words}.*torch\.utils\.data\.Subset\(dataset, positions\)"):
            use()


SOME = [1, 3, 4, 6, 9, 10]
PARTIAL = {
    "random": {"sampler": SubsetRandomSampler([6, 1, 10, 9, 3, 4])},
    "a list": {"sampler": [10, 1, 3, 4, 6, 9], "num_workers": 1, "persistent_workers": True},
    "in batches": {"batch_sampler": [[3, 1], [10, 4, 9, 6]]},
    "without batches": {"sampler": SOME, "batch_size": None},
}


@pytest.mark.parametrize("name", PARTIAL)
def test_images_that_a_sampler_leaves_out_are_left_out(resnet, images, labels, name):
    """They stay at their positions in the data set. The slow twin is a data set of them alone."""
    images = images.clone()
    images[[0, 2, 5, 7, 8, 11]] = torch.nan
    batched = {} if "batch_sampler" in PARTIAL[name] else {"batch_size": 3}
    some = DataLoader(Swapped(images, labels), **{**batched, **PARTIAL[name]})
    alone = loader_of(images[SOME], labels[SOME], 3)
    pd.testing.assert_frame_equal(profile_ranges(resnet, some), profile_ranges(resnet, alone), rtol=1e-5)
    pd.testing.assert_frame_equal(profile_activations(resnet, some), profile_activations(resnet, alone), rtol=1e-5)
    engine = make_engine("replay", resnet, images[1], 8)
    assert eligible_images(engine, some) == [SOME[position] for position in eligible_images(engine, alone)]
    settings = CampaignSettings(injections_per_layer=8, plan="guided" if name == "random" else "uniform", seed=1)
    campaign = Campaign(resnet, some, settings)
    assert campaign.pace() > 0
    records = campaign.run().records
    assert set(records["image"]) <= set(SOME)
    assert len(set(records["image"])) > 1
    assert len(campaign.chances) == 12
    assert campaign.fault_free.top1 == pytest.approx(len(campaign.eligible) / 6)
    plan = records[PLAN_COLUMNS].assign(image=2)
    with pytest.raises(CampaignMismatch, match="the plan hits image 2, which the loader's sampler leaves out"):
        run_campaign(campaign.engine, some, plan, campaign.limits["profiled"], image_batch=4)


def test_a_campaign_on_other_images_is_another_one(resnet, images, labels, tmp_path):
    for positions in ([0, 1, 3, 4, 5, 6, 8, 9, 10], [0, 1, 3, 4, 5, 6, 8, 9, 11]):  # the first eight are the same
        some = DataLoader(Swapped(images, labels), batch_size=3, sampler=positions)
        campaign = Campaign(resnet, some, CampaignSettings(injections_per_layer=4, detector="off"), {})
        plan = draw_plan(campaign.engine.sites[:1], (np.arange(12) == 0).astype(float), 4, 0)
        run = functools.partial(run_campaign, campaign.engine, some, plan, campaign.limits["off"], image_batch=4)
        if positions[-1] == 10:
            run(shard_dir=str(tmp_path))
    with pytest.raises(CampaignMismatch, match=r"images was .*, 9 of 12, .*, now .*, 9 of 12, "):
        run(shard_dir=str(tmp_path))


class OpenedByWorkers(Swapped):
    """As a data set in a file that each worker process opens."""

    opened = False

    def __getitem__(self, number):
        assert self.opened
        return self.images[number], os.getpid()


def open_file(worker):
    torch.utils.data.get_worker_info().dataset.opened = True


@pytest.mark.parametrize("keep", [False, True], ids=["again", "persistent"])
def test_workers_are_started_as_the_loader_says(images, labels, keep):
    context = multiprocessing.get_context("fork")
    options = {"num_workers": 1, "worker_init_fn": open_file, "multiprocessing_context": context, "prefetch_factor": 3}
    generator = torch.Generator().manual_seed(1)
    own = DataLoader(OpenedByWorkers(images, labels), 5, **options, generator=generator, timeout=60, persistent_workers=keep)
    seen = []
    for _ in range(2):
        next(batches(own, torch.device("cpu")))  # a pass may end early
        found = [(part, *rest) for part, *rest in batches(own, torch.device("cpu"))]
        assert [list(part) for part, *_ in found] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
        assert torch.equal(torch.cat([pictures for _, pictures, _ in found]), images)
        seen += [int(labels[0]) for _, _, labels in found]
    assert len(set(seen)) == (1 if keep else 2)
    chosen = inputs._chosen(own, torch.device("cpu"), [[0]])
    assert (chosen.prefetch_factor, chosen.timeout, chosen.generator) == (3, 60, generator)
    assert chosen.multiprocessing_context is context


def test_a_subset_restricts_the_images(resnet, images, labels):
    engine = make_engine("replay", resnet, images[0], 8)
    some = DataLoader(Subset(Swapped(images, labels), [0, 2, 3]), batch_size=2)
    assert eligible_images(engine, some) == [0, 2]  # the positions are those in the subset; the second is not eligible


def test_a_stream_of_images_is_refused(resnet, images, labels):
    engine = make_engine("replay", resnet, images[0], 8)
    stream = DataLoader(Stream(Swapped(images, labels)), batch_size=5)
    plan = draw_plan(engine.sites, np.ones(12), 2, seed=0)
    limits = {site.layer: 1.0 for site in engine.sites}
    uses = {
        "ranges": lambda: profile_ranges(resnet, stream),
        "activations": lambda: profile_activations(resnet, stream),
        "eligible": lambda: eligible_images(engine, stream),
        "campaign": lambda: run_campaign(engine, stream, plan, limits, image_batch=4),
    }
    for use in uses.values():
        with pytest.raises(InvalidParameter, match="map-style data set"):
            use()


def test_eligible_images_are_classified_correctly_and_without_a_tie(images):
    class Given(nn.Module):
        """Logits as they are in the image's first row; the convolution is there for the engine."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 1, 1)

        def forward(self, x):
            return x[:, 0, 0, :4] + 0 * self.conv(x).mean(dim=(1, 2, 3))[:, None]

    given = torch.tensor([[3.0, 1, 0, 0], [1, 3, 0, 0], [3, 3, 0, 0], [0, 0, 1, 2], [0, 0, 0, 0]])
    pictures = torch.zeros(5, 3, 16, 16)
    pictures[:, 0, 0, :4] = given
    engine = make_engine("replay", Given(), pictures[0], 4)
    assert eligible_images(engine, loader_of(pictures, torch.tensor([0, 0, 0, 3, 0]), 2)) == [0, 3]
    softmax = given.softmax(dim=1).sort(dim=1, descending=True).values
    torch.testing.assert_close(top2diff(given), softmax[:, 0] - softmax[:, 1])


def outputs_of(model, images, names) -> dict[str, list[torch.Tensor]]:
    """What the modules `names` return, call by call, and copied: what follows may change it in place."""
    outputs = {name: [] for name in names}
    for name, found in outputs.items():
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, found=found: found.append(output.clone())
        )
    with torch.no_grad():
        model(images)
    return outputs


def test_profiled_ranges_are_the_layers_extremes(tiny_model, images):
    ranges = profile_ranges(tiny_model, loader_of(images, torch.zeros(12).long(), 5)).set_index("layer")
    outputs = outputs_of(tiny_model, images, ranges.index)
    wanted = {name for name, module in tiny_model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    assert set(ranges.index) == wanted
    for name, (output,) in outputs.items():
        assert ranges.loc[name, "kind"] == type(tiny_model.get_submodule(name)).__name__
        assert ranges.loc[name, "neurons"] == output.numel() / 12
        assert ranges.loc[name, "max_abs"] == pytest.approx(float(output.abs().max()), rel=1e-5)
        assert ranges.loc[name, "mean_abs"] == pytest.approx(float(output.abs().double().mean()), rel=1e-5)


def test_profiled_activations_are_the_activations_extremes(resnet, images):
    found = profile_activations(resnet, loader_of(images, torch.zeros(12).long(), 5)).set_index("activation")
    outputs = outputs_of(resnet, images, ["stem.2", "act"])
    expected = {"stem_2": outputs["stem.2"][0], "act": outputs["act"][0], "act_1": outputs["act"][1]}
    assert set(found.index) == expected.keys()
    for name, output in expected.items():
        assert found.loc[name, "low"] == pytest.approx(float(output.min()), abs=1e-6)
        assert found.loc[name, "high"] == pytest.approx(float(output.max()), rel=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_outputs_that_are_not_finite_have_no_range(resnet, images, value):
    """A maximum over NaN would be 0, and a detector that lets nothing pass."""
    resnet.conv1.weight.data[0, 0, 0, 0] = value
    loader = loader_of(images, torch.zeros(12).long(), 5)
    with pytest.raises(UnsupportedModel, match="without any fault, layer 'conv1' gives NaN or infinity"):
        profile_ranges(resnet, loader)
    with pytest.raises(UnsupportedModel, match="without any fault, activation 'act' gives NaN or infinity"):
        profile_activations(resnet, loader)


def test_bounds_of_another_model_are_refused(resnet, images):
    bounds = dict.fromkeys(("stem_2", "act", "act_1"), (0.0, 1.0))
    protect(resnet, images[0], bounds, "ranger")
    with pytest.raises(InvalidParameter, match="the model has no activation 'foo'"):
        protect(resnet, images[0], bounds | {"foo": (0.0, 1.0)}, "ranger")
