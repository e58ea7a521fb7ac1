"""Models whose fault-free inferences differ by themselves: refused in one line, or measured."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from textguard.errors import UnknownName, UnsupportedModel
from textguard.faults import Campaign, CampaignSettings, make_engine
from textguard.faults.golden import look_at_golden_run

SETTINGS = {"injections_per_layer": 8, "detector": "off"}


class Net(nn.Module):
    """A small network with a step between its layers."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor], head: Callable = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.between, self.last = nn.Conv2d(1, 4, 3), nn.Linear(64, 5), between, head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.fc(self.between(self.conv(x)).flatten(1)))


class Remembers(nn.Module):
    """As observers of quantisation-aware training do: what it has seen changes what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.largest.mul_(1.1)
        return x / self.largest


def by_the_batch(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if float(x.sum()) > 0 else x


UNEQUAL = {
    "F.dropout without training=": F.dropout,
    "noise": lambda x: x + 0.1 * torch.randn_like(x),
    "a state": Remembers(),
}
MIXED = {
    "the batch's mean": lambda x: x - x.mean((0, 2, 3), keepdim=True),
    "the batch's largest value": lambda x: (x / x.abs().max() * 7).round(),
    "a branch on the batch's sum": by_the_batch,
    "shares of the batch": lambda x: x.softmax(0),
}


@pytest.fixture(scope="module")
def loader() -> DataLoader:
    torch.manual_seed(0)
    images = torch.randn(12, 1, 6, 6)
    with torch.no_grad():
        return DataLoader(TensorDataset(images, Net(torch.relu)(images).argmax(1)), batch_size=4)


@pytest.mark.parametrize("between", UNEQUAL.values(), ids=UNEQUAL)
def test_a_model_that_differs_from_itself_is_refused(loader, between):
    with pytest.raises(UnsupportedModel, match=r"other logits for the same 8 images .* range\).*model.eval\(\)") as error:
        Campaign(Net(between).eval(), loader, CampaignSettings(**SETTINGS))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("between", MIXED.values(), ids=MIXED)
def test_a_model_that_mixes_the_images_of_a_batch_is_refused(loader, between):
    with pytest.raises(UnsupportedModel, match=r"depend on the others of its batch .* of their range.*image_batch=1"):
        Campaign(Net(between).eval(), loader, CampaignSettings(**SETTINGS))


def test_such_a_model_is_taken_where_every_image_is_alone(loader):
    alone = DataLoader(loader.dataset, batch_size=1)
    settings = CampaignSettings(**SETTINGS, engine="whole", batch_size=1, image_batch=1)
    campaign = Campaign(Net(MIXED["the batch's mean"]).eval(), alone, settings)
    assert not campaign.golden.problems
    with pytest.raises(UnsupportedModel, match="other logits for the same"):  # which is no way out for noise
        Campaign(Net(UNEQUAL["noise"]).eval(), alone, settings)


ORDINARY = {
    "activations": torch.relu,
    "BatchNorm": nn.BatchNorm2d(4).eval(),
    "nothing but zeros": torch.zeros_like,
    "large common values": lambda x: x + 1e4,
    "dropout that is off": nn.Dropout(0.5).eval(),
}


@pytest.mark.parametrize("between", ORDINARY.values(), ids=ORDINARY)
@pytest.mark.parametrize(("engine", "number_format"), [("replay", "fp32"), ("whole", "int(4)")])
def test_ordinary_models_pass(loader, between, engine, number_format):
    settings = CampaignSettings(**SETTINGS, engine=engine, number_format=number_format)
    found = Campaign(Net(between).eval(), loader, settings).golden
    assert found.problems == ()
    assert found.noise == 0


def test_noise_is_measured_where_it_is_asked_for(loader, capsys):
    campaign = Campaign(Net(UNEQUAL["noise"]).eval(), loader, CampaignSettings(**SETTINGS, noise="report"))
    assert f"without any fault, DeltaLoss is {campaign.golden.noise:.3g}" in capsys.readouterr().err
    with torch.no_grad():  # and it is what one finds by hand
        model, (images, labels) = campaign.engine._model, loader.dataset.tensors
        losses = torch.stack([F.cross_entropy(model(images), labels, reduction="none") for _ in range(100)])
    expected = float((losses[1:] - losses[0]).abs().mean())
    assert expected / 2 < campaign.golden.noise < 2 * expected
    with pytest.raises(UnknownName, match="noise 'ignore' in argument noise; known: refuse, report"):
        CampaignSettings(noise="ignore")


class Augmented(Dataset):
    """Some images are moved at random, as in training."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = self.data[index]
        return image.roll(int(torch.randint(6, ())), -1), label


def test_augmentation_is_noticed(loader):
    augmented = DataLoader(Augmented(loader.dataset), batch_size=4)
    with pytest.raises(UnsupportedModel, match=r"other images when the same 8 positions are read again .*augmentation"):
        Campaign(Net(torch.relu).eval(), augmented, CampaignSettings(**SETTINGS))
    assert Campaign(Net(torch.relu).eval(), augmented, CampaignSettings(**SETTINGS, noise="report")).golden.noise < 1e-5


@pytest.mark.parametrize(
    ("head", "told"), [(lambda x: x.softmax(1), True), (lambda x: x.log_softmax(1), False), (torch.sigmoid, False)]
)
def test_a_head_that_ends_in_softmax_is_told(loader, capsys, head, told):
    Campaign(Net(torch.relu, head).eval(), loader, CampaignSettings(**SETTINGS))
    assert ("return x.log()" in capsys.readouterr().err) == told


def test_one_image_is_enough(loader):
    one = DataLoader(torch.utils.data.Subset(loader.dataset, [3]))
    model = Net(torch.relu).eval()
    assert look_at_golden_run(make_engine("replay", model, one.dataset[0][0], 4), one).images == 1


@pytest.mark.parametrize("name", ["replay", "whole"])
def test_images_of_another_size_are_refused(name):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)).eval()
    engine = make_engine(name, model, torch.zeros(1, 8, 8), 4)
    with pytest.raises(UnsupportedModel, match=r"shapes \[1, 8, 8\] and \[1, 6, 8\]; bring all to one size"):
        engine.observe(torch.zeros(2, 1, 6, 8))


def test_what_the_whole_engine_does_not_tell_is_said(loader, capsys):
    settings = CampaignSettings(**SETTINGS, engine="whole", enumerate_up_to=1)
    campaign = Campaign(Net(torch.relu).eval(), loader, settings)
    assert (
        "'whole' does not tell which faults are masked (none counts as such) and enumerates no layer" in capsys.readouterr().err
    )
    assert campaign.enumerated == []
    assert not campaign.run().records["masked"].any()
    assert not Campaign(Net(torch.relu).eval(), loader, CampaignSettings(**SETTINGS)).remarks


def test_quantisation_that_is_only_pretended_is_told(loader, capsys):
    from torch.ao.quantization import FakeQuantize

    model = Net(FakeQuantize()).eval()
    model.apply(torch.ao.quantization.disable_observer)
    campaign = Campaign(model, loader, CampaignSettings(**SETTINGS))
    assert "modules only pretend to quantise, the first is 'between': bits flip in the fp32 values" in capsys.readouterr().err
    assert len(campaign.remarks) >= 1
