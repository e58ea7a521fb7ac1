"""Models that compute in other types than float32: their values are hit in the format in which torch stores them."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fault_helpers import make_faults
from textguard.assessment import assess
from textguard.errors import InvalidParameter, UnsupportedModel
from textguard.faults import FaultModel, draw_guided, draw_plan, parse_format
from textguard.faults.engines import ReplayEngine, WholeEngine, make_engine
from textguard.faults.exact import affordable
from textguard.faults.execution import run_campaign
from textguard.faults.plans import bits_at, check_plan

CODES = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float64: torch.int64, torch.float32: torch.int32}
BITS = {torch.bfloat16: 16, torch.float16: 16, torch.float64: 64}
OFF = float("inf")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 5)).eval()


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = network().to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(self.dtype))


class Automatic(nn.Module):
    """In bfloat16 inside, by autocast; its weights are float32, and so is its head."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = network(), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.net(x)
        return self.head(x.float())


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def flip(output: Tensor, neuron: int, bit: int) -> Tensor:
    flat, code = output.flatten().clone(), CODES[output.dtype]
    mask = torch.tensor(np.array([1 << bit], dtype=np.uint64).view(np.int64)).to(code)
    flat[neuron : neuron + 1] = (flat[neuron : neuron + 1].view(code) ^ mask).view(output.dtype)
    return flat.reshape(output.shape)


@torch.no_grad()
def hooked(model: nn.Module, layer: str, image: Tensor, neuron: int, bit: int) -> tuple[float, Tensor]:
    """The golden value and the logits of one image, with a fault; without the code under test."""
    kept = []

    def hook(module, inputs, output):
        kept.append(float(output.flatten()[neuron]))
        return flip(output, neuron, bit)

    handle = model.get_submodule(layer).register_forward_hook(hook)
    logits = model(image[None])[0].float()
    handle.remove()
    return kept[0], logits


@pytest.mark.parametrize("engine_of", [ReplayEngine, WholeEngine])
@pytest.mark.parametrize("dtype", BITS)
def test_every_bit_of_the_models_own_type_is_hit(engine_of, dtype, pictures):
    model, bits = Cast(dtype), BITS[dtype]
    engine = engine_of(model, pictures[0], 8)
    assert [site.layer for site in engine.sites] == ["net.0", "net.3", "net.6"]
    assert {(site.dtype, site.weight_dtype) for site in engine.sites} == {(str(dtype).removeprefix("torch."),) * 2}
    at = torch.arange(3 * bits)
    position, bit, image = at % 3, at // 3, at % len(pictures)
    neuron = torch.tensor([int(torch.randint(engine.sites[p].neurons, ())) for p in position])
    found = engine.run(pictures, make_faults(position, image, neuron, torch.tensor(1) << bit, OFF))
    each = zip(*(column.tolist() for column in (position, image, neuron, bit)), strict=True)
    expected = [hooked(model, engine.sites[p].layer, pictures[i], n, b) for p, i, n, b in each]
    golden, logits = torch.tensor([value for value, _ in expected]), torch.stack([part for _, part in expected])
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float64: 1e-5}[dtype]
    torch.testing.assert_close(found.golden_value, golden.float(), rtol=tolerance, atol=1e-3)
    usual = logits.isfinite().all(dim=1) & (logits.abs().amax(dim=1) < 100)
    assert usual.float().mean() > 0.8
    torch.testing.assert_close(found.logits[usual], logits[usual], rtol=tolerance, atol=tolerance)
    if dtype != torch.float64:  # whose values records keep with fewer digits
        for before, after, one in zip(found.golden_value, found.faulty_value, bit.tolist(), strict=True):
            assert torch.equal(flip(before.to(dtype)[None], 0, one)[0].float().nan_to_num(7.0), after.nan_to_num(7.0))


def test_autocast_decides_by_layer(pictures):
    engine = make_engine("replay", Automatic().eval(), pictures[0], 8)
    formats = {site.layer: (site.dtype, site.weight_dtype) for site in engine.sites}
    assert formats == {
        **dict.fromkeys(("net.0", "net.3", "net.6"), ("bfloat16", "float32")),
        "head": ("float32", "float32"),
    }
    fp32 = parse_format("fp32")
    assert [bits_at(site, FaultModel(), fp32) for site in engine.sites] == [16, 16, 16, 32]
    assert [bits_at(site, FaultModel(target="weight"), fp32) for site in engine.sites] == [32] * 4
    plan = draw_plan(engine.sites, np.ones(4), 400, 0)
    assert plan.groupby("layer")["bit"].max().to_dict() == {"head": 31, "net.0": 15, "net.3": 15, "net.6": 15}
    check_plan(plan, engine.sites, 4, FaultModel(), fp32)
    with pytest.raises(Exception, match="a bit that does not exist"):
        check_plan(plan.assign(bit=16), engine.sites, 4, FaultModel(), fp32)


def test_plans_and_campaigns_follow(pictures):
    model = Cast(torch.bfloat16)
    engine = make_engine("replay", model, pictures[0], 8)
    loader = DataLoader(TensorDataset(pictures, model(pictures).argmax(dim=1)), batch_size=2)
    limits = dict.fromkeys((site.layer for site in engine.sites), 10.0)
    counts = dict.fromkeys(limits, (0, 40))
    plan = draw_guided(engine, engine.sites, loader, np.ones(4), counts, 0, FaultModel(), [limits])
    assert plan["bit"].between(0, 15).all()
    assert len(run_campaign(engine, loader, plan, limits, image_batch=2)) == len(plan)
    assert affordable(engine, 4, FaultModel(), 10**9) == []
    layers = assess(model, loader, injections_per_layer=40, plan="proportional", enumerate_up_to=1).table[:-1]
    assert (layers["method"] == "sampled").all()
    weights = assess(model, loader, injections_per_layer=20, fault_model=FaultModel(target="weight")).table
    assert weights["delta_loss"].gt(0).any()


def test_what_does_not_fit_is_said(pictures):
    model = Automatic().eval()
    loader = DataLoader(TensorDataset(pictures, model(pictures).argmax(dim=1)), batch_size=2)
    with pytest.raises(InvalidParameter, match="by bit; but layers of this model have 16 and 32 bits"):
        assess(model, loader, plan="proportional")
    with pytest.raises(
        InvalidParameter, match=r"the output of layer 'net.0' is bfloat16, .* leave fp32 in argument number_format"
    ):
        assess(model, loader, number_format="int(8)")


def test_models_without_parameters_are_no_crash(pictures):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("w", torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))

        def forward(self, x):
            return nn.functional.linear(x.mean(dim=(2, 3)), self.w)

    class Bare(nn.Module):
        def forward(self, x):
            return x.mean(dim=(2, 3))

    model = Fixed()
    loader = DataLoader(TensorDataset(pictures, model(pictures).argmax(dim=1)))
    assert assess(model, loader, injections_per_layer=10).table["layer"].tolist() == ["linear", "overall"]
    with pytest.raises(UnsupportedModel, match="no Conv1d or"):
        assess(Bare(), loader)


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_are_hit_in_what_they_give_or_refused(pictures):
    ao = torch.ao.quantization
    kept = torch.backends.quantized.engine
    torch.backends.quantized.engine = next(name for name in torch.backends.quantized.supported_engines if name != "none")
    try:
        dynamic = ao.quantize_dynamic(network(), {nn.Linear})
        engine = make_engine("replay", dynamic, pictures[0], 4)
        assert [(site.layer, site.kind) for site in engine.sites] == [("0", "Conv2d"), ("3", "Conv2d"), ("6", "Linear")]
        found = engine.run(pictures, make_faults([2], [0], [1], 1 << 30, 50.0))
        assert float((found.logits[0] - found.golden_logits[0]).abs().max()) > 1
        static = nn.Sequential(
            ao.QuantStub(), nn.Conv2d(3, 4, 3), ao.DeQuantStub(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ).eval()
        static.qconfig = ao.get_default_qconfig(torch.backends.quantized.engine)
        ao.prepare(static, inplace=True)(pictures)
        ao.convert(static, inplace=True)
        with pytest.raises(UnsupportedModel, match=r"1: its output is quantised \(torch.quint8\)"):
            make_engine("whole", static, pictures[0], 4)
    finally:
        torch.backends.quantized.engine = kept
