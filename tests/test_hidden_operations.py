"""Operations inside of torch's attention and recurrent layers, and the other kinds of sites that are hit on request."""

import contextlib
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fault_helpers import make_faults
from textguard.faults.engines import ReplayEngine, WholeEngine, make_engine
from textguard.faults.operations import KINDS, inside_of
from textguard.faults.sites import Calls

BIT, LIMIT = 30, 50.0


def flip(output: Tensor, neuron: int) -> Tensor:
    """The output for one image with the top exponent bit of one value flipped, behind a range detector; without our code."""
    flat = output.flatten().clone()
    code = flat[neuron : neuron + 1].view(torch.int32) ^ (1 << BIT)
    flat[neuron] = code.view(torch.float32).clamp(-LIMIT, LIMIT).nan_to_num(LIMIT)[0]
    return flat.reshape(output.shape)


def assert_engine_agrees(engine, images: Tensor, position: int, alone, faulty) -> None:
    """Faults at a site are those that a reference injects, image by image.

    alone(image) gives the site's golden output [...]; faulty(image, neuron) the logits [C].
    """
    count = 6
    draw = torch.Generator().manual_seed(position)
    neuron = torch.randint(engine.sites[position].neurons, (count,), generator=draw)
    image = torch.arange(count) % len(images)
    found = engine.run(images, make_faults([position] * count, image, neuron, 1 << BIT, LIMIT))
    golden = torch.stack([alone(images[i]).flatten()[n] for i, n in zip(image, neuron, strict=True)])
    torch.testing.assert_close(found.golden_value, golden, rtol=1e-4, atol=1e-6)
    expected = torch.stack([faulty(images[i], int(n)) for i, n in zip(image, neuron, strict=True)])
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)
    assert ((found.logits - found.golden_logits[image]).abs().amax(dim=1) > 1e-4).any()


class Attending(nn.Module):
    """torch's attention, and behind it a head. tokens: whether the images are words of a vocabulary."""

    def __init__(self, batch_first: bool = True, need_weights: bool = False, tokens: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 8) if tokens else nn.Identity()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.head = nn.Linear(8, 4)
        self.batch_first, self.need_weights = batch_first, need_weights

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.attention(x, x, x, need_weights=self.need_weights)[0]
        return self.head(x.mean(dim=1 if self.batch_first else 0))


@contextlib.contextmanager
def hearing(number: int, visit):
    """Lets `visit` replace the output of one of the calls of F.linear, whoever makes it."""
    linear, calls = F.linear, iter(range(100))

    def heard(*args, **kwargs):
        output = linear(*args, **kwargs)
        return visit(output) if next(calls) == number else output

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with mock.patch.object(F, "linear", heard), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@pytest.mark.parametrize(
    ("engine_of", "options"),
    [
        (ReplayEngine, {}),
        (ReplayEngine, {"need_weights": True}),
        (WholeEngine, {}),
        (ReplayEngine, {"batch_first": False}),
        (WholeEngine, {"batch_first": False}),
        (WholeEngine, {"tokens": True}),
    ],
)
def test_projections_inside_torchs_attention_are_sites(engine_of, options):
    torch.manual_seed(0)
    model = Attending(**options).eval()
    images = (
        torch.randint(9, (3, 5), generator=torch.Generator().manual_seed(1)) if "tokens" in options else torch.randn(3, 5, 8)
    )
    engine = engine_of(model, images[0], 4)
    # The tokens of an image stand between those of others: [tokens, images, ...], and [tokens * images, ...].
    assert [(site.layer, site.kind, site.shape, site.parameter) for site in engine.sites] == [
        ("attention", "Linear", (5, 24), "attention.in_proj_weight"),
        ("attention.out_proj", "Linear", (5, 8), "attention.out_proj.weight"),
        ("head", "Linear", (4,), "head.weight"),
    ]
    assert [site.in_order for site in engine.sites] == [False, False, True]
    for position in range(2):

        def alone(image, position=position):
            kept = []
            with hearing(position, lambda output: kept.append(output) or output):
                model(image[None])
            return kept[0]

        def faulty(image, neuron, position=position):
            with hearing(position, lambda output: flip(output, neuron)):
                return model(image[None])[0]

        assert_engine_agrees(engine, images, position, alone, faulty)


class Remembering(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.memory = getattr(nn, kind)(3, 4, batch_first=True)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.memory(x)[0][:, -1])


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 16), ("GRU", 12), ("RNN", 4)])
def test_products_inside_torchs_recurrent_layers_are_sites(kind, gates):
    torch.manual_seed(0)
    model, images = Remembering(kind).eval(), torch.randn(3, 6, 3)
    engine = make_engine("replay", model, images[0], 4)
    assert [(site.layer, site.shape, site.parameter) for site in engine.sites] == [
        ("memory", (6, gates), "memory.weight_ih_l0"),
        ("head", (5,), "head.weight"),
    ]
    assert engine.skipped == [("memory.recurrent", "Recurrent is not among the wanted kinds of sites")]
    # A layer that takes gates for its inputs, and multiplies them by one.
    twin = getattr(nn, kind)(gates, 4, batch_first=True)
    twin.load_state_dict(
        {**model.memory.state_dict(), "weight_ih_l0": torch.eye(gates), "bias_ih_l0": torch.zeros(gates)}, strict=True
    )

    @torch.no_grad()
    def alone(image):
        return image @ model.memory.weight_ih_l0.T + model.memory.bias_ih_l0

    @torch.no_grad()
    def faulty(image, neuron):
        return model.head(twin(flip(alone(image), neuron)[None])[0][0, -1])

    assert_engine_agrees(engine, images, 0, alone, faulty)
    asked = make_engine("replay", model, images[0], 4, kinds=("Recurrent",))
    assert [site.shape for site in asked.sites] == [(gates,)] * 6
    assert asked.sites[5].layer == "memory.recurrent#6"
    assert {site.parameter for site in asked.sites} == {"memory.weight_hh_l0"}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_in_steps_do_what_torch_does(kind, bias):
    torch.manual_seed(0)
    x = torch.randn(4, 2, 3)
    options = [{"nonlinearity": "relu"}, {}] if kind == "RNN" else [{}]
    for more in options:
        for shape in ({"bidirectional": True, "num_layers": 2}, {"batch_first": True}):
            layer = getattr(nn, kind)(3, 4, bias=bias, **shape, **more).eval()
            seen = []
            with torch.no_grad():
                expected = layer(x)
                with Calls(lambda call, seen=seen: seen.append(call.kind) or call.output):
                    found = layer(x)
            assert seen.count("Linear") == (4 if "num_layers" in shape else 1)
            torch.testing.assert_close(found, expected)
        cell = getattr(nn, f"{kind}Cell")(3, 4, bias=bias, **more)
        with torch.no_grad(), Calls(lambda call: call.output):
            found = cell(x[0])
        torch.testing.assert_close(found, cell(x[0]))


def test_what_stays_closed_is_listed():
    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = nn.LSTM(3, 4, proj_size=2)
            self.head = nn.Linear(2, 4)

        def forward(self, x):
            return self.head(self.memory(x.transpose(0, 1))[0][-1])

    engine = make_engine("replay", Projected().eval(), torch.randn(5, 3), 4)
    assert [site.layer for site in engine.sites] == ["head"]
    reason = "no kind of site covers torch.lstm, which reads it"
    assert dict(engine.skipped) == {f"memory.{name}": reason for name, _ in Projected().memory.named_parameters()}
    packed = (torch.randn(5, 3), torch.tensor([2, 2, 1]), (None, None), [], True, 1, 0.0, False, False)
    assert inside_of(torch.lstm, packed) is None


class Various(nn.Module):
    """A module of each kind that is hit on request, called once; then the same as functions and as methods."""

    def __init__(self) -> None:
        super().__init__()
        self.batch, self.group, self.instance = nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)
        self.relu, self.prelu, self.swish, self.gelu = nn.ReLU(inplace=True), nn.PReLU(), nn.Hardswish(), nn.GELU()
        self.largest, self.mean = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.norm, self.rms, self.softmax = nn.LayerNorm(4), nn.RMSNorm(4), nn.Softmax(dim=-1)
        self.both = nn.Bilinear(4, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.batch(x)) + 0.1 * self.prelu(self.group(x)) + self.gelu(self.instance(x))
        x = self.up(self.mean(self.largest(self.swish(x)))).mean(dim=(2, 3))
        x = self.rms(self.norm(x))
        return self.both(x, self.softmax(x))


WANTED = {
    "batch": "BatchNorm",
    "relu": "Activation",
    "group": "GroupNorm",
    "prelu": "Activation",
    "instance": "GroupNorm",
    "gelu": "Activation",
    "swish": "Activation",
    "largest": "Pool",
    "mean": "Pool",
    "up": "ConvTranspose2d",
    "norm": "LayerNorm",
    "rms": "LayerNorm",
    "softmax": "Softmax",
    "both": "Bilinear",
}


@pytest.mark.parametrize("engine_of", [ReplayEngine, WholeEngine])
def test_other_kinds_on_request(engine_of):
    torch.manual_seed(0)
    model, images = Various().eval(), torch.randn(3, 4, 6, 6)
    model.batch.running_mean.normal_()
    engine = engine_of(model, images[0], 4, kinds=tuple(kind for kind in KINDS if kind != "Add"))
    # What has no weights is named after the module that makes the call.
    assert {site.layer.removesuffix(f".{site.kind.lower()}"): site.kind for site in engine.sites} == WANTED
    assert engine.skipped == [("Add", "2 calls; Add is not among the wanted kinds of sites")]
    for site in engine.sites:
        module = model.get_submodule(site.layer.removesuffix(f".{site.kind.lower()}"))

        @torch.no_grad()
        def hooked(image, change, module=module):
            handle = module.register_forward_hook(lambda module, inputs, output: change(output))
            try:
                return model(image[None])[0]
            finally:
                handle.remove()

        def alone(image):
            kept = []
            hooked(image, lambda output: kept.append(output.clone()))
            return kept[0]

        assert_engine_agrees(
            engine, images, site.position, alone, lambda image, n: hooked(image, lambda output: flip(output, n))
        )


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("Activation", F.relu),
        ("Activation", lambda x: F.relu(x.clone(), inplace=True)),
        ("Activation", lambda x: x.clone().relu_()),
        ("Activation", torch.sigmoid),
        ("Activation", lambda x: x.tanh()),
        ("Activation", F.softplus),
        ("Activation", F.leaky_relu),
        ("Softmax", lambda x: x.softmax(dim=1)),
        ("Softmax", lambda x: F.log_softmax(x, dim=1)),
        ("Pool", lambda x: F.max_pool2d(x, 2)),
        ("Pool", lambda x: F.avg_pool1d(x.flatten(2), 2)),
        ("Pool", lambda x: F.adaptive_max_pool2d(x, 2)),
        ("LayerNorm", lambda x: torch.layer_norm(x, x.shape[1:])),
        ("BatchNorm", lambda x: F.batch_norm(x, torch.zeros(3), torch.ones(3))),
        ("ConvTranspose1d", lambda x: F.conv_transpose1d(x.flatten(2), torch.ones(3, 2, 3))),
        ("ConvTranspose3d", lambda x: F.conv_transpose3d(x[:, :, None], torch.ones(3, 2, 1, 3, 3))),
        ("Conv2d", lambda x: torch.convolution(x, torch.ones(2, 3, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)),
        ("MatMul", lambda x: torch.tensordot(x, torch.ones(8, 2), dims=1)),
        ("MatMul", lambda x: torch.mm(x.flatten(1), torch.ones(192, 3))),
        ("MatMul", lambda x: x.flatten(1).mm(torch.ones(192, 3))),
        ("MatMul", lambda x: torch.addmm(torch.ones(3), x.flatten(1), torch.ones(192, 3))),
        ("MatMul", lambda x: torch.baddbmm(torch.ones(1, 1, 8), x[:, 0], x[:, 1])),
        ("MatMul", lambda x: torch.einsum("bchw,bcvw->bhv", x, x)),
        ("MatMul", lambda x: torch.linalg.multi_dot([x.flatten(1), torch.ones(192, 3), torch.ones(3, 3)])),
        ("Embedding", lambda x: F.embedding(x.flatten(1).long().clamp(0, 3), torch.ones(4, 2))),
        ("Bilinear", lambda x: F.bilinear(x.flatten(1), x.flatten(1)[:, :2], torch.ones(3, 192, 2))),
    ],
)
def test_every_spelling_is_heard(kind, call):
    seen = []
    images = torch.randn(2, 3, 8, 8)

    def double(found):
        seen.append(found.kind)
        return found.output * 2

    with torch.no_grad():
        expected = call(images)
        with Calls(double):
            found = call(images)
    assert seen == [kind]
    torch.testing.assert_close(found, expected * 2)
