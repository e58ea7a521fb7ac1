"""Stuck processing elements, beside matrix products that are computed element by element."""

import numpy as np
import pandas as pd
import pytest
import torch
from array_drawing import FILE, drawing
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from textguard.errors import CampaignMismatch, InvalidParameter
from textguard.faults.sites import Site
from textguard.hardware.array import Array, draw_stuck, run_stuck, summarise_stuck

MAPPINGS = ["output_stationary", "weight_stationary"]


def stuck(values, mask):
    """float32 values with the mask's bits at 1."""
    codes = values.contiguous().view(torch.int32).to(torch.int64) | mask
    return torch.where(codes >= 2**31, codes - 2**32, codes).to(torch.int32).view(torch.float32)


def on_array(array, weight, bias, unfolded, element, mask):
    """A product [channels, K] x [K, places] + bias, tile by tile, with a stuck element."""
    row, column = divmod(element, array.columns)
    found = torch.empty(weight.shape[0], unfolded.shape[1])
    if array.mapping == "weight_stationary":
        weight = weight.clone()
        for first in range(0, weight.shape[1], array.rows):  # a tile of the array holds rows of K, columns of channels
            for channel in range(0, weight.shape[0], array.columns):
                if first + row < weight.shape[1] and channel + column < weight.shape[0]:
                    held = weight[channel + column, first + row]
                    weight[channel + column, first + row] = stuck(held[None], mask)[0]
        return weight @ unfolded + bias[:, None]
    for channel in range(0, len(found), array.rows):
        for place in range(0, found.shape[1], array.columns):
            tile = weight[channel : channel + array.rows] @ unfolded[:, place : place + array.columns]
            tile = tile + bias[channel : channel + array.rows, None]
            if row < tile.shape[0] and column < tile.shape[1]:
                tile[row, column] = stuck(tile[row, column][None], mask)[0]
            found[channel : channel + array.rows, place : place + array.columns] = tile
    return found


class Net(nn.Module):
    """Ordinary, grouped and depthwise convolutions, linear layers on tokens and on a vector."""

    def __init__(self):
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, groups=2, stride=2)
        self.depthwise, self.tokens, self.head = nn.Conv2d(4, 4, 2, groups=4), nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, images, product=None):
        product = product or self.plain
        x = torch.relu(product(self.first, images))
        x = torch.relu(product(self.depthwise, torch.relu(product(self.grouped, x))))
        return product(self.head, torch.relu(product(self.tokens, x.flatten(2).transpose(1, 2))).mean(dim=1))

    @staticmethod
    def plain(layer, x):
        return layer(x)


def emulated(net, image, array, element, mask, where):
    """The logits of one image, each layer in `where` computed on the array."""

    def product(layer, x):
        if layer not in where:
            return layer(x)
        if isinstance(layer, nn.Linear):
            tokens = x.reshape(-1, x.shape[-1]).t()
            return on_array(array, layer.weight, layer.bias, tokens, element, mask).t().reshape(*x.shape[:-1], -1)
        groups, size = layer.groups, layer(x).shape
        unfolded = F.unfold(x, layer.kernel_size, 1, layer.padding, layer.stride)[0]
        parts = zip(*(part.chunk(groups) for part in (layer.weight.flatten(1), layer.bias, unfolded)), strict=True)
        return torch.cat([on_array(array, weight, bias, own, element, mask) for weight, bias, own in parts]).reshape(size)

    return net(image[None], product)


def net_and_loader(images=7):
    torch.manual_seed(0)
    net = Net().eval()
    pictures = torch.randn(images, 3, 7, 7)
    with torch.no_grad():
        labels = net(pictures).argmax(dim=1)
    labels[0] = (labels[0] + 1) % 4  # one image is wrong without faults
    return net, DataLoader(TensorDataset(pictures, labels), batch_size=2)


@torch.no_grad()
@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("layer", ["all", "grouped", "tokens"])
def test_a_stuck_element_does_what_it_does_in_a_product_computed_on_the_array(mapping, layer):
    net, loader = net_and_loader()
    array = Array(2, 3, mapping)
    plan = draw_stuck(array, 10, 1, bits=2, layers=(layer,))
    plan.loc[plan["index"] == 9, "bit"] = [30, 23]  # infinite, or NaN
    found = run_stuck(net, loader, array, plan, image_batch=3)
    images, labels = loader.dataset.tensors
    golden = net(images)
    loss = F.cross_entropy(golden.double(), labels, reduction="none")
    where = {"all": [net.first, net.grouped, net.depthwise, net.tokens, net.head]}.get(layer) or [getattr(net, layer)]
    assert len(found) == 10
    assert (found["images"] == 7).all()
    assert (found["eligible"] == 6).all()
    for fault in found.itertuples():
        mask = int(np.bitwise_or.reduce(1 << plan.loc[plan["index"] == fault.index, "bit"].to_numpy()))
        logits = torch.cat([emulated(net, image, array, fault.neuron, mask, where) for image in images])
        broken = ~logits.isfinite().all(dim=1)
        assert fault.changed == int(((logits.argmax(1) != golden.argmax(1)) | broken).sum())
        assert fault.correct == int(((logits.argmax(1) == labels) & ~broken).sum()) == 6 - fault.lost + fault.gained
        assert fault.nonfinite == int(broken.sum())
        delta = (F.cross_entropy(logits.double(), labels, reduction="none") - loss).abs()
        finite = delta.isfinite()
        assert fault.finite == int(finite.sum())
        assert fault.eligible_finite == int(finite[1:].sum())
        for name, part in (("delta_loss", delta[finite]), ("eligible_delta_loss", delta[1:][finite[1:]])):
            assert np.isclose(
                getattr(fault, name), float(part.mean()) if len(part) else np.nan, rtol=1e-3, atol=1e-5, equal_nan=True
            )


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_elements_share_out_a_layer(mapping, groups):
    array, site = Array(3, 2, mapping), Site("conv", "Conv2d", 0, (8, 3, 3), 8 * 18)
    outputs = [array.outputs(site, element, groups) for element in range(array.elements)]
    weights = np.concatenate([array.weights(site, element, groups) for element in range(array.elements)])
    if mapping == "output_stationary":
        assert sorted(np.concatenate(outputs).tolist()) == list(range(site.neurons))
        assert not len(weights)
    else:
        assert sorted(weights.tolist()) == list(range(site.weights))
        assert all(len(found) == site.neurons // 2 for found in outputs)  # of every second channel


def test_a_run_goes_on_and_is_the_same_in_any_batches(tmp_path, monkeypatch):
    net, loader = net_and_loader()
    array = Array(2, 2)
    plan = draw_stuck(array, 40, 0)
    whole = run_stuck(net, loader, array, plan, image_batch=7)
    run_stuck(net, loader, array, plan, image_batch=2, shard_dir=tmp_path)
    (tmp_path / "stuck-00001.parquet").unlink()
    again = run_stuck(net, loader, array, plan, image_batch=2, shard_dir=tmp_path)
    counts = whole.columns.drop(["delta_loss", "square", "eligible_delta_loss", "eligible_square", "masked"])
    assert whole[counts].equals(again[counts])
    assert np.allclose(whole["delta_loss"], again["delta_loss"], atol=1e-5, equal_nan=True)
    with pytest.raises(CampaignMismatch, match=r"array was .*now"):
        run_stuck(net, loader, Array(4, 1), plan, shard_dir=tmp_path)
    assert draw_stuck(array, 3, 0).equals(plan.iloc[:3])
    many = draw_stuck(array, 2000, 0)
    assert many["bit"].nunique() == 32
    assert many["neuron"].value_counts().between(400, 600).all()


def test_the_model_and_other_layers_stay_as_they_are():
    net, loader = net_and_loader()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    plan = draw_stuck(Array(2, 2, "weight_stationary"), 6, 0, layers=("head", "all"))
    found = run_stuck(net, loader, Array(2, 2, "weight_stationary"), plan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    twice = run_stuck(net, loader, Array(2, 2, "weight_stationary"), plan.iloc[::-1])
    assert twice.iloc[::-1].reset_index(drop=True).equals(found)  # so nothing is left of a fault
    of_head, of_all = (found[found["layer"] == layer].set_index("index") for layer in ("head", "all"))
    assert (of_head["values"] < of_all["values"]).all()
    assert (of_head["neuron"] == of_all["neuron"]).all()


def test_intervals_are_over_faults():
    rng = np.random.default_rng(0)
    lost = (rng.random(4000) < 0.1) * 50

    def of(lost):
        columns = {"images": 100, "masked": 0, "changed": lost, "lost": lost, "gained": 0, "delta_loss": lost / 10}
        return summarise_stuck(pd.DataFrame(columns))

    truth = {"accuracy_lost": 5.0, "changed": 0.05, "delta_loss": 0.5, "critical": 0.1}
    held = dict.fromkeys(truth, 0)
    for _ in range(200):
        found = of(rng.choice(lost, 60))
        for name in held:
            held[name] += found[name].low <= truth[name] <= found[name].high
    assert min(held.values()) >= 194, held
    none = of(np.zeros(20))  # few faults, all harmless, say little
    assert none["critical"].high > 0.15
    assert 0.15 < none["changed"].high < 0.3


REFUSED = {
    "element": ({"neuron": 4}, CampaignMismatch, "neuron 4; there are 4"),
    "bit": ({"bit": 32}, CampaignMismatch, "bit 32; there are 32"),
    "layer": ({"layer": "norm"}, CampaignMismatch, "layer 'norm'; allowed: all, first, grouped"),
}


@pytest.mark.parametrize(("change", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_a_plan_that_does_not_fit_is_refused_in_a_line(change, kind, message):
    net, loader = net_and_loader()
    with pytest.raises(kind, match=message):
        run_stuck(net, loader, Array(2, 2), draw_stuck(Array(2, 2), 2, 0).assign(**change))


def test_what_does_not_run_on_the_array_is_refused_in_a_line():
    net, loader = net_and_loader()
    plan = draw_stuck(Array(2, 2), 2, 0)
    with pytest.raises(InvalidParameter, match="kinds has Activation; of it, as of layer"):
        run_stuck(net, loader, Array(2, 2), plan, kinds=["Conv2d", "Activation"])
    with pytest.raises(InvalidParameter, match="argument rows is 0; at least 1"):
        Array(0, 2)
    with pytest.raises(CampaignMismatch, match="lacks the columns bit"):
        run_stuck(net, loader, Array(2, 2), plan.drop(columns="bit"))


def test_the_drawing_shows_what_an_element_touches():
    assert FILE.read_text(encoding="utf-8") == drawing(), "run 'python tests/array_drawing.py'"
