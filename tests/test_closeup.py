"""Where a classifier looks under faults, against whole inferences with hooks; and weights that are put back bit for bit."""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from conftest import TinyResNet, settle
from textguard.closeup import (
    POWERS,
    CamModel,
    OneFault,
    count_magnitudes,
    find_place,
    mean_over_images,
    one_fault,
    worst_injection,
)
from textguard.errors import InvalidParameter, UnsupportedModel
from textguard.estimates.maps import overlap, rank_correlation
from textguard.faults.damage import SINGLE_FLIP, FaultModel
from textguard.faults.engines import make_engine
from textguard.faults.formats import FP32, parse_format
from textguard.faults.graph import TracedModel
from textguard.faults.profiling import loader_of
from textguard.vision.backbones import build_backbone

KINDS = ("Conv2d", "Linear")


def cam_of(model: nn.Module, images: Tensor, smallest: int = 4, number_format=FP32, profiled: dict | None = None) -> CamModel:
    return CamModel(model, images[0], KINDS, number_format, profiled or {}, smallest)


def flip(values: Tensor, place: int, bit: int) -> None:
    """Flip one bit of a contiguous float32 tensor, in place."""
    words = values.view(-1).view(torch.int32)
    words[place] ^= -(2**31) if bit == 31 else 1 << bit


def maps_by_hooks(model: nn.Module, layer: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Ablation-CAM as it is defined: one whole inference for every channel. Whatever hooks the model has stay in force."""
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    score = model(images).gather(1, classes[:, None])
    hook.remove()
    drops = []
    for channel in range(seen[0].shape[1]):

        def ablate(module: nn.Module, inputs: tuple, output: Tensor, channel: int = channel) -> Tensor:
            output = output.clone()
            output[:, channel] = 0
            return output

        hook = layer.register_forward_hook(ablate)
        drops.append(score - model(images).gather(1, classes[:, None]))
        hook.remove()
    return torch.einsum("nk,nkhw->nhw", torch.cat(drops, dim=1), seen[0])


@pytest.fixture
def classes(images) -> Tensor:
    return torch.arange(len(images)) % 4


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_channel_counts_by_how_much_the_logit_falls(batch_size):
    """On a mean over places and a linear layer without bias, that is head[k] * mean(channel k), by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4, bias=False))
    images = torch.rand(2, 3, 6, 6)
    with torch.no_grad():
        activation = model[:2](images)
        drop = model[4].weight[[1, 3]] * activation.mean(dim=(2, 3))
        expected = (drop[:, :, None, None] * activation).sum(dim=1)
    looks = cam_of(model, images).look(images, torch.tensor([1, 3]), batch_size)
    torch.testing.assert_close(looks.maps, expected)
    torch.testing.assert_close(looks.logits, model(images).detach())


@pytest.mark.parametrize("site", ["stem.0", "conv2", "fc"])
@torch.no_grad()
def test_maps_under_a_fault_are_those_of_whole_inferences_with_hooks(images, classes, site):
    """The fault lies before, at, and behind the place of the maps."""
    model = settle(TinyResNet())
    cam = cam_of(model, images, smallest=8)
    assert (cam.place.name, cam.place.side) == ("act", 8)
    position = [found.layer for found in cam.sites].index(site)
    fault = OneFault(SINGLE_FLIP, position, torch.tensor([2]), torch.tensor([1 << 28]), math.inf)

    def damage(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        output = output.clone()
        for image in output:
            flip(image, 2, 28)
        return output

    golden = cam.look(images, classes, 64)
    faulty = cam.look(images, classes, 64, fault)
    hook = model.get_submodule(site).register_forward_hook(damage)
    try:
        # `act` is called twice; the pictures are made behind the second call, whose input is what conv2 and stem add up to.
        expected = maps_by_hooks(model, LastCall(model), images, classes)
        logits = model(images)
    finally:
        hook.remove()
    torch.testing.assert_close(faulty.logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(faulty.maps, expected, rtol=1e-3, atol=1e-4)
    assert not torch.equal(faulty.maps, golden.maps)


class LastCall(nn.Module):
    """Stands for TinyResNet's second call of `act`: registers hooks that act on that call alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = [model]

    def register_forward_hook(self, hook: Callable) -> torch.utils.hooks.RemovableHandle:
        calls = 0

        def second(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
            nonlocal calls
            calls += 1
            return hook(module, inputs, output) if calls % 2 == 0 else None

        return self._model[0].act.register_forward_hook(second)


def test_maps_are_those_of_grad_cam():
    """Theirs are divided by the logit."""
    grad_cam = pytest.importorskip(
        "pytorch_grad_cam", reason="grad-cam is not installed: `pip install grad-cam` to run this test"
    )
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")

    class Kept(grad_cam.AblationCAM):
        def get_cam_image(self, *call: object) -> np.ndarray:
            self.kept = super().get_cam_image(*call)
            return self.kept

    torch.manual_seed(0)
    model = settle(build_backbone("resnet18", 4, 32))
    images, classes = torch.rand(3, 3, 32, 32), torch.tensor([2, 0, 3])
    looks = cam_of(model, images).look(images, classes, 64)
    theirs = Kept(model, [model.layer2[-1]])
    theirs(images, [targets.ClassifierOutputTarget(label) for label in classes.tolist()])
    score = looks.logits.gather(1, classes[:, None])[:, :, None].numpy()
    np.testing.assert_allclose(looks.maps.numpy(), theirs.kept * score, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_other_batch_sizes_give_the_same_maps(images, classes):
    cam = cam_of(settle(TinyResNet()), images)
    whole = cam.look(images, classes, 256)
    parts = [cam.look(images[start : start + 5], classes[start : start + 5], 3) for start in range(0, len(images), 5)]
    torch.testing.assert_close(torch.cat([part.maps for part in parts]), whole.maps, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_number_format_holds_for_maps_too(images, classes):
    """Every site's output is rounded: the logits are those of the engine that runs campaigns."""
    model, number_format = settle(TinyResNet()), parse_format("fp16")
    profiled = dict.fromkeys(["stem.0", "conv1", "conv2", "fc"], 9.0)
    engine = make_engine("replay", model, images[0], 64, kinds=KINDS, number_format=number_format, profiled=profiled)
    cam = cam_of(model, images, number_format=number_format, profiled=profiled)
    found = cam.look(images, classes, 64).logits
    torch.testing.assert_close(found, engine.observe(images), rtol=1e-3, atol=1e-4)
    assert not torch.equal(found, model(images))


def snapshot(cam: CamModel) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in cam._traced.model.state_dict().items()}


def damaged_weights(before: dict[str, bytes], after: dict[str, bytes]) -> pd.DataFrame:
    """Parameter, place and changed bits of every word that differs."""
    rows = []
    for name in before:
        old, new = (np.frombuffer(state[name], dtype=np.uint8) for state in (before, after))
        if len(old) % 4 == 0:
            changed = old.view(np.uint32) ^ new.view(np.uint32)
            rows += [{"parameter": name, "place": at, "mask": int(changed[at])} for at in np.flatnonzero(changed)]
    return pd.DataFrame(rows)


def test_flipped_weights_are_restored_bit_for_bit(images, classes):
    cam = cam_of(settle(TinyResNet()), images)
    before = snapshot(cam)
    flips = cam.draw_flips(200, 1, seed=3)
    with cam.flipped(flips, lambda weight: math.inf):
        inside = snapshot(cam)
        cam.look(images, classes, 64)
    key = ["parameter", "place"]
    found = damaged_weights(before, inside).sort_values(key).reset_index(drop=True)
    pd.testing.assert_frame_equal(found, flips.sort_values(key).reset_index(drop=True), check_dtype=False)
    assert snapshot(cam) == before
    with pytest.raises(RuntimeError), cam.flipped(flips, lambda weight: math.inf):
        cam.look(images[:, :, :1], classes, 64)
    assert snapshot(cam) == before


def test_weights_that_a_detector_sees_become_its_limit(images):
    cam = cam_of(settle(TinyResNet()), images)
    parameters = dict(cam._traced.model.named_parameters())
    flips = cam.draw_flips(300, 1, seed=0)
    flips["mask"] = 1 << 30
    most = {name: float(parameters[name].detach().abs().max()) for name in flips["parameter"].unique()}
    with cam.flipped(flips, lambda weight: float(weight.abs().max())):
        for name, own in flips.groupby("parameter"):
            values = parameters[name].detach().view(-1)[torch.tensor(own["place"].to_numpy())]
            assert values.abs().max() == most[name]


def test_variants_get_the_same_weight_flips_before_their_last_layers(images):
    """They differ in the width of the backbone's last layer, and one has a head behind it."""
    guided = nn.Sequential()
    guided.add_module("backbone", TinyResNet(classes=9))
    guided.add_module("head", nn.Linear(9, 4, bias=False))
    drawn = cam_of(TinyResNet(), images).draw_flips(150, 1, seed=5)
    others = cam_of(guided, images).draw_flips(150, 2, seed=5)
    pd.testing.assert_frame_equal(drawn.assign(parameter="backbone." + drawn["parameter"]), others)
    assert not drawn[["parameter", "place"]].duplicated().any()
    assert "fc.weight" not in set(drawn["parameter"])
    assert not drawn.equals(cam_of(TinyResNet(), images).draw_flips(150, 1, seed=6))


def test_more_flips_than_weights_are_refused(images):
    with pytest.raises(InvalidParameter, match=r"argument weight_flips is 9999, and there are 1368 weights"):
        cam_of(TinyResNet(), images).draw_flips(9999, 1, seed=0)
    additions = CamModel(TinyResNet(), images[0], ("Add",), FP32, {}, 4)
    assert additions.draw_flips(9999, 0, seed=0).empty


# One of each family at its own size: the last block's output, before pooling.
PLACES = {
    "alexnet": (6, "avgpool"),
    "vgg16_bn": (7, "avgpool"),
    "resnet50": (7, "layer4.2.relu"),
    "mobilenet_v2": (7, "features.18.2"),
    "maxvit_t": (7, "blocks.3.layers.1.layers.grid_attention.departition_op.reshape"),
    "swin_v2_t": (7, "permute.permute"),
    "focalnet_t": (7, "norm.permute"),
}


@pytest.mark.parametrize("name", PLACES)
def test_maps_of_every_family_are_made_before_its_pooling(name):
    image = torch.rand(3, 224, 224)
    traced = TracedModel(build_backbone(name, 10, 224).eval(), image)
    with torch.inference_mode():
        place = find_place(traced, image, 4)
    assert (place.side, place.name, place.layout) == (*PLACES[name], "channels_first")


def place_of(model: nn.Module, smallest: int, size: int) -> tuple[int, str]:
    image = torch.rand(3, size, size)
    with torch.inference_mode():
        place = find_place(TracedModel(model.eval(), image), image, smallest)
    return place.side, place.layout


def test_tokens_and_channels_may_lie_as_they_do():
    assert place_of(build_backbone("torchvision:vit_b_32", 10, 224), 4, 224) == (7, "tokens")
    assert place_of(build_backbone("swin_v2_t", 10, 32), 4, 32) == (4, "channels_last")


def test_a_smaller_map_is_taken_where_it_is_asked_for():
    network = build_backbone("resnet18", 10, 32)
    assert [place_of(network, smallest, 32)[0] for smallest in (2, 3, 4, 5, 8, 9)] == [2, 4, 4, 8, 8, 16]


class Upsampled(nn.Module):
    """Puts out a large map that is a small one, blown up."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Conv2d(3, 4, 8, stride=8)
        self.large = nn.Upsample(scale_factor=4)
        self.fc = nn.Linear(4 * 64, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.large(self.small(images)).flatten(1))


@pytest.mark.parametrize("model", [nn.Sequential(nn.Flatten(), nn.Linear(768, 4)), Upsampled()], ids=["no map", "blown up"])
def test_a_network_without_maps_is_refused_with_the_reason(model):
    with pytest.raises(UnsupportedModel, match="no layer's output is a map of 4 x 4 places"):
        place_of(model, 4, 16)


def test_agreement_of_maps():
    generator = np.random.default_rng(0)
    golden, faulty = generator.normal(size=(2, 4, 4))
    faulty[0, :2] = golden[0, :2] = 1.0  # ties
    assert rank_correlation(golden, faulty) == pytest.approx(stats.spearmanr(golden.ravel(), faulty.ravel()).statistic)
    assert rank_correlation(golden, golden) == 1
    assert rank_correlation(golden, -golden) == pytest.approx(-1)
    ramp = np.arange(16.0).reshape(4, 4)
    assert overlap(ramp, 3 * ramp - 5) == 1
    shifted = ramp.copy()
    shifted[0, 0] = 99  # one of four goes, one comes: 3 of 5
    assert overlap(ramp, shifted) == pytest.approx(3 / 5)
    assert overlap(ramp, -ramp) == 0
    for broken in (np.nan, np.inf):
        lost = np.where(ramp == 3, broken, ramp)
        assert (rank_correlation(ramp, lost), overlap(ramp, lost)) == (0, 0)
    assert rank_correlation(ramp, np.ones((4, 4))) == 0


def test_the_mean_over_images_has_students_interval():
    values = np.random.default_rng(1).normal(0.6, 0.1, size=20)
    found = mean_over_images(values)
    low, high = stats.t.interval(0.99, 19, loc=values.mean(), scale=stats.sem(values))
    assert (found.value, found.low, found.high, found.n) == pytest.approx((values.mean(), low, high, 20))
    assert mean_over_images([0.9, 1.0, 1.0]).high == 1
    unchanged = mean_over_images([1.0, 1.0])
    assert (unchanged.value, unchanged.high) == (1, 1)
    assert math.isnan(unchanged.low)
    for values in ([0.5], [0.0, 0.0]):
        assert math.isnan(mean_over_images(values).low)
        assert math.isnan(mean_over_images(values).high)


def test_the_worst_injection_has_the_largest_finite_delta_loss():
    records = pd.DataFrame(
        {
            "layer": ["a", "a", "a", "b", "b"],
            "index": [0, 1, 1, 0, 1],
            "neuron": [5, 6, 6, 7, 8],
            "bit": [1, 2, 4, 3, 0],
            "golden_loss": [1.0, 4.0, 4.0, 0.0, 0.0],
            "faulty_loss": [2.0, 0.5, 0.5, np.inf, np.nan],
        }
    )
    worst = worst_injection(records)
    assert worst["neuron"].tolist() == [6, 6]
    fault = one_fault(worst, FaultModel(bits=2), 3, 9.0, torch.device("cpu"))
    assert (fault.neurons.tolist(), fault.masks.tolist()) == ([6], [0b10100])
    both = fault.on(2)
    assert (both.position.tolist(), both.row.tolist(), both.neuron.tolist()) == ([3, 3], [0, 1], [6, 6])
    assert worst_injection(records[records["layer"] == "b"]).empty


def test_magnitudes_of_the_last_layer_before_and_after_every_flip(images):
    model = settle(TinyResNet())
    engine = make_engine("replay", model, images[0], 64, kinds=KINDS)
    golden = model(images).detach().numpy()
    words = golden.view(np.uint32)[..., None] ^ (np.uint32(1) << np.arange(32, dtype=np.uint32))
    with np.errstate(invalid="ignore"):
        faulty = np.abs(words.view(np.float32).astype(float)).ravel()
    finite = faulty[np.isfinite(faulty)]
    limit = float(np.abs(golden).max())
    found = count_magnitudes(engine, loader_of(images, torch.zeros(12), 5), limit)
    edges = 10.0 ** np.append(POWERS, POWERS[-1] + 1)
    edges[0] = 0
    assert found["golden"] == pytest.approx(np.histogram(np.abs(golden), edges)[0] / golden.size)
    assert found["faulty"] == pytest.approx(np.histogram(finite, edges)[0] / faulty.size)
    assert found["not_finite"] == pytest.approx(1 - len(finite) / len(faulty))
    assert found["beyond"] == pytest.approx((finite > limit).mean() * len(finite) / len(faulty))
    assert sum(found["faulty"]) + found["not_finite"] == pytest.approx(1)
