"""Graphs that torchao's convert_pt2e makes: faults hit the integers that they store."""

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # it registers the operators of such graphs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.data import DataLoader, TensorDataset

from fault_helpers import make_faults
from textguard.assessment import assess
from textguard.errors import InvalidParameter, UnsupportedModel
from textguard.faults import FaultModel
from textguard.faults.engines import ReplayEngine, WholeEngine, make_engine
from textguard.faults.formats import parse_format
from textguard.hardware import draw_persistent, run_persistent, stored_tensors

OPS = torch.ops.quantized_decomposed
IN, HIDDEN = (0.04, 120, 0, 255, torch.uint8), (0.02, -3, -128, 127, torch.int8)


class Net(nn.Module):
    """What convert_pt2e leaves of a small network; `hit` are the (number, image, neuron, mask) of a fault in an activation."""

    hit: tuple[int, int, int, int] | None = None

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("stored", torch.randint(-128, 128, (4, 3, 3, 3), generator=draw).to(torch.int8))
        self.register_buffer("scales", torch.tensor([0.003, 0.002, 0.004, 0.001]))
        self.register_buffer("zeros", torch.zeros(4, dtype=torch.int64))
        self.register_buffer("head", torch.randint(-20, 20, (5, 4 * 4), generator=draw).to(torch.int8))

    def keep(self, number: int, x: Tensor, how: tuple) -> Tensor:
        codes = OPS.quantize_per_tensor(x, *how)
        if self.hit and self.hit[0] == number:
            _, image, neuron, mask = self.hit
            codes.view(torch.uint8).flatten(1)[image, neuron] ^= mask
        return OPS.dequantize_per_tensor(codes, *how)

    def forward(self, x: Tensor) -> Tensor:
        weight = OPS.dequantize_per_channel(self.stored, self.scales, self.zeros, 0, -128, 127, torch.int8)
        x = F.conv2d(self.keep(0, x, IN), weight).relu()
        head = OPS.dequantize_per_tensor(self.head, 0.03, 0, -128, 127, torch.int8)
        return F.linear(self.keep(1, x, HIDDEN).flatten(1), head)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exported(images) -> nn.Module:
    return torch.export.export(Net(), (images,), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False).module()


@pytest.mark.parametrize("engine_of", [ReplayEngine, WholeEngine])
@torch.no_grad()
def test_a_stored_activation_is_hit_as_the_graph_reads_it(engine_of, exported, images):
    engine = engine_of(exported, images[0], 3)
    assert [(site.kind, site.dtype, site.neurons) for site in engine.sites] == [
        ("Quantize", "uint8", 48),
        ("Quantize", "int8", 16),
    ]
    faults = [
        (number, image, neuron, 1 << bit) for number in (0, 1) for image, neuron, bit in [(1, 7, 7), (3, 11, 6), (0, 2, 0)]
    ]
    found = engine.run(images, make_faults(*map(list, zip(*faults, strict=True))))
    net = Net()
    assert torch.allclose(found.golden_logits, net(images), atol=1e-5)
    for row, fault in enumerate(faults):
        net.hit = fault
        assert torch.allclose(found.logits[row], net(images)[fault[1]], atol=1e-5)
    codes = OPS.quantize_per_tensor(images, *IN).flatten(1)
    assert found.golden_value[0] == codes[1, 7]
    assert found.faulty_value[0] == int(codes[1, 7]) ^ 128


@pytest.mark.parametrize("engine_of", [ReplayEngine, WholeEngine])
@torch.no_grad()
def test_a_stored_weight_is_hit_in_its_buffer(engine_of, exported, images):
    model = FaultModel(target="weight")
    engine = engine_of(exported, images[0], 3, target="weight")
    assert [(site.layer, site.kind, site.weights) for site in engine.sites] == [
        ("stored", "QuantizedWeight", 108),
        ("head", "QuantizedWeight", 80),
    ]
    faults = [
        (number, image, neuron, 1 << bit) for number in (0, 1) for image, neuron, bit in [(1, 7, 7), (3, 31, 6), (0, 2, 0)]
    ]
    found = engine.run(images, make_faults(*map(list, zip(*faults, strict=True)), model=model))
    for row, (number, image, neuron, mask) in enumerate(faults):
        net = Net()
        buffer = (net.stored, net.head)[number]
        assert found.golden_value[row] == buffer.flatten()[neuron]
        buffer.view(torch.uint8).view(-1)[neuron] ^= mask
        assert found.faulty_value[row] == buffer.flatten()[neuron]
        assert torch.allclose(found.logits[row], net(images)[image], atol=1e-5)
    assert torch.allclose(engine.observe(images), Net()(images), atol=1e-5)  # the weights are as they were


def test_stored_integers_are_assessed_without_a_range_detector(exported, images, capsys):
    loader = DataLoader(TensorDataset(images, Net()(images).argmax(dim=1)), batch_size=4)
    found = assess(exported, loader, injections_per_layer=16)
    assert set(found.site_bits.values()) == {8}
    assert set(found.limits.values()) == {float("inf")}
    assert set(found.records["bit"]) <= set(range(8))
    assert not found.records["detected"].any()
    assert "8 bits of stored integers in 2 layers" in capsys.readouterr().err
    with pytest.raises(UnsupportedModel, match="no gradient leads"):
        assess(exported, loader, plan="guided", injections_per_layer=16)
    for target in ("neuron", "weight"):
        with pytest.raises(InvalidParameter, match=r"int8, which is stored as .*; leave fp32"):
            make_engine("whole", exported, images[0], 4, target=target, number_format=parse_format("int(8)"))


@torch.no_grad()
def test_memory_holds_the_integers(exported, images):
    """Faults that stay, against a plain loop over an edited buffer; the range detector lets all integers pass."""
    stored = stored_tensors(exported, images[0])
    assert {tensor.name: (tensor.dtype, tensor.stored_as().bits) for tensor in stored} == {
        "stored": ("int8", 8),
        "scales": ("float32", 32),
        "head": ("int8", 8),
    }
    labels = Net()(images).argmax(dim=1)
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    plan = draw_persistent([tensor for tensor in stored if tensor.dtype == "int8"], 6, seed=0)
    golden = F.cross_entropy(Net()(images), labels, reduction="none")
    expected = []
    for fault in plan.itertuples():
        net = Net()
        net.get_buffer(fault.layer).view(torch.uint8).view(-1)[fault.neuron] ^= 1 << fault.bit
        expected.append(float((F.cross_entropy(net(images), labels, reduction="none") - golden).abs().mean()))
    assert max(expected) > 0.01
    for engine in ("replay", "whole"):
        found = run_persistent(exported, loader, plan, engine=engine, detector="profiled").outcomes
        assert found["delta_loss"].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_tensors_with_their_own_storage_are_refused(images):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    model[1].weight = nn.Parameter(TwoTensor(torch.zeros(5, 48), torch.zeros(5, 48)), requires_grad=False)
    with pytest.raises(UnsupportedModel, match=r"'1\.weight' is a tensor of class TwoTensor, .* convert_pt2e"):
        make_engine("replay", model, images[0], 4)


@pytest.mark.filterwarnings("ignore")
def test_what_torchao_makes_is_assessed(images):
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason="torchao is not installed")
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)).eval()
    program = torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    prepared = pt2e.prepare_pt2e(
        program, x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    )
    prepared(images)
    model = pt2e.convert_pt2e(prepared)
    for target, sites in {"neuron": {"Quantize"}, "weight": {"QuantizedWeight"}}.items():
        engine = make_engine("replay", model, images[0], 4, target=target)
        assert engine.name == "replay"
        assert {site.kind for site in engine.sites} == sites
        assert engine.sites == WholeEngine(model, images[0], 4, target=target).sites
