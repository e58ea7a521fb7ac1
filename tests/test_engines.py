"""The replay engine against PyTorchFI, and against plain hooks, fault by fault."""

import pandas as pd
import pytest
import torch
from torch import nn

from conftest import TINY, settle
from textguard.artifacts import read_parquet, write_parquet
from textguard.errors import CampaignMismatch, UnknownName, UnsupportedModel
from textguard.faults.bits import clamp_to_range, flip_bit
from textguard.faults.campaign import RECORD_COLUMNS, eligible_images, profile_ranges, run_campaign
from textguard.faults.engines import Faults, PyTorchFIEngine, ReplayEngine, make_engine
from textguard.faults.plans import PLAN_COLUMNS, draw_plan
from textguard.vision.classifiers import ClassifierSpec, build_classifier

# Engines add up in different orders: BatchNorm and convolutions of other batch sizes and memory formats.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
EXACT = ["layer", "index", "image", "neuron", "bit", "detected", "mismatch"]


def random_faults(engine, images: int, count: int, limit: float, seed: int = 0) -> Faults:
    draw = torch.Generator().manual_seed(seed)
    position = torch.randint(len(engine.sites), (count,), generator=draw)
    neurons = torch.tensor([site.neurons for site in engine.sites])[position]
    return Faults(
        position=position,
        image=torch.randint(images, (count,), generator=draw),
        neuron=(torch.rand(count, generator=draw) * neurons).long(),
        bit=torch.randint(32, (count,), generator=draw),
        limit=torch.full((count,), limit),
    )


def assert_same(a, b, faults):
    torch.testing.assert_close(a.golden_value, b.golden_value, **TOLERANCE)
    torch.testing.assert_close(a.golden_logits, b.golden_logits, **TOLERANCE)
    assert torch.equal(a.detected, b.detected)
    for outcomes in (a, b):
        expected, _ = clamp_to_range(flip_bit(outcomes.golden_value, faults.bit), faults.limit)
        torch.testing.assert_close(outcomes.faulty_value, expected, equal_nan=True, rtol=0, atol=0)
    # Golden values that lie a rounding apart can lie on two sides of a carry, where one bit flips to values further apart.
    same = torch.isclose(a.faulty_value, b.faulty_value, equal_nan=True, **TOLERANCE)
    assert same.float().mean() > 0.97
    torch.testing.assert_close(a.logits[same], b.logits[same], equal_nan=True, **TOLERANCE)


@pytest.mark.parametrize("tiny_model", ["resnet", "mobilenet"], indirect=True)  # for PyTorchFI, windows would be images
@pytest.mark.parametrize("limit", [2.0, 65536.0])
def test_replay_and_pytorchfi_agree_fault_by_fault(tiny_model, images, limit):
    replay, reference = ReplayEngine(tiny_model, images[0], 32), PyTorchFIEngine(tiny_model, images[0], 16)
    assert [(site.layer, site.kind, site.position) for site in replay.sites] == [
        (site.layer, site.kind, site.position) for site in reference.sites
    ]
    faults = random_faults(replay, len(images), 200, limit)
    assert_same(replay.run(images, faults), reference.run(images, faults), faults)


@pytest.mark.parametrize(("backbone", "width", "size"), [("resnet18", 16, 32), ("mobilenet_v2", 0, 32), ("alexnet", 16, 64)])
def test_engines_agree_on_real_backbones(backbone, width, size):
    torch.manual_seed(0)
    spec = ClassifierSpec("none", backbone, "random" if width else "baseline", size, width, tuple("abcde"))
    model = build_classifier(spec).eval()
    pictures = torch.randn(4, 3, size, size)
    engines = [ReplayEngine(model, pictures[0], 16), PyTorchFIEngine(model, pictures[0], 64)]
    assert engines[0].sites == engines[1].sites
    faults = random_faults(engines[0], 4, 64, 10.0)
    # Half of the faults in the linear layers, where most of the damage is done.
    linear = [site.position for site in engines[0].sites if site.kind == "Linear"]
    faults.position[::2] = linear[-1]
    faults.neuron[::2] %= engines[0].sites[linear[-1]].neurons
    assert_same(*(engine.run(pictures, faults) for engine in engines), faults)


def inject_with_a_hook(model: nn.Module, image: torch.Tensor, layer: str, neuron: int, bit: int, limit: float) -> torch.Tensor:
    """The slow twin: one image, one fault, one whole forward pass."""

    def hook(module, inputs, output):
        flat = output.clone().reshape(-1)
        flat[neuron] = clamp_to_range(flip_bit(flat[neuron : neuron + 1], torch.tensor([bit])), torch.tensor([limit]))[0][0]
        return flat.reshape(output.shape)

    handle = model.get_submodule(layer).register_forward_hook(hook)
    with torch.inference_mode():
        logits = model(image[None])
    handle.remove()
    return logits[0]


def test_replay_agrees_with_one_hook_per_fault(tiny_model, images):
    engine = ReplayEngine(tiny_model, images[0], 16)
    faults = random_faults(engine, len(images), 60, 3.0)
    outcomes = engine.run(images, faults)
    for i in range(60):
        layer = engine.sites[faults.position[i]].layer
        expected = inject_with_a_hook(
            tiny_model, images[faults.image[i]], layer, int(faults.neuron[i]), int(faults.bit[i]), 3.0
        )
        torch.testing.assert_close(outcomes.logits[i], expected, equal_nan=True, **TOLERANCE)


def test_results_do_not_depend_on_batch_size_or_order(tiny_model, images):
    faults = random_faults(ReplayEngine(tiny_model, images[0], 8), len(images), 150, 3.0)
    reference = ReplayEngine(tiny_model, images[0], 1).run(images, faults)
    for batch_size in (7, 64, 1000):
        assert_same(ReplayEngine(tiny_model, images[0], batch_size).run(images, faults), reference, faults)
    shuffle = torch.randperm(150, generator=torch.Generator().manual_seed(3))
    shuffled = ReplayEngine(tiny_model, images[0], 64).run(images, faults[shuffle])
    torch.testing.assert_close(shuffled.logits, reference.logits[shuffle], equal_nan=True, **TOLERANCE)


def test_the_model_and_the_images_are_left_alone(tiny_model, images):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    pictures = images.clone()
    golden = tiny_model(images).detach()
    for kind in (ReplayEngine, PyTorchFIEngine):
        engine = kind(tiny_model, images[0], 16)
        if not isinstance(tiny_model, TINY["transformer"]):
            engine.run(images, random_faults(engine, len(images), 40, 3.0))
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model.state_dict().items())
    assert torch.equal(pictures, images)
    assert torch.equal(tiny_model(images), golden)


def test_faults_that_relu_hides_end_with_the_golden_logits(resnet, images):
    engine = ReplayEngine(resnet, images[0], 64)
    position = next(site.position for site in engine.sites if site.layer == "conv1")
    faults = random_faults(engine, len(images), 64, 3.0)
    faults.position[:] = position
    faults.neuron[:] %= engine.sites[position].neurons
    faults.bit[:] = 0  # the lowest mantissa bit: it never changes the sign, so ReLU hides it wherever BatchNorm is negative
    outcomes = engine.run(images, faults)
    unchanged = (outcomes.logits == outcomes.golden_logits[faults.image]).all(dim=1)
    assert int(unchanged.sum()) > 10


def test_faults_that_in_place_additions_carry_on_are_not_dropped_or_the_model_is_refused(images):
    class Residual(nn.Module):
        def __init__(self, add):
            super().__init__()
            self.add = add
            self.stem = nn.Conv2d(3, 4, 3, padding=1)
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            kept = self.stem(x)
            total = self.add(kept, self.conv(kept))
            hidden = torch.relu(total - 100)  # hides every fault
            return self.fc(torch.cat([hidden.mean(dim=(2, 3)), kept.mean(dim=(2, 3))], dim=1))

    def add_as_python_does(kept, more):
        total = kept
        total += more  # changes `kept`; torch.fx traces it as an addition that does not
        return total

    torch.manual_seed(0)
    with pytest.raises(UnsupportedModel, match="other outputs than the model"):
        ReplayEngine(Residual(add_as_python_does).eval(), images[0], 64)
    model = Residual(lambda kept, more: kept.add_(more)).eval()
    engine = ReplayEngine(model, images[0], 64)
    faults = random_faults(engine, len(images), 40, 50.0)
    faults.position[:] = 1
    faults.neuron[:] %= engine.sites[1].neurons
    faults.bit[:] = 30
    outcomes = engine.run(images, faults)
    for i in range(40):
        expected = inject_with_a_hook(model, images[faults.image[i]], "conv", int(faults.neuron[i]), 30, 50.0)
        torch.testing.assert_close(outcomes.logits[i], expected, **TOLERANCE)


def test_windows_in_the_batch_dimension_belong_to_their_image(images):
    torch.manual_seed(0)
    engine = ReplayEngine(settle(TINY["transformer"]()), images[0], 8)
    shapes = {site.layer: site.shape for site in engine.sites}
    assert shapes == {"patches": (8, 4, 4), "mix": (4, 4, 8), "head": (4,)}


def test_a_layer_called_twice_is_two_sites(images):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            return self.fc(self.conv(self.conv(x).relu()).mean(dim=(2, 3)))

    model = Twice().eval()
    assert [site.layer for site in ReplayEngine(model, images[0], 4).sites] == ["conv", "conv#2", "fc"]
    with pytest.raises(UnsupportedModel, match="called once"):
        PyTorchFIEngine(model, images[0], 4)


def test_models_that_cannot_be_used_say_why(images):
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedModel, match="cannot be traced"):
        ReplayEngine(Branching(), images[0], 4)
    with pytest.raises(UnsupportedModel, match="no Conv2d or Linear"):
        ReplayEngine(nn.Sequential(nn.Flatten()), images[0], 4)
    with pytest.raises(UnknownName, match="pytorchfi, replay"):
        make_engine("goldeneye", nn.Linear(1, 1), images[0], 4)


def campaign(model, images, tmp_path=None, engine="replay", image_batch=3, batch_size=16, per_layer=20):
    labels = model(images).argmax(dim=1)
    runner = make_engine(engine, model, images[0], batch_size)
    plan = draw_plan(runner.sites, eligible_images(model, images, labels, 5), per_layer, seed=4)
    ranges = profile_ranges(model, images, 5)
    limits = dict(zip(ranges["layer"], ranges["max_abs"], strict=True))
    return run_campaign(runner, images, labels, plan, limits, image_batch=image_batch, shard_dir=tmp_path)


def assert_same_records(a: pd.DataFrame, b: pd.DataFrame):
    assert list(a.columns) == RECORD_COLUMNS
    pd.testing.assert_frame_equal(a[EXACT], b[EXACT])
    pd.testing.assert_frame_equal(a, b, rtol=1e-3, atol=1e-5)


def test_a_campaign_gives_the_same_records_for_any_batching_and_both_engines(resnet, images):
    reference = campaign(resnet, images, engine="pytorchfi")
    for image_batch, batch_size in ((1, 1), (5, 7), (100, 1000)):
        assert_same_records(campaign(resnet, images, image_batch=image_batch, batch_size=batch_size), reference)


def test_both_engines_replay_a_saved_plan(resnet, images, tmp_path):
    labels = resnet(images).argmax(dim=1)
    sites = make_engine("replay", resnet, images[0], 8).sites
    drawn = draw_plan(sites, range(12), 15, seed=2)
    write_parquet(tmp_path / "plan.parquet", drawn)
    plan = read_parquet(tmp_path / "plan.parquet", "inject", PLAN_COLUMNS)
    pd.testing.assert_frame_equal(plan, drawn)
    limits = {site.layer: 65536.0 for site in sites}
    replay, reference = (
        run_campaign(make_engine(name, resnet, images[0], 8), images, labels, plan, limits, image_batch=5)
        for name in ("replay", "pytorchfi")
    )
    pd.testing.assert_frame_equal(replay[PLAN_COLUMNS], plan)
    assert_same_records(replay, reference)


def test_a_campaign_goes_on_from_its_shards_and_mends_a_damaged_one(resnet, images, tmp_path):
    undisturbed = campaign(resnet, images, tmp_path)
    shards = sorted(tmp_path.iterdir())
    assert len(shards) == 4
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:100])
    kept = shards[2].stat().st_mtime_ns
    again = campaign(resnet, images, tmp_path)
    pd.testing.assert_frame_equal(again, undisturbed)
    assert sorted(tmp_path.iterdir()) == shards
    assert shards[2].stat().st_mtime_ns == kept


def test_a_plan_of_another_model_is_refused(resnet, images):
    engine = make_engine("replay", resnet, images[0], 4)
    plan = draw_plan(engine.sites, [0, 1], 2, seed=0)
    labels = torch.zeros(len(images), dtype=torch.int64)
    limits = {site.layer: 1.0 for site in engine.sites}
    for column, value in (("neuron", 10**6), ("image", len(images)), ("bit", 32)):
        with pytest.raises(CampaignMismatch, match=column):
            run_campaign(engine, images, labels, plan.assign(**{column: value}), limits, image_batch=4)
    with pytest.raises(CampaignMismatch, match="'other'"):
        run_campaign(engine, images, labels, plan.assign(layer="other"), limits, image_batch=4)


def test_profiled_ranges_are_the_layers_extremes(tiny_model, images):
    ranges = profile_ranges(tiny_model, images, 5).set_index("layer")
    outputs = {}
    for name, module in tiny_model.named_modules():
        if name in ranges.index:
            # A copy: what follows may change the output in place.
            module.register_forward_hook(lambda module, inputs, output, name=name: outputs.update({name: output.clone()}))
    with torch.inference_mode():
        tiny_model(images)
    for name, output in outputs.items():
        assert ranges.loc[name, "max_abs"] == pytest.approx(float(output.abs().max()), rel=1e-5)
        assert ranges.loc[name, "mean_abs"] == pytest.approx(float(output.abs().double().mean()), rel=1e-5)
    assert outputs.keys() == set(ranges.index)
