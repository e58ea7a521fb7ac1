"""The replay engine against two that run the whole network, and against plain hooks, fault by fault."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conftest import TINY, settle
from fault_helpers import OFF, TOLERANCE, assert_same, close, make_constant, make_faults, random_faults
from textguard.errors import UnknownName, UnsupportedModel
from textguard.faults.damage import SINGLE_FLIP, Faults
from textguard.faults.detectors import clamp_to_range
from textguard.faults.engines import ENGINES, PyTorchFIEngine, ReplayEngine, WholeEngine, make_engine
from textguard.vision.classifiers import ClassifierSpec, build_classifier

LIMITS = (2.0, 65536.0, OFF)  # of the range detector


# Tiny models and real backbones, on all engines.


@pytest.mark.parametrize("limit", LIMITS)
def test_engines_agree_fault_by_fault(tiny_model, images, limit):
    for module in tiny_model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            make_constant(module, 0, 1.0)
            make_constant(module, 1, -1.5)
    replay, whole = ReplayEngine(tiny_model, images[0], 32), WholeEngine(tiny_model, images[0], 16)
    assert replay.sites == whole.sites
    faults = random_faults(replay, len(images), 400, limit, bits=(*range(32), *[30] * 8))
    outcomes = replay.run(images, faults)
    assert_same(outcomes, whole.run(images, faults), faults)
    if not isinstance(tiny_model, TINY["transformer"]):  # PyTorchFI would take its windows for images
        reference = PyTorchFIEngine(tiny_model, images[0], 16)
        assert reference.sites == whole.sites
        assert_same(outcomes, reference.run(images, faults), faults)
    assert outcomes.detected.any() == (limit != OFF)
    for kind in (torch.isnan, torch.isinf):
        assert kind(outcomes.faulty_value).any() == (limit == OFF)


class NarrowVGG(nn.Module):
    """torchvision's vgg16_bn, an eighth as wide."""

    def __init__(self):
        super().__init__()
        from torchvision.models.vgg import cfgs, make_layers

        self.features = make_layers([size if size == "M" else size // 8 for size in cfgs["D"]], batch_norm=True)
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Linear(64 * 4, 128),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(128, 128),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(128, 5),
        )

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def backbone(name, size):
    torch.manual_seed(0)
    if name == "vgg16_bn":
        model = NarrowVGG()
    else:
        variant, width = ("baseline", 0) if name == "mobilenet_v2" else ("random", 16)
        model = build_classifier(ClassifierSpec("none", name, variant, size, size, "bilinear", width, tuple("abcde")))
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        with torch.no_grad():  # without statistics of its own, hardly a fault would reach a deep network's logits
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 1.0
            model.train()(torch.randn(16, 3, size, size))
    return model.eval(), torch.randn(4, 3, size, size)


@pytest.mark.parametrize(("name", "size"), [("resnet18", 32), ("mobilenet_v2", 32), ("alexnet", 64), ("vgg16_bn", 32)])
def test_engines_agree_on_real_backbones(name, size):
    model, pictures = backbone(name, size)
    engines = [
        ReplayEngine(model, pictures[0], 32),
        WholeEngine(model, pictures[0], 32),
        PyTorchFIEngine(model, pictures[0], 64),
    ]
    assert engines[0].sites == engines[1].sites == engines[2].sites
    linear = [site.layer for site in engines[0].sites if site.kind == "Linear"]
    for limit in LIMITS:
        # Every layer twice, and the linear ones, where most of the damage is done, more often.
        layers = [site.layer for site in engines[0].sites] * 2 + linear * (8 // len(linear))
        faults = random_faults(engines[0], 4, len(layers), limit, layers)
        first, *others = (engine.run(pictures, faults) for engine in engines)
        for other in others:
            assert_same(first, other, faults, least=0.8)
        assert (~close(first.logits, first.golden_logits[faults.image])).float().mean() > 0.2  # most of the bits are low


# A twin that shares no code with the engines.


def inject_with_a_hook(model: nn.Module, image: torch.Tensor, layer: str, neuron: int, bit: int, limit: float) -> torch.Tensor:
    """The slow twin: one image, one fault, one whole forward pass."""

    def hook(module, inputs, output):
        flat = output.clone().reshape(-1)
        word = flat[neuron : neuron + 1].view(torch.int32)
        word ^= torch.tensor(1 << bit).to(torch.int32)
        flat[neuron] = clamp_to_range(flat[neuron : neuron + 1], torch.tensor([limit]))[0][0]
        return flat.reshape(output.shape)

    handle = model.get_submodule(layer).register_forward_hook(hook)
    with torch.no_grad():
        logits = model(image.clone()[None])
    handle.remove()
    return logits[0]


def assert_hooks_agree(model, images, engine, faults):
    """An engine's logits are those of one hook per fault. The detector's limit must be finite."""
    outcomes = engine.run(images, faults)
    for i in range(len(faults.position)):
        layer, bit = engine.sites[faults.position[i]].layer, int(faults.mask[i]).bit_length() - 1
        logits = inject_with_a_hook(model, images[faults.image[i]], layer, int(faults.neuron[i]), bit, float(faults.limit[i]))
        torch.testing.assert_close(
            outcomes.logits[i], logits, equal_nan=True, **TOLERANCE, msg=f"fault {i} in {layer}, bit {bit}"
        )
    return outcomes


@pytest.mark.parametrize("name", ["replay", "whole"])
def test_engines_agree_with_one_hook_per_fault(tiny_model, images, name):
    engine = make_engine(name, tiny_model, images[0], 16)
    faults = random_faults(engine, len(images), 90, 3.0)
    outcomes = assert_hooks_agree(tiny_model, images, engine, faults)
    assert (~close(outcomes.logits, outcomes.golden_logits[faults.image])).sum() > 20


def test_results_do_not_depend_on_batch_size_or_order(tiny_model, images):
    faults = random_faults(ReplayEngine(tiny_model, images[0], 8), len(images), 150, 3.0)
    reference = ReplayEngine(tiny_model, images[0], 1).run(images, faults)
    for batch_size in (7, 64, 1000):
        assert_same(ReplayEngine(tiny_model, images[0], batch_size).run(images, faults), reference, faults)
    shuffle = torch.randperm(150, generator=torch.Generator().manual_seed(3))
    for name in ("replay", "whole"):
        engine = make_engine(name, tiny_model, images[0], 64)
        columns = (faults.position[shuffle], faults.image[shuffle], faults.limit[shuffle], faults.row)
        shuffled = engine.run(images, Faults(SINGLE_FLIP, *columns, faults.neuron[shuffle], faults.mask[shuffle]))
        torch.testing.assert_close(shuffled.golden_value, reference.golden_value[shuffle], **TOLERANCE)
        torch.testing.assert_close(shuffled.logits, reference.logits[shuffle], equal_nan=True, **TOLERANCE)


# Faults that leave no trace.


def test_faults_that_relu_hides_are_masked_and_end_with_the_golden_logits(resnet, images):
    replay, whole = ReplayEngine(resnet, images[0], 64), WholeEngine(resnet, images[0], 64)
    # A low mantissa bit never changes the sign: ReLU hides it wherever BatchNorm is negative, and nowhere else.
    faults = random_faults(replay, len(images), 200, 3.0, ["conv1"], bits=[12])
    outcomes = replay.run(images, faults)
    normalised = resnet.norm1(resnet.conv1(resnet.stem(images))).flatten(1)[faults.image, faults.neuron]
    assert 50 < (normalised < -1e-2).sum() < 150
    assert outcomes.masked[normalised < -1e-2].all()
    assert not outcomes.masked[normalised > 1e-2].any()
    assert torch.equal(outcomes.logits[outcomes.masked], outcomes.golden_logits[faults.image[outcomes.masked]])
    assert_same(outcomes, whole.run(images, faults), faults)


class PreActivation(nn.Module):
    """The value behind `stem` is read by ReLU and by the shortcut around it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.fc((x + self.conv(F.relu(x))).mean(dim=(2, 3)))


def test_faults_that_a_second_reader_carries_on_are_not_masked(images):
    torch.manual_seed(0)
    model = PreActivation().eval()
    engine = ReplayEngine(model, images[0], 64)
    negative = (model.stem(images) < -0.1).flatten(1).nonzero()[:200:4]
    count = len(negative)
    # Bit 23 changes the exponent by one: a negative number stays negative, and ReLU still gives 0.
    faults = make_faults([0] * count, negative[:, 0], negative[:, 1], 1 << 23, 50.0)
    outcomes = assert_hooks_agree(model, images, engine, faults)
    assert not outcomes.masked.any()
    assert (outcomes.logits != outcomes.golden_logits[faults.image]).any(dim=1).float().mean() > 0.9


def test_values_that_nothing_reads_mask_their_faults(images):
    class Unread(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.extra, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 4)

        def forward(self, x):
            x = self.stem(x)
            self.extra(x).relu()
            return self.fc(x.mean(dim=(2, 3)))

    torch.manual_seed(0)
    model = Unread().eval()
    engine = ReplayEngine(model, images[0], 16)
    faults = random_faults(engine, len(images), 60, 50.0)
    outcomes = assert_hooks_agree(model, images, engine, faults)
    assert outcomes.masked[faults.position == 1].all()
    assert not outcomes.masked[faults.position == 2].any()


# Models that the replay engine refuses, and those that it would get wrong if it did not look closely.


class Carrying(nn.Module):
    """`kept` is read again after an addition that may have changed it, and that hides every fault."""

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


class Branching(nn.Module):
    """Which way it goes depends on the values of each batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x):
        x = self.conv(x).mean(dim=(2, 3))
        if x.isnan().any() or x.abs().max() > 1e6:
            x = x.nan_to_num().clamp(-1e6, 1e6)
        return self.fc(x)


def through_a_view(kept, more):
    total = kept.transpose(2, 3)  # of which torch.export knows no way to write into a part
    total += more.transpose(2, 3)
    return total.transpose(2, 3)


@pytest.mark.parametrize("add", [lambda kept, more: kept.add_(more), add_as_python_does])
def test_values_changed_in_place_are_new_values_for_whoever_reads_them_later(add, images):
    torch.manual_seed(0)
    model = Carrying(add).eval()
    engine = ReplayEngine(model, images[0], 8)
    faults = random_faults(engine, len(images), 60, 50.0, bits=[30])
    outcomes = assert_hooks_agree(model, images, engine, faults)
    assert (~close(outcomes.logits, outcomes.golden_logits[faults.image])).float().mean() > 0.5


REFUSED = {
    "view": (lambda: Carrying(through_a_view), "other outputs than the model"),
    "branching": (Branching, "cannot be traced"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_replayed_are_run_whole_and_a_line_says_so(name, images, capsys):
    build, reason = REFUSED[name]
    torch.manual_seed(0)
    model = build().eval()
    with pytest.raises(UnsupportedModel, match=reason):
        ReplayEngine(model, images[0], 8)
    capsys.readouterr()
    engine = make_engine("replay", model, images[0], 8)
    captured = capsys.readouterr()
    assert isinstance(engine, WholeEngine)
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "going on with 'whole'" in captured.err
    assert reason in captured.err
    faults = random_faults(engine, len(images), 60, 50.0, bits=[30])
    outcomes = assert_hooks_agree(model, images, engine, faults)
    assert not outcomes.masked.any()
    assert (~close(outcomes.logits, outcomes.golden_logits[faults.image])).float().mean() > 0.5


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

    torch.manual_seed(0)
    model = Twice().eval()
    engines = [ReplayEngine(model, images[0], 4), WholeEngine(model, images[0], 16)]
    assert all([site.layer for site in engine.sites] == ["conv", "conv#2", "fc"] for engine in engines)
    faults = random_faults(engines[0], len(images), 60, OFF)
    assert_same(*(engine.run(images, faults) for engine in engines), faults)
    with pytest.raises(UnsupportedModel, match="called once"):
        PyTorchFIEngine(model, images[0], 4)


@pytest.mark.parametrize("name", ["replay", "whole"])
def test_weights_that_no_site_stands_for_are_listed(name, images):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 4, stride=4)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.memory = nn.LSTM(8, 8, batch_first=True)
            self.scale = nn.Bilinear(8, 8, 8)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = self.memory(self.attention(x, x, x, need_weights=False)[0])[0].mean(dim=1)
            return self.head(self.scale(x, x))

    engine = make_engine(name, Attending().eval(), images[0], 4)
    found = {site.layer for site in engine.sites}
    skipped = dict(engine.skipped)
    assert {"patches", "head"} <= found
    for layer in ("attention", "memory", "scale"):
        assert layer in found or any(known == layer and reason for known, reason in skipped.items()), (layer, found, skipped)


def test_engines_that_cannot_be_used_say_why(images):
    with pytest.raises(UnknownName, match="pytorchfi, replay, whole"):
        make_engine("goldeneye", nn.Linear(1, 1), images[0], 4)
    for name in ("replay", "whole"):
        with pytest.raises(UnsupportedModel, match="no Conv1d or Conv2d or Conv3d or Linear"):
            make_engine(name, nn.Sequential(nn.Flatten(), nn.BatchNorm1d(768)).eval(), images[0], 4)
    with pytest.raises(UnsupportedModel, match="fp32 neurons"):
        make_engine("pytorchfi", TINY["resnet"](), images[0], 4, target="weight")


def test_settings_are_the_same_for_the_same_weights_and_no_others(resnet, images):
    first = make_engine("replay", resnet, images[0], 4).settings
    assert make_engine("replay", resnet, images[0], 64).settings == first
    assert make_engine("whole", resnet, images[0], 4).settings["model"] == first["model"]
    with torch.no_grad():
        resnet.fc.bias[0] += 1e-3
    assert make_engine("replay", resnet, images[0], 4).settings["model"] != first["model"]


class Normalising(nn.Module):
    """Statistics of the batch: images change each other."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).mean(dim=(2, 3)))


class Naming(nn.Module):
    """A dictionary instead of logits."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * 16 * 16, 4)

    def forward(self, x):
        return {"logits": self.fc(x.flatten(1))}


@pytest.mark.parametrize(("model", "reason"), [(Normalising, "norm normalises over the batch"), (Naming, "returns a dict")])
@pytest.mark.parametrize("engine", [ReplayEngine, WholeEngine])
def test_models_whose_images_or_outputs_cannot_be_told_apart_are_refused(engine, model, reason, images):
    with pytest.raises(UnsupportedModel, match=reason):
        engine(model().eval(), images[0], 8)


class Choosing(nn.Module):
    """Other layers for bright images."""

    def __init__(self):
        super().__init__()
        self.dark, self.bright = nn.Linear(3 * 16 * 16, 4), nn.Linear(3 * 16 * 16, 4)

    def forward(self, x):
        return (self.bright if x.abs().max() > 20 else self.dark)(x.flatten(1))


def test_a_model_that_runs_other_layers_for_other_images_is_refused(images):
    engine = WholeEngine(Choosing().eval(), images[0], 8)
    engine.observe(images)
    with pytest.raises(UnsupportedModel, match="other operations for other images"):
        engine.observe(images * 100)


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_shows_the_outputs_of_its_sites(resnet, images, name):
    reference, engine = (make_engine(each, resnet, images[0], 4) for each in ("whole", name))
    seen = {reference: {}, engine: {}}
    logits = [
        each.observe(images, lambda position, output, each=each: seen[each].update({position: output.clone()}))
        for each in (reference, engine)
    ]
    assert [site.layer for site in engine.sites] == [site.layer for site in reference.sites]
    torch.testing.assert_close(seen[engine], seen[reference])
    torch.testing.assert_close(logits[1], logits[0])
