"""Every fault model in every number format: both engines against each other, and against a slow twin written with hooks."""

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from conftest import TINY, settle
from fault_helpers import make_faults
from textguard.errors import InvalidParameter, UnsupportedModel
from textguard.faults.damage import FaultModel, Faults, weight_limits
from textguard.faults.engines import Outcomes, PyTorchFIEngine, ReplayEngine, WholeEngine, make_engine
from textguard.faults.formats import Format, parse_format

FORMATS = (
    *("fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "fp(4,3)", "int(8)", "int(16)", "fixed(3,4)", "bfp(8,7,16)"),
    "adaptivfloat(4,3)",
)
SOME_FORMATS = ("fp32", "fp16", "int(8)", "bfp(8,7,16)", "adaptivfloat(4,3)")
FAULT_MODELS = {
    "bits": FaultModel(bits=3),
    "values": FaultModel(values=4),
    "values and bits": FaultModel(values=3, bits=2),
    "stuck at 0": FaultModel(operation="stuck_at_0"),
    "stuck at 1": FaultModel(operation="stuck_at_1"),
    "weight": FaultModel(target="weight"),
    "weights": FaultModel(target="weight", values=3, bits=2),
    "weight stuck at 0": FaultModel(target="weight", operation="stuck_at_0"),
    "weight stuck at 1": FaultModel(target="weight", operation="stuck_at_1"),
}
METADATA = {
    "metadata": FaultModel(target="metadata"),
    "metadata bits": FaultModel(target="metadata", bits=2),
    "metadata stuck at 0": FaultModel(target="metadata", operation="stuck_at_0"),
    "metadata stuck at 1": FaultModel(target="metadata", operation="stuck_at_1"),
}
ENGINES = (ReplayEngine, WholeEngine)
COUNT = 30


class Twin:
    """The slow twin: hooks round what each Conv2d and Linear returns, one fault and one image per inference."""

    def __init__(self, model: nn.Module, number_format: Format, profiled: dict[str, float]) -> None:
        self.model, self.format, self.limits = copy.deepcopy(model).eval(), number_format, profiled
        self.layers = {name: m for name, m in self.model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        self.weight_limits = {name: float(layer.weight.detach().abs().max()) for name, layer in self.layers.items()}
        self.edits: dict[str, Callable[[Tensor], Tensor]] = {}
        self.seen: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            with torch.no_grad():
                layer.weight.copy_(self._stored(layer.weight.detach(), self.weight_limits[name]))
            layer.register_forward_hook(lambda module, inputs, output, name=name: self._hook(name, output))

    def _stored(self, values: Tensor, limit: float) -> Tensor:
        return self.format.round(values.reshape(1, -1), torch.tensor(limit)).reshape(values.shape)

    def _hook(self, name: str, output: Tensor) -> Tensor:
        stored = self._stored(output, self.limits[name])
        self.seen[name] = stored.flatten()
        return self.edits[name](stored.flatten()).reshape(output.shape) if name in self.edits else stored

    @torch.no_grad()
    def infer(self, image: Tensor) -> Tensor:
        return self.model(image[None])[0]

    @torch.no_grad()
    def inject(
        self, image: Tensor, layer: str, model: FaultModel, damage: dict[int, int], detector: float
    ) -> tuple[list[float], list[float], list[bool], Tensor]:
        """Golden and faulty values and whether they were detected, by ascending place; the logits. damage: place -> mask."""
        found: list[tuple[float, float, bool]] = []
        weights = model.target == "weight"
        limit = torch.tensor((self.weight_limits if weights else self.limits)[layer])

        def edit(golden: Tensor) -> Tensor:
            faulty = golden.clone()
            for place, mask in damage.items():
                found.append(self._damage(golden, faulty, place, mask, model, limit, detector))
            return faulty

        if weights:
            weight = self.layers[layer].weight
            kept = weight.clone()
            weight.copy_(edit(kept.flatten()).reshape(kept.shape))
            logits = self.infer(image)
            weight.copy_(kept)
        else:
            self.edits = {layer: edit}
            logits = self.infer(image)
            self.edits = {}
        return *(list(column) for column in zip(*found, strict=True)), logits

    def _damage(
        self, golden: Tensor, faulty: Tensor, place: int, mask: int, model: FaultModel, limit: Tensor, detector: float
    ) -> tuple[float, float, bool]:
        size = self.format.block or len(golden)
        start = place * size if model.target == "metadata" else place // size * size
        block = golden[start : start + size]
        shared = self.format.shared(block[None], limit)[0]

        def operated(code: Tensor) -> Tensor:
            changed = {"flip": int(code) ^ mask, "stuck_at_0": int(code) & ~mask, "stuck_at_1": int(code) | mask}
            return torch.tensor(changed[model.operation])

        if model.target == "metadata":
            values = self.format.decode(self.format.encode(block, limit, shared), limit, operated(shared))
            kept = [guarded(float(value), detector) for value in values]
            faulty[start : start + size] = torch.tensor([value for value, _ in kept])
            return float(shared), float(operated(shared)), any(detected for _, detected in kept)
        code = self.format.encode(golden[place], limit, shared)
        value, detected = guarded(float(self.format.decode(operated(code), limit, shared)), detector)
        faulty[place] = value
        return float(golden[place]), value, detected


def guarded(value: float, limit: float) -> tuple[float, bool]:
    """A value behind the range detector, and whether that took it for a fault."""
    if math.isinf(limit) or abs(value) <= limit:
        return value, False
    return (-limit if value < 0 else limit), True


def tiny(name: str) -> nn.Module:
    torch.manual_seed(0)
    return settle(TINY[name]())


def profile(model: nn.Module, images: Tensor) -> dict[str, float]:
    """The largest magnitude of each Conv2d and Linear."""
    twin = Twin(model, parse_format("fp32"), dict.fromkeys((name for name, _ in model.named_modules()), 0.0))
    largest: dict[str, float] = {}
    for image in images:
        twin.infer(image)
        for name, output in twin.seen.items():
            largest[name] = max(largest.get(name, 0.0), float(output.abs().max()))
    return largest


def distinct(size: int, count: int, draw: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=draw)[:count].sort().values


def draw_faults(sites, images: int, profiled: dict[str, float], model: FaultModel, form: Format, seed: int = 0) -> Faults:
    """COUNT faults in turn over the sites; the detector of every second one lets all pass."""
    draw = torch.Generator().manual_seed(seed)
    bits = form.shared_bits if model.target == "metadata" else form.bits
    rows, places, masks, limits = [], [], [], []
    for number in range(COUNT):
        site = sites[number % len(sites)]
        size = {"neuron": site.neurons, "weight": site.weights, "metadata": -(-site.neurons // (form.block or site.neurons))}
        neuron = distinct(size[model.target], model.values, draw)
        rows += [number] * len(neuron)
        places += neuron.tolist()
        lowest = 0 if number % 3 == 0 else bits - max(bits // 3, model.bits + 1)  # high bits are more often seen behind it
        masks += [sum(1 << int(bit) + lowest for bit in distinct(bits - lowest, model.bits, draw)) for _ in neuron]
        limits.append(math.inf if number % 2 else 1.5 * profiled[site.layer])
    return Faults(
        model=model,
        position=torch.arange(COUNT) % len(sites),
        image=torch.randint(images, (COUNT,), generator=draw),
        limit=torch.tensor(limits),
        row=torch.tensor(rows),
        neuron=torch.tensor(places),
        mask=torch.tensor(masks),
    )


def by_twin(twin: Twin, sites, images: Tensor, faults: Faults) -> Outcomes:
    golden, faulty, detected, logits = [], [], [], []
    for number in range(COUNT):
        here = faults.row == number
        damage = dict(zip(faults.neuron[here].tolist(), faults.mask[here].tolist(), strict=True))
        layer, image = sites[int(faults.position[number])].layer, images[faults.image[number]]
        *values, found = twin.inject(image, layer, faults.model, damage, float(faults.limit[number]))
        for column, more in zip((golden, faulty, detected), values, strict=True):
            column.extend(more)
        logits.append(found)
    masked, fault_free = torch.zeros(COUNT, dtype=torch.bool), torch.stack([twin.infer(image) for image in images])
    return Outcomes(torch.tensor(golden), torch.tensor(faulty), torch.tensor(detected), masked, torch.stack(logits), fault_free)


def assert_same(a: Outcomes, b: Outcomes, faults: Faults, exact: bool) -> None:
    """The same damage, and the same logits behind it.

    Sums that differ by a rounding can be rounded to different codes of a coarse format; where golden values did (or, in fp32,
    where they are further apart than roundings), nothing can be compared. That must be rare.
    """
    rounding = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-4, "atol": 1e-6}
    same = torch.isclose(a.golden_value, b.golden_value, **rounding)
    same &= ~(a.golden_value.signbit() ^ b.golden_value.signbit())
    assert same.float().mean() > 0.95
    # A low bit may be carried: still the same value, but for its last bits.
    equal = torch.isclose(a.faulty_value, b.faulty_value, equal_nan=True, **rounding)
    assert equal[same].all() if exact else equal[same].float().mean() > 0.95
    assert torch.equal(a.detected[same & equal], b.detected[same & equal])
    fault = torch.ones(COUNT, dtype=torch.bool)
    fault[faults.row[~(same & equal)]] = False
    scale = b.golden_logits.abs().max()
    close = torch.isclose(a.logits, b.logits, rtol=1e-3, atol=float(1e-4 * scale), equal_nan=True).all(dim=1)
    assert close[fault].float().mean() > 0.95
    assert torch.isclose(a.golden_logits, b.golden_logits, rtol=1e-3, atol=float(1e-4 * scale)).float().mean() > 0.95
    still = torch.isclose(b.logits, b.golden_logits[faults.image], rtol=3e-3, atol=float(3e-4 * scale)).all(dim=1)
    assert (~still).float().mean() > 0.05


def compare_all(name: str, form: Format, model: FaultModel, images: Tensor) -> None:
    network = tiny(name)
    profiled = profile(network, images)
    options = {"number_format": form, "profiled": profiled, "target": model.target}
    replay, whole = ReplayEngine(network, images[0], 7, **options), WholeEngine(network, images[0], 5, **options)
    with torch.no_grad():
        limits = weight_limits(network, replay.sites) if model.target == "weight" else profiled
    faults = draw_faults(replay.sites, len(images), limits, model, form)
    twin = Twin(network, form, profiled)
    expected = by_twin(twin, replay.sites, images, faults)
    exact = form.name != "fp32"
    for engine in (replay, whole):
        found = engine.run(images, faults)
        assert_same(found, expected, faults, exact or model.target == "weight")
        # What is no fault model's matter: a fault that was dropped has the golden logits.
        dropped = found.masked
        assert torch.equal(found.logits[dropped], found.golden_logits[faults.image][dropped])


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("text", FORMATS)
def test_a_bit_flips_in_every_format(text, name, images):
    compare_all(name, parse_format(text), FaultModel(), images)


@pytest.mark.parametrize("name", ["resnet", "transformer"])
@pytest.mark.parametrize("text", SOME_FORMATS)
@pytest.mark.parametrize("model", FAULT_MODELS.values(), ids=FAULT_MODELS)
def test_every_fault_model_is_what_it_says(model, text, name, images):
    compare_all(name, parse_format(text), model, images)


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
@pytest.mark.parametrize("text", ["bfp(8,7,16)", "bfp(5,4,7)", "adaptivfloat(4,3)"])
@pytest.mark.parametrize("model", METADATA.values(), ids=METADATA)
def test_faults_in_metadata_change_all_values_of_the_block(model, text, name, images):
    compare_all(name, parse_format(text), model, images)


def test_several_blocks_at_once(images):
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3, stride=2)
            self.fc = nn.Linear(5, 4)

        def forward(self, x):
            return self.fc(self.conv(x).relu().mean(dim=(2, 3)))

    torch.manual_seed(0)
    model, form = Small().eval(), parse_format("bfp(8,7,2)")
    profiled = profile(model, images)
    damage = FaultModel(target="metadata", values=2)
    for build in ENGINES:
        engine = build(model, images[0], 7, number_format=form, profiled=profiled, target="metadata")
        faults = draw_faults(engine.sites, len(images), profiled, damage, form)
        assert_same(
            engine.run(images, faults), by_twin(Twin(model, form, profiled), engine.sites, images, faults), faults, True
        )


@pytest.mark.parametrize("text", FORMATS)
def test_the_golden_run_is_in_the_format(text, tiny_model, images):
    form, profiled = parse_format(text), profile(tiny_model, images)
    expected = Twin(tiny_model, form, profiled)
    for build in ENGINES:
        engine = build(tiny_model, images[0], 8, number_format=form, profiled=profiled)
        outputs: dict[str, Tensor] = {}

        def see(position, output, outputs=outputs, engine=engine):
            outputs[engine.sites[position].layer] = output.reshape(len(images), -1).clone()

        logits = engine.observe(images, see)
        assert outputs.keys() == expected.layers.keys()
        for layer, output in outputs.items():
            assert torch.equal(form.round(output, torch.tensor(profiled[layer])), output)
            if text in ("fp8_e4m3", "fp8_e5m2", "fp(4,3)", "int(8)", "fixed(3,4)", "bfp(8,7,16)", "adaptivfloat(4,3)"):
                assert len(output.unique()) < 2**13  # few values, and none of fp32's
                assert (output.view(torch.int32) & 0x1F == 0).all() or text == "int(8)"
        own = torch.stack([expected.infer(image) for image in images])
        assert torch.isclose(logits, own, rtol=1e-3, atol=float(1e-4 * own.abs().max())).float().mean() > 0.95
        no_faults = draw_faults(engine.sites, len(images), profiled, FaultModel(operation="stuck_at_1"), form)
        assert torch.isclose(engine.run(images, no_faults).golden_logits, logits, atol=1e-5).float().mean() > 0.95


@pytest.mark.parametrize("build", ENGINES)
@pytest.mark.parametrize("text", ["fp32", "fp16", "int(8)", "bfp(8,7,16)"])
def test_a_bit_that_is_already_there_changes_nothing(text, build, resnet, images):
    form, profiled = parse_format(text), profile(resnet, images)
    engine = build(resnet, images[0], 8, number_format=form, profiled=profiled)
    outputs = []
    engine.observe(images, lambda position, output: outputs.append(output.flatten(1).clone()))
    sign = 1 << (form.bits - 1)
    signed = {op: [] for op in ("stuck_at_0", "stuck_at_1")}
    for position, output in enumerate(outputs):
        for operation, already in (("stuck_at_0", output > 0), ("stuck_at_1", output < 0)):
            image, neuron = already.nonzero()[:3].T.tolist()
            signed[operation] += [(position, i, n) for i, n in zip(image, neuron, strict=True)]
    for operation, there in signed.items():
        found = engine.run(images, make_faults(*zip(*there, strict=True), sign, model=FaultModel(operation=operation)))
        assert torch.equal(found.golden_value, found.faulty_value)
        assert not found.detected.any()
        golden = found.golden_logits[[i for _, i, _ in there]]
        torch.testing.assert_close(found.logits, golden, rtol=1e-4, atol=1e-5)
        if text == "fp32" and build is ReplayEngine:  # those of layers with a ReLU behind them
            assert found.masked[: 3 * 2].all()
        opposite = FaultModel(operation="stuck_at_1" if operation == "stuck_at_0" else "stuck_at_0")
        changed = engine.run(images, make_faults(*zip(*there, strict=True), sign, model=opposite))
        assert (changed.golden_value != changed.faulty_value).all()
        if text != "int(8)":  # in two's complement the sign bit changes the magnitude too
            assert torch.equal(changed.faulty_value, -changed.golden_value)


def weights_of(engine) -> dict[str, Tensor]:
    """A copy of what the engine computes with."""
    model = engine._model if isinstance(engine, WholeEngine) else engine._traced.model
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("build", ENGINES)
@pytest.mark.parametrize("text", ["fp32", "fp8_e4m3", "bfp(8,7,16)"])
def test_faulty_weights_last_for_one_inference(text, build, tiny_model, images):
    form, profiled = parse_format(text), profile(tiny_model, images)
    users = copy.deepcopy(tiny_model.state_dict())
    engine = build(tiny_model, images[0], 7, number_format=form, profiled=profiled, target="weight")
    own, before = weights_of(engine), engine.observe(images)
    model = FaultModel(target="weight", values=2)
    with torch.no_grad():
        limits = weight_limits(tiny_model, engine.sites)
    faults = draw_faults(engine.sites, len(images), limits, model, form)
    first, second = engine.run(images, faults), engine.run(images, faults)
    assert not torch.isclose(first.logits, first.golden_logits[faults.image], atol=1e-3).all()
    assert equal_states(tiny_model.state_dict(), users)
    assert equal_states(weights_of(engine), own)
    assert torch.equal(engine.observe(images), before)
    for name in ("golden_value", "faulty_value", "detected", "masked", "logits", "golden_logits"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=0, atol=0, equal_nan=True)
    # One fault alone does what it does among others.
    for number in (0, 5, COUNT - 1):
        alone, _ = faults.select(torch.tensor([number]))
        torch.testing.assert_close(
            engine.run(images, alone).logits[0], first.logits[number], rtol=1e-3, atol=1e-5, equal_nan=True
        )


@pytest.mark.parametrize("name", ["replay", "whole"])
def test_formats_and_targets_that_do_not_fit_are_refused(name, resnet, images):
    def build(text, **options):
        return make_engine(name, resnet, images[0], 4, number_format=parse_format(text), **options)

    profiled = profile(resnet, images)
    for text in FORMATS[1:]:
        with pytest.raises(InvalidParameter, match=r"'stem\.0' has no profiled range"):
            build(text)
    with pytest.raises(InvalidParameter, match="'fc' has no profiled range"):
        build("int(8)", profiled={layer: largest for layer, largest in profiled.items() if layer != "fc"})
    for text in ("fp32", "fp16", "int(8)", "fixed(3,4)"):
        with pytest.raises(InvalidParameter, match="has no metadata"):
            build(text, profiled=profiled, target="metadata")
    assert build("fp32").number_format.name == "fp32"
    assert build("fp32", target="weight").sites


@pytest.mark.parametrize("name", ["replay", "whole"])
def test_products_and_sums_have_no_weights(name, images):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            x = x + self.conv(x)
            return self.fc(x.mean(dim=(2, 3)) @ torch.eye(3))

    for kind in ("Add", "MatMul"):
        kinds = ("Conv2d", "Linear", kind)
        model = Residual().eval()
        assert len(make_engine(name, model, images[0], 4, kinds=kinds).sites) == 3
        with pytest.raises(InvalidParameter, match=f"has no weights; leave {kind} out"):
            make_engine(name, model, images[0], 4, kinds=kinds, target="weight")


def test_pytorchfi_refuses_what_it_cannot_do(resnet, images):
    profiled = profile(resnet, images)
    for options in (
        {"number_format": parse_format("fp16"), "profiled": profiled},
        {"target": "weight"},
        {"target": "metadata", "number_format": parse_format("bfp(8,7,16)"), "profiled": profiled},
        {"kinds": ("Conv2d",)},
        {"kinds": ("Conv2d", "Linear", "Add")},
    ):
        with pytest.raises(UnsupportedModel, match="set argument engine to replay"):
            make_engine("pytorchfi", resnet, images[0], 4, **options)
    assert len(make_engine("pytorchfi", resnet, images[0], 4, kinds=("Linear", "Conv2d")).sites) == 4


@pytest.mark.parametrize("model", [FaultModel(), *(FAULT_MODELS[name] for name in ("bits", "values", "stuck at 1"))])
def test_pytorchfi_carries_out_what_it_takes(model, resnet, images):
    reference, replay = PyTorchFIEngine(resnet, images[0], 16), ReplayEngine(resnet, images[0], 16)
    faults = draw_faults(replay.sites, len(images), profile(resnet, images), model, parse_format("fp32"))
    assert_same(replay.run(images, faults), reference.run(images, faults), faults, exact=False)


def test_weight_limits_are_the_largest_magnitudes(tiny_model, images):
    sites = ReplayEngine(tiny_model, images[0], 4).sites
    expected = {
        name: float(module.weight.detach().abs().max())
        for name, module in tiny_model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    with torch.no_grad():
        assert weight_limits(tiny_model, sites) == expected


def test_weight_limits_make_torch_warn_of_nothing(resnet, images):
    sites = ReplayEngine(resnet, images[0], 4).sites
    torch.set_warn_always(True)  # else once per process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            weight_limits(resnet, sites)
    finally:
        torch.set_warn_always(False)
