"""Whatever a user hands in is taken as meant, or refused in one line that says what was found and how to mend it."""

import math
import re
import warnings
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset, default_collate

from textguard.assessment import Assessment, assess
from textguard.assessment.advice import measure_mitigations
from textguard.errors import CampaignMismatch, TextguardError
from textguard.estimates.statistics import mean_interval
from textguard.faults import (
    Campaign,
    CampaignSettings,
    draw_plan,
    eligible_images,
    image_chances,
    make_engine,
    make_task,
    prepare,
    profile_activations,
    profile_ranges,
    protect,
    run_campaign,
)
from textguard.faults.inputs import Adapted, batches, device_of
from textguard.faults.weights import stored_weights

torch.manual_seed(0)
IMAGES = torch.randn(6, 3, 8, 8)
NETWORK = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
LABELS = NETWORK(IMAGES).argmax(dim=1)
with warnings.catch_warnings(action="ignore"):  # torch gives both up, but not yet
    SCRIPTED, TRACED = torch.jit.script(NETWORK), torch.jit.trace(NETWORK, IMAGES)


class Then(nn.Module):
    """The network, and behind it something else."""

    def __init__(self, after, before=lambda images: images, network=NETWORK):
        super().__init__()
        self.network, self.after, self.before = network, after, before

    def forward(self, images):
        return self.after(self.network(self.before(images)))


class Output(OrderedDict):
    """As transformers return it."""

    @property
    def logits(self):
        return self["logits"]


class Squeezed(nn.Module):
    """A batch of one loses its dimension."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 8), nn.Linear(4, 5)

    def forward(self, images):
        return self.head(self.conv(images).squeeze())


class Experts(nn.Module):
    """Each image goes to one of two heads."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(192, 5), nn.Linear(192, 5)])

    def forward(self, images):
        second, logits = images.sum(dim=(1, 2, 3)) > 0, torch.zeros(len(images), 5)
        for number, head in enumerate(self.heads):
            logits[second == bool(number)] = head(images[second == bool(number)].flatten(1))
        return logits


class OldImages:
    """Stands in for a PIL image, which torch cannot stack."""

    __module__ = "PIL.Image"


def pairs(images=IMAGES, labels=LABELS, **options):
    return DataLoader(TensorDataset(images, labels), **{"batch_size": 4, **options})


def items(data, **options):
    return DataLoader(data, **{"batch_size": 4, **options})


def drop_the_first(samples):
    return default_collate(samples[1:])


def each(function):
    """A data set of what the function makes of each image and its label."""
    return items([function(image, int(label)) for image, label in zip(IMAGES, LABELS, strict=True)])


class Broken(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, position):
        raise KeyError("the file of this image")


# What is handed in -> (model, loader, words of the message).
REFUSED = {
    "one logit": (Then(lambda x: x[:, :1]), pairs(), r'float32 \[2, 1\] for 2 images, one logit each; .*task="binary"'),
    "one logit, squeezed": (Then(lambda x: x[:, 0]), pairs(), r'float32 \[2\] for 2 images, one logit each; .*task="binary"'),
    "several classes of an image": (
        NETWORK,
        pairs(labels=torch.tensor([[1.0, 1, 0, 0, 1]] * 6)),
        r'float32 \[2, 5\], with several .*task="multilabel"',
    ),
    "regression": (NETWORK, pairs(labels=torch.rand(6, 3)), r"labels are float32 \[2, 3\]; .*loss= and correct="),
    "labels float": (NETWORK, pairs(labels=LABELS.float()), r"labels are float32 \[2\]; .*batch\[1\]\.long\(\)"),
    "labels of a regression": (
        NETWORK,
        pairs(labels=torch.rand(6)),
        r"labels are float32 \[2\]; .*a regression has no classes",
    ),
    "labels one-hot": (NETWORK, pairs(labels=F.one_hot(LABELS, 5)), r"one-hot; .*batch\[1\]\.argmax\(1\)"),
    "labels in a column": (NETWORK, pairs(labels=LABELS[:, None]), r"labels are int64 \[2, 1\]; .*batch\[1\]\.squeeze\(1\)"),
    "a label too large": (NETWORK, pairs(labels=torch.tensor([57] + [0] * 5)), r"label 57 is none of the model's 5 classes"),
    "a label too large, later": (NETWORK, pairs(labels=torch.tensor([0] * 5 + [5])), r"label 5 is none .* 0 to 4; .*Subset"),
    "label -1": (NETWORK, pairs(labels=torch.tensor([0, -1] + [0] * 4)), r"label -1 is none of the model's 5 classes"),
    "labels as text": (NETWORK, each(lambda image, label: (image, "cat")), r"labels such as 'cat'; .*names\.index\(label\)"),
    "images alone": (NETWORK, each(lambda image, label: (image,)), r"batches of 1 item, .*labels=lambda batch: batch\[1\]"),
    "one tensor": (NETWORK, each(lambda image, label: image), r"batches of a Tensor, not of two items"),
    "three items": (
        NETWORK,
        each(lambda image, label: (image, label, 0)),
        r"batches of 3 items, .*forward=lambda model, batch: model\(batch\[0\]\), labels=lambda batch: batch\[1\]",
    ),
    "two images": (
        NETWORK,
        each(lambda image, label: ((image, image), label)),
        r"images that are a list; .*model\(\*batch\[0\]\)",
    ),
    "dictionaries": (
        NETWORK,
        each(lambda image, label: {"pixel_values": image, "label": label}),
        r"dict with 'pixel_values', 'label', .*model\(batch\['pixel_values'\]\), labels=lambda batch: batch\['label'\]",
    ),
    "words": (
        NETWORK,
        each(lambda image, label: {"input_ids": image, "labels": label}),
        r"model\(\*\*batch\)\.logits, labels=lambda batch: batch\['labels'\]",
    ),
    "a map of logits": (Then(lambda x: x[:, :, None, None].expand(-1, -1, 8, 8)), pairs(), r"\[2, 5, 8, 8\] .*segmentation"),
    "a map of one logit": (Then(lambda x: x[:, :, None, None]), pairs(), r"\[2, 5, 1, 1\] .*model\(batch\[0\]\)\.flatten\(1\)"),
    "logits of words": (Then(lambda x: x[:, None].expand(-1, 7, -1)), pairs(), r"\[2, 7, 5\] for 2 images; one row per image"),
    "one row for all": (
        Then(lambda x: x.mean(0, keepdim=True)),
        pairs(),
        r"\[1, 5\] for 2 images; one row per image is needed",
    ),
    "classes instead of logits": (Then(lambda x: x.argmax(1)), pairs(), r"int64 \[2\] for 2 images; floating-point logits"),
    "a tuple": (Then(lambda x: (x, x)), pairs(), r"returns a tuple.*forward=lambda model, batch: model\(batch\[0\]\)\[0\]"),
    "a dictionary": (Then(lambda x: {"loss": 0, "scores": x}), pairs(), r"returns a dict.*model\(batch\[0\]\)\['scores'\]"),
    "transformers' output": (Then(lambda x: Output(logits=x)), pairs(), r"model\(batch\[0\]\)\.logits, or model\(\*\*batch\)"),
    "segmentation": (
        Then(lambda x: OrderedDict(out=x[:, :, None, None].expand(-1, -1, 8, 8))),
        pairs(),
        r"returns a OrderedDict, .*segmentation, with classes for each pixel, is not supported",
    ),
    "detection": (
        Then(lambda x: [{"boxes": x, "scores": x}] * len(x)),
        pairs(),
        r"returns a list, .*detection.* is not supported",
    ),
    "images of bytes": (
        NETWORK,
        pairs((IMAGES * 9).byte()),
        r"uint8 \[2, 3, 8, 8\], the weights .*\.to\(torch\.float32\) / 255",
    ),
    "images float64": (
        NETWORK,
        pairs(IMAGES.double()),
        r"float64 \[2, 3, 8, 8\], the weights of Sequential float32.*to\(torch",
    ),
    "images of another shape": (
        NETWORK,
        pairs(IMAGES[:, :1]),
        r"does not run on the first batch, whose images are float32 \[2, 1",
    ),
    "PIL images": (NETWORK, each(lambda image, label: (OldImages(), label)), r"they are PIL images; .*ToTensor\(\)"),
    "a scripted model": (SCRIPTED, pairs(), r"Sequential is scripted \(torch\.jit\)"),
    "a traced model": (TRACED, pairs(), r"Sequential is scripted \(torch\.jit\)"),
    "a function": (NETWORK.forward, pairs(), r"argument model is a method; it must be a torch\.nn\.Module"),
    "a list of batches": (
        NETWORK,
        [(IMAGES, LABELS)],
        r"argument loader is a list; it must be a torch\.utils\.data\.DataLoader",
    ),
    "a pair of tensors": (NETWORK, (IMAGES, LABELS), r"loader is a tuple; .*DataLoader\(TensorDataset\(images, labels\)"),
    "a data set": (NETWORK, TensorDataset(IMAGES, LABELS), r"argument loader is a TensorDataset; it must be"),
    "an empty data set": (NETWORK, pairs(IMAGES[:0], LABELS[:0]), r"has an empty data set"),
    "whole batches": (
        NETWORK,
        items([(IMAGES[:3], LABELS[:3]), (IMAGES[3:], LABELS[3:])], batch_size=None),
        r"has batch_size=None and a data set that gives 3 images at a time; .*batch_size=64",
    ),
    "samples dropped": (
        NETWORK,
        pairs(collate_fn=drop_the_first),
        r"\[1, 3, 8, 8\] for 2 positions; .*collate function may drop",
    ),
    "several sizes": (
        NETWORK,
        each(lambda image, label: (image[:, : 8 - label % 2], label)),
        r"several sizes \(.*7, 8.*bring all to one",
    ),
    "several sizes, one by one": (
        Then(lambda x: x, lambda images: images[:, :, :8, :8]),
        items([(torch.cat([image] * (1 + number // 3), 1), 0) for number, image in enumerate(IMAGES)], batch_size=1),
        r"images of several sizes, \[3, 8, 8\] and \[3, 16, 8\]",
    ),
    "a batch of one": (
        Squeezed(),
        pairs(labels=LABELS * 0),
        r"\[2, 5\] for 2 images, float32 \[5\] for one; x\.squeeze\(\) drops",
    ),
    "experts": (Experts(), pairs(), r"runs layer 'heads\.[01]' on some images of a batch only, .*compute all experts"),
    "an unreadable file": (NETWORK, items(Broken()), r"cannot give the images 0 to 1: KeyError: 'the file of this image'"),
}


def refusal(use) -> str:
    with pytest.raises(TextguardError) as caught:
        use()
    assert "\n" not in str(caught.value)
    assert "params.yaml" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_assessed_is_refused_in_one_line_with_the_cure(name):
    model, loader, words = REFUSED[name]
    line = refusal(lambda: assess(model, loader, injections_per_layer=2))
    assert re.search(words, line), line


NUMBERS = {
    "a confidence in percent": ({"confidence": 95}, r"argument confidence is 95; it must be a number from 0\.5 to"),
    "no faults per pass": ({"batch_size": 0}, r"argument batch_size is 0; at least 1 is needed"),
    "no images per run": ({"image_batch": 0}, r"argument image_batch is 0; at least 1 is needed"),
    "8.0 injections": ({"injections_per_layer": 8.0}, r"argument injections_per_layer is 8\.0; it must be a whole number"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_checked(name):
    options, words = NUMBERS[name]
    assert re.search(words, refusal(lambda: assess(NETWORK, pairs(), **options)))


def test_numbers_are_checked_where_engine_and_plan_are_made_by_hand(tmp_path):
    assert "batch_size is 0" in refusal(lambda: make_engine("replay", NETWORK, IMAGES[0], 0))
    engine = make_engine("replay", NETWORK, IMAGES[0], 8)
    plan, limits = draw_plan(engine.sites, np.ones(6), 2, seed=0), {"0": 1.0, "3": 1.0}
    assert "image_batch is 0" in refusal(lambda: run_campaign(engine, pairs(), plan, limits, image_batch=0))
    assert "shard_dir is 5" in refusal(lambda: run_campaign(engine, pairs(), plan, limits, image_batch=2, shard_dir=5))
    run_campaign(engine, pairs(), plan, limits, image_batch=2, shard_dir=str(tmp_path))
    assert list(tmp_path.glob("*.parquet"))


USES = {
    "ranges": lambda loader: profile_ranges(NETWORK, loader),
    "activations": lambda loader: profile_activations(NETWORK, loader),
    "campaign": lambda loader: Campaign(NETWORK, loader, CampaignSettings()),
    "engine": lambda loader: prepare(NETWORK, loader),
}


@pytest.mark.parametrize("name", USES)
def test_the_first_batch_is_checked_wherever_one_begins(name):
    assert "batches of 1 item" in refusal(lambda: USES[name](each(lambda image, label: (image,))))


def test_labels_are_not_needed_for_ranges():
    unknown = pairs(labels=torch.full((6,), -1))
    pd.testing.assert_frame_equal(profile_ranges(NETWORK, unknown), profile_ranges(NETWORK, pairs()))


@pytest.mark.parametrize("kind", [torch.int8, torch.int16, torch.int32, torch.uint8])
def test_labels_may_be_whole_numbers_of_any_type(kind):
    engine, settings = make_engine("replay", NETWORK, IMAGES[0], 8), CampaignSettings(injections_per_layer=4, plan="guided")
    assert eligible_images(engine, pairs(labels=LABELS.to(kind))) == list(range(6))
    found, expected = (Campaign(NETWORK, pairs(labels=labels), settings).run() for labels in (LABELS.to(kind), LABELS))
    pd.testing.assert_frame_equal(found.records, expected.records)


def test_bytes_are_taken_by_a_model_that_converts_them():
    model = Then(lambda x: x, lambda images: images.float() / 255)
    assert len(profile_ranges(model, pairs((IMAGES * 9).byte()))) == 2


def test_the_model_stays_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(4, 5))
    model[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepare(model, pairs())
    assert [module.training for module in model.modules()] == [True, True, True, False, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_lies_where_its_parameters_do_or_its_buffers():
    assert device_of(nn.ReLU()) == torch.device("cpu")
    buffered = nn.Module()
    buffered.register_buffer("weight", torch.zeros(2, device="meta"))
    assert device_of(buffered) == torch.device("meta")
    assert device_of(NETWORK) == torch.device("cpu")
    assert "has no " in refusal(lambda: assess(nn.Flatten(), pairs(), injections_per_layer=2))


WITH_NAN = IMAGES.clone()
WITH_NAN[2, 0, 0, 0] = torch.nan
NONE = {
    "wrong": ((LABELS + 1) % 5, IMAGES, r"of 6, the fault-free model is right about 0 \(top-1 0\.0%\); .*labels numbered as"),
    "NaN": ((LABELS + 1) % 5, WITH_NAN, r"logits of 1 \(17%\) are NaN or infinite, the first at position 2; look for NaN"),
    "ties": (LABELS * 0, IMAGES, r"is right about 6 \(top-1 100\.0%\); in all 6 the two best classes tie"),
}


@pytest.mark.parametrize("name", NONE)
def test_where_no_image_is_eligible_it_is_said_why(name):
    labels, images, words = NONE[name]
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    model = model if name == "ties" else NETWORK
    profiled = dict.fromkeys(["0", "1", "3"], 1.0)
    campaign = Campaign(model, pairs(images, labels), CampaignSettings(), profiled)
    line = refusal(lambda: campaign.chances)
    assert re.search(words, line), line


# --- tasks ---

torch.manual_seed(2)
ONE = nn.Sequential(NETWORK, nn.Linear(5, 1)).eval()
CLASS = (ONE(IMAGES)[:, 0] > 0).long()


class Both(nn.Module):
    """Logits 0 and z of the model that returns z alone: the same decision, as an ordinary classifier."""

    def __init__(self):
        super().__init__()
        self.one = ONE

    def forward(self, images):
        logit = self.one(images)
        return torch.cat([torch.zeros_like(logit), logit], dim=1)


TWINS = {
    "one logit": ("binary", ONE, CLASS),
    "labels in a column": ("binary", ONE, CLASS[:, None].float()),
    "squeezed": ("binary", Then(lambda x: x[:, 0], network=ONE), CLASS.float()),
    "one class of a set": ("multilabel", ONE, CLASS[:, None].float()),
    "probabilities": ("probabilities", nn.Sequential(Both(), nn.Softmax(dim=1)), CLASS),
}


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("plan", ["uniform", "guided"])
def test_a_task_agrees_with_the_ordinary_classifier_that_decides_the_same(name, plan):
    task, model, labels = TWINS[name]
    settings = CampaignSettings(injections_per_layer=60, plan=plan, images="importance", seed=1)
    expected = Campaign(Both(), pairs(labels=CLASS), settings).run()
    found = Campaign(model, pairs(labels=labels), settings, task=task).run()
    columns = ["index", "image", "neuron", "bit", "detected", "mismatch", "golden_loss", "faulty_loss", "weight"]
    tied = (expected.records["faulty_loss"] - math.log(2)).abs() < 1e-6  # a softmax may lose which logit is larger
    for one in (found.records, expected.records):
        one.loc[tied, "mismatch"] = False
    pd.testing.assert_frame_equal(found.records[columns], expected.records[columns], rtol=1e-3, atol=1e-5)
    assert expected.records["mismatch"].any()


@pytest.mark.parametrize("name", ["one logit", "probabilities"])
def test_last_layers_of_other_tasks_are_enumerated_by_the_engine(name):
    task, model, labels = TWINS[name]
    settings = CampaignSettings(injections_per_layer=8, enumerate_up_to=6 * 32, kinds=["Linear"])
    expected = Campaign(Both(), pairs(labels=CLASS), settings)
    found = Campaign(model, pairs(labels=labels), settings, task=task)
    assert [site.neurons for site in found.enumerated] == [1]
    one, other = (campaign.enumerate_layers()["profiled"][0] for campaign in (found, expected))
    np.testing.assert_allclose(one.delta_loss, other.delta_loss, rtol=1e-3, atol=1e-5)
    assert name == "probabilities" or (one.mismatches == other.mismatches).all()
    assert found.rescale_last_layer() == {}
    few = Campaign(model, pairs(labels=labels), replace(settings, enumerate_up_to=1), task=task)
    assert few.enumerated == []  # it has no closed form


def test_many_classes_of_an_image_cost_their_mean_and_are_right_together():
    task = make_task("multilabel")
    logits, labels = torch.tensor([[2.0, -1.0], [2.0, 1.0], [0.0, 3.0]]), torch.tensor([[1, 0], [1, 0], [0, 1]])
    own = torch.sigmoid(torch.where(labels == 1, logits, -logits))
    torch.testing.assert_close(task.loss(logits, labels), -own.log().mean(dim=1))
    assert task.correct(logits, labels).tolist() == [True, False, True]
    torch.testing.assert_close(task.certainty(logits), (2 * torch.sigmoid(logits) - 1).abs().amin(dim=1))
    assert task.differs(logits, logits * torch.tensor([1, -1])).tolist() == [True, True, True]
    assert task.differs(logits, logits * 2).tolist() == [False] * 3
    torch.testing.assert_close(F.softplus(-task.margin(logits, labels)), task.loss(logits, labels).double())


WRONG_TASKS = {
    "two logits": ("binary", NETWORK, LABELS, r"logits have shape \[2, 5\]; a binary task has one per image"),
    "classes": ("binary", ONE, LABELS + 1, r"labels are int64 \[2\] with .*; a binary task needs one 0 or 1 per image"),
    "numbers of classes": (
        "multilabel",
        NETWORK,
        LABELS,
        r"labels are int64 \[2\] .*; a multilabel task needs 0 or 1 for each of \[2, 5\]",
    ),
    "unknown": ("regression", NETWORK, LABELS, r"task 'regression' in argument task; known: binary, classes, multilabel, prob"),
}


@pytest.mark.parametrize("name", WRONG_TASKS)
def test_a_task_that_the_data_are_not_for_is_refused(name):
    task, model, labels, words = WRONG_TASKS[name]
    line = refusal(lambda: Campaign(model, pairs(labels=labels), CampaignSettings(), task=task))
    assert re.search(words, line), line


WRONG_FUNCTIONS = {
    "a mean": (
        {"loss": F.cross_entropy},
        r"argument loss gives float32 \[\] for 2 images; a loss for each is .*reduction='none'",
    ),
    "classes": ({"correct": lambda logits, labels: logits.argmax(1)}, r"argument correct gives int64 \[2\]; it must be bool"),
    "a number": ({"loss": lambda logits, labels: 1.0}, r"argument loss gives a float for 2 images"),
    "an error": ({"loss": lambda logits, labels: logits[9]}, r"argument loss fails on the first batch \(IndexError: "),
    "no function": ({"loss": "mse"}, r"argument loss is 'mse'; it must be a function"),
    "other labels": ({"labels": lambda batch: batch["y"]}, r"argument labels fails on the first batch \(TypeError: "),
    "a forward": ({"forward": lambda model, batch: model(batch["x"])}, r"forward= fails on the first batch \(TypeError: "),
    "few labels": ({"labels": lambda batch: batch[1][:1]}, r"gives labels of shape \[1\] for 2 images"),
}


@pytest.mark.parametrize("name", WRONG_FUNCTIONS)
def test_functions_that_do_not_fit_are_refused(name):
    given, words = WRONG_FUNCTIONS[name]
    line = refusal(lambda: Campaign(NETWORK, pairs(), CampaignSettings(), task=make_task(**given)))
    assert re.search(words, line), line


def test_a_loss_of_its_users_is_what_the_records_hold():
    weight = torch.tensor([1.0, 2, 3, 4, 5])

    def loss(logits, labels):
        return F.cross_entropy(logits, labels, weight=weight, reduction="none")

    def among_two(logits, labels):
        return (logits.topk(2).indices == labels[:, None]).any(dim=1)

    second = NETWORK(IMAGES).topk(2).indices[:, 1]
    loader = pairs(labels=second)
    assert not image_chances(make_engine("replay", NETWORK, IMAGES[0], 8), loader).any()
    for plan in ("uniform", "guided"):
        settings = CampaignSettings(injections_per_layer=20, plan=plan, seed=3)
        found, plain = (
            Campaign(NETWORK, loader, settings, task=make_task(loss=given, correct=among_two)) for given in (loss, None)
        )
        assert found.eligible == list(range(6))
        records = found.run().records
        expected = run_campaign(plain.engine, loader, records, plain.limits["profiled"], image_batch=4)
        factor = weight[second[records["image"].to_list()]].numpy()
        for column in ("golden_loss", "faulty_loss"):
            np.testing.assert_allclose(records[column], factor * expected[column], rtol=1e-4)


def test_a_loss_without_gradients_cannot_guide():
    task = make_task(loss=lambda logits, labels: (logits.argmax(1) != labels).float())
    campaign = Campaign(NETWORK, pairs(), CampaignSettings(injections_per_layer=8, plan="guided"), task=task)
    assert "the model or its loss has no gradients" in refusal(campaign.run)
    assert len(Campaign(NETWORK, pairs(), CampaignSettings(injections_per_layer=8), task=task).run().records) == 16


# --- batches that are not images and labels ---


class Words(nn.Module):
    """Numbers of words, a mask and a scale of several types, as a text classifier gets them."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.act, self.head = nn.Embedding(7, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask, scale, labels=None, name=None):
        found = self.act(self.hidden(self.embed(input_ids)))
        found = (found * attention_mask[:, :, None]).sum(dim=1) * scale[:, None]
        return Output(logits=self.head(found.float()))


torch.manual_seed(1)
WORDS = Words().eval()
IDS, MASK, SCALE = torch.randint(7, (6, 5)), torch.rand(6, 5) > 0.3, torch.rand(6, dtype=torch.float64) + 0.5
with torch.no_grad():
    WORD_LOGITS = WORDS(IDS, MASK, SCALE).logits
WORD_LABELS = WORD_LOGITS.argmax(dim=1)


def as_dictionary(number):
    return {
        "input_ids": IDS[number],
        "attention_mask": MASK[number],
        "scale": SCALE[number],
        "labels": WORD_LABELS[number],
        "name": f"text {number}",
    }


NESTED = {
    "a dictionary": (
        as_dictionary,
        make_task(forward=lambda model, batch: model(**batch).logits, labels=lambda batch: batch["labels"]),
    ),
    "nested": (
        lambda number: ((IDS[number], {"mask": MASK[number], "scale": SCALE[number]}), WORD_LABELS[number]),
        make_task(forward=lambda model, batch: model(batch[0][0], batch[0][1]["mask"], batch[0][1]["scale"]).logits),
    ),
}


@pytest.mark.parametrize("name", NESTED)
def test_several_tensors_go_through_both_engines(name):
    """Faults are compared with a hook that changes one value of one text."""
    make, task = NESTED[name]
    loader = items([make(number) for number in range(6)])
    settings = CampaignSettings(injections_per_layer=40, seed=2, detector="fixed:1000")
    runs = {}
    for engine in ("replay", "whole"):
        campaign = Campaign(WORDS, loader, replace(settings, engine=engine), task=task)
        assert type(campaign.engine).__name__.lower().startswith(engine)
        assert [site.layer for site in campaign.engine.sites] == ["hidden", "head"]
        assert campaign.eligible == list(range(6))
        pictures = torch.cat([images for _, images, _ in batches(loader, torch.device("cpu"), task=task)])
        torch.testing.assert_close(campaign.engine.observe(pictures), WORD_LOGITS)
        runs[engine] = campaign.run().records
    columns = [column for column in runs["replay"] if column != "masked"]
    pd.testing.assert_frame_equal(runs["replay"][columns], runs["whole"][columns], rtol=1e-4, atol=1e-6)
    assert runs["replay"]["mismatch"].any()
    for row in runs["replay"].itertuples():

        def change(module, given, output, row=row):
            output.view(-1)[row.neuron] = row.faulty_value

        handle = WORDS.get_submodule(row.layer).register_forward_hook(change)
        one = slice(row.image, row.image + 1)
        with torch.no_grad():
            logits = WORDS(IDS[one], MASK[one], SCALE[one]).logits
        handle.remove()
        expected = float(F.cross_entropy(logits, WORD_LABELS[one]))
        assert row.faulty_loss == pytest.approx(expected, rel=1e-4, abs=1e-5)


class Nested(nn.Module):
    """A model that has a `model` of its own, an addition, and a parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.modelled = nn.Linear(192, 8), nn.Linear(8, 8)
        self.head, self.unread = nn.Linear(8, 5), nn.Parameter(torch.zeros(2))

    def forward(self, x):
        x = self.model(x)
        return self.head(x + self.modelled(x).relu())


@pytest.mark.parametrize("target", ["neuron", "weight"])
@pytest.mark.parametrize("engine", ["replay", "whole", "pytorchfi"])
@pytest.mark.parametrize("model", [Nested(), nn.Sequential(nn.Linear(192, 5)), nn.Linear(192, 5)], ids=["nested", "0", "alone"])
def test_layers_have_the_names_that_the_users_model_gives_them(model, engine, target):
    if engine == "pytorchfi" and (target == "weight" or not isinstance(model, nn.Sequential)):
        pytest.skip("PyTorchFI hits neurons of named modules whose weights are stored")
    task = make_task(forward=lambda model, batch: model(batch["x"].flatten(1)), labels=lambda batch: [0] * len(batch["x"]))
    kinds = {"neuron": ("Linear", "Add"), "weight": ("Linear",)}[target]
    options = {"target": target} | ({} if engine == "pytorchfi" else {"kinds": kinds})
    own = make_engine(engine, model.eval(), IMAGES[0].flatten(), 4, **options)
    held, image = prepare(model, items([{"x": image} for image in IMAGES]), task)
    adapted = make_engine(engine, held, image, 4, **options)
    assert [site.layer for site in adapted.sites] == [site.layer for site in own.sites]
    assert adapted.skipped == own.skipped
    for weight, theirs in zip(stored_weights(held, adapted.sites), stored_weights(model, own.sites), strict=True):
        assert weight is theirs


def test_a_plan_is_guided_where_inputs_have_no_gradients():
    make, task = NESTED["a dictionary"]
    settings = CampaignSettings(injections_per_layer=64, plan="guided")
    campaign = Campaign(WORDS, items([make(number) for number in range(6)]), settings, task=task)
    assert (campaign.run().records["bit"] >= 24).mean() > 0.6  # 8 of 32 bits


@pytest.mark.parametrize("kind", [dict, Output])
def test_the_only_tensor_of_a_batch_stays_as_it_is(kind):
    loader = items([kind(x=image, name="text") for image in IMAGES])
    task = make_task(
        forward=lambda model, batch: model(batch["x"]) if batch["name"][0] is None else None,
        labels=lambda batch: [0] * len(batch["x"]),
    )
    model, image = prepare(NETWORK, loader, task)
    assert torch.equal(image, IMAGES[0])
    assert isinstance(model, Adapted)
    torch.testing.assert_close(model(IMAGES), NETWORK(IMAGES))
    assert prepare(model, loader, task)[0] is model


def test_a_batch_of_transformers_keeps_its_attributes():
    task = make_task(forward=lambda model, batch: model(batch.logits), labels=lambda batch: [0] * len(batch["logits"]))
    loader = DataLoader(IMAGES, batch_size=4, collate_fn=lambda images: Output(logits=torch.stack(images)))
    assert torch.equal(prepare(NETWORK, loader, task)[1], IMAGES[0])


def test_a_protected_model_is_not_adapted_again():
    make, task = NESTED["a dictionary"]
    loader = items([make(number) for number in range(6)])
    bounds = profile_activations(WORDS, loader, task)
    bounds = {row.activation: (row.low, row.high) for row in bounds.itertuples()}
    assert list(bounds) == ["model_act"]
    protected = protect(*prepare(WORDS, loader, task), bounds, "ranger")
    campaign = Campaign(protected, loader, CampaignSettings(injections_per_layer=20, detector="off"), task=task)
    assert [site.layer for site in campaign.engine.sites] == ["hidden", "head"]
    plain = Campaign(WORDS, loader, CampaignSettings(injections_per_layer=20, detector="off"), task=task)
    results = [one.run().layers["hidden"].delta_loss for one in (campaign, plain)]
    assert mean_interval(results[0], 0.9).value < mean_interval(results[1], 0.9).value


def test_texts_of_several_lengths_are_refused():
    make, task = NESTED["a dictionary"]
    long = {**make(5), "input_ids": IDS[5].repeat(2), "attention_mask": MASK[5].repeat(2)}
    loader = items([*(make(number) for number in range(5)), long], batch_size=1)
    line = refusal(lambda: Campaign(WORDS, loader, CampaignSettings(injections_per_layer=2), task=task))
    assert re.search(r"images of several sizes, 96 bytes and 128 bytes; bring all to one \(.*padding to one length\)", line), (
        line
    )


def test_shards_of_another_task_are_of_another_campaign(tmp_path: Path):
    def double(logits, labels):
        return 2 * F.cross_entropy(logits, labels, reduction="none")

    settings = CampaignSettings(injections_per_layer=4)
    Campaign(NETWORK, pairs(), settings).run(tmp_path)
    assert "task" not in (tmp_path / "round-0" / "campaign.json").read_text(encoding="utf-8")
    other = Campaign(NETWORK, pairs(), settings, task=make_task(loss=double))
    with pytest.raises(CampaignMismatch, match=r"task was None, now classes; loss was None, now test_inputs\..*double"):
        other.run(tmp_path)


# --- all of it in one call ---


def test_an_assessment_of_some_images_tells_of_these(tmp_path: Path):
    some = [1, 3, 5]
    options = {"injections_per_layer": 30, "seed": 1, "detector": "off"}
    found = assess(NETWORK, pairs(sampler=SubsetRandomSampler(some)), **options)
    assert (found.images, found.eligible, found.predictions["image"].tolist()) == (3, 3, some)
    assert found.by("image")["image"].tolist() == some
    hits = found.records.drop_duplicates(["layer", "index"])
    expected = LABELS[hits["image"].to_list()].bincount(minlength=5).tolist()
    assert found.by("class")["injections"].tolist() == expected
    found.save(tmp_path / "saved")
    again = Assessment.load(tmp_path / "saved")
    pd.testing.assert_frame_equal(again.by("class"), found.by("class"))
    replayed = assess(NETWORK, pairs(sampler=some), plan=again, detector="off")
    pd.testing.assert_frame_equal(replayed.records, found.records)


ASSESSED = {
    "binary": (ONE, pairs(labels=CLASS), {"task": "binary"}, CLASS.tolist(), 2),
    "several classes": (NETWORK, pairs(labels=(NETWORK(IMAGES) > 0).long()), {"task": "multilabel"}, [0] * 6, 2),
    "words": (
        WORDS,
        items([as_dictionary(number) for number in range(6)]),
        {
            "forward": lambda model, batch: model(**batch).logits,
            "labels": lambda batch: batch["labels"],
            "mitigation": "ranger",
        },
        WORD_LABELS.tolist(),
        3,
    ),
    "a loss": (
        NETWORK,
        pairs(labels=torch.stack([LABELS, LABELS * 0], dim=1)),
        {
            "loss": lambda logits, labels: F.cross_entropy(logits, labels[:, 0], reduction="none"),
            "correct": lambda logits, labels: logits.argmax(1) == labels[:, 0],
        },
        [0] * 6,
        2,
    ),
}


@pytest.mark.parametrize("name", ASSESSED)
def test_an_assessment_knows_what_logits_mean(name, tmp_path: Path):
    model, loader, given, labels, classes = ASSESSED[name]
    found = assess(model, loader, injections_per_layer=20, enumerate_up_to=1, **given)
    assert (found.top1.value, found.eligible, len(found.classes)) == (1.0, 6, classes)
    assert found.predictions["label"].tolist() == found.predictions["prediction"].tolist() == labels
    assert (found.table["delta_loss"] > 0).all()
    found.save(tmp_path / "saved")
    again = Assessment.load(tmp_path / "saved")
    assert again.settings["task"] == make_task(**{key: one for key, one in given.items() if key != "mitigation"}).as_json()
    pd.testing.assert_frame_equal(again.table, found.table)


def test_a_plan_is_replayed_for_the_task_that_it_was_drawn_for():
    options = {"injections_per_layer": 100, "detector": "off"}
    found = assess(ONE, pairs(labels=CLASS), task="binary", **options)
    again = assess(ONE, pairs(labels=CLASS), task="binary", plan=found, detector="off")
    pd.testing.assert_frame_equal(again.records, found.records)
    both = pairs(labels=CLASS)
    assert "are those of ordinary classes, and the plan was drawn for task=binary; give the same" in refusal(
        lambda: assess(Both(), both, plan=found, detector="off")
    )


def test_mitigations_are_measured_for_any_task():
    task = {"forward": lambda model, batch: model(**batch).logits, "labels": lambda batch: batch["labels"]}
    loader = items([as_dictionary(number) for number in range(6)])
    found = assess(WORDS, loader, injections_per_layer=200, detector="off", **task)
    measured = measure_mitigations(WORDS, loader, found, ["ranger"], **task)
    assert (measured["before"] > 0).all()
