"""Who gets the replay engine: each way to trace a model, compared with whole inferences, fault by fault."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from fault_helpers import assert_same, close, random_faults
from textguard.errors import UnsupportedModel
from textguard.faults.engines import ReplayEngine, WholeEngine, make_engine
from textguard.faults.graph import Scaling, TracedModel
from textguard.faults.mitigations import protect
from textguard.faults.profiling import profile_activations


def assert_replayed(model: nn.Module, images: Tensor, whole: nn.Module | None = None, count: int = 60) -> ReplayEngine:
    """`model` is replayed, with the sites of `whole` and the same logits for each of some faults."""
    engine = make_engine("replay", model, images[0], 8)
    assert engine.reason == ""
    assert type(engine) is ReplayEngine
    reference = WholeEngine(whole or model, images[0], 8)
    assert engine.sites == reference.sites
    if not count:
        return engine
    faults = random_faults(engine, len(images), count, 50.0, bits=(*range(20, 32), 30, 30))
    outcomes = engine.run(images, faults)
    assert_same(outcomes, reference.run(images, faults), faults, least=0.9)
    assert (~close(outcomes.logits, outcomes.golden_logits[faults.image])).float().mean() > 0.2
    return engine


class Small(nn.Module):
    """A small convolutional classifier, for others to build on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.mix = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 4)

    def features(self, x: Tensor) -> Tensor:
        return self.mix(self.relu(self.norm(self.conv(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


# Arguments behind the first one have their defaults.


class WithTargets(Small):
    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        logits = super().forward(x)
        return logits if targets is None else (logits, F.cross_entropy(logits, targets))


class WithOptions(Small):
    def forward(self, x: Tensor, *more: Tensor, plain: bool = True, scale: float = 2.0, options: dict | None = None) -> Tensor:
        logits = super().forward(x) * scale
        return logits if plain and not options and not more else logits.relu()


@pytest.mark.parametrize("build", [WithTargets, WithOptions])
def test_other_arguments_have_their_defaults(build, images):
    engine = assert_replayed(build(), images)
    assert not engine._traced.exported


# What only passes images on.


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, AveragedModel, compiled, lambda model: nn.DataParallel(AveragedModel(model))]
)
@pytest.mark.parametrize("name", ["replay", "whole"])
def test_wrappers_leave_the_layers_their_names(wrap, name, images):
    model = Small().eval()
    engine, plain = (make_engine(name, one.eval(), images[0], 8) for one in (wrap(model), model))
    assert engine.sites == plain.sites
    assert (engine.settings, engine.reason) == (plain.settings, "")
    faults = random_faults(plain, len(images), 8, 50.0)
    assert torch.equal(engine.run(images, faults).logits, plain.run(images, faults).logits)


def test_exported_programs_are_replayed(images):
    model = Small().eval()
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    assert_replayed(program, images, whole=model)


@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, torch.zeros(2, 3, 8, 8))])
@pytest.mark.parametrize("name", ["replay", "whole"])
def test_scripted_models_are_refused_in_one_line(make, name, images):
    with pytest.raises(UnsupportedModel, match=r"scripted .* give the model that it was made from"):
        make_engine(name, make(Small().eval()), images[0], 8)


# The batch in other dimensions.


class Tokens(Small):
    """A classifier whose features, as tokens [B, T, C], go through `mix_tokens`."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix_tokens(self.features(x).flatten(2).transpose(1, 2)).mean(1))


# In each, a value with its batch elsewhere is read behind `out`, so that replays of its faults take it from the golden run.


class HeadsFirst(Tokens):
    """timm's attention: the batch is in dimension 1 of what `unbind` takes apart."""

    def mix_tokens(self, x: Tensor) -> Tensor:
        shape = x.shape
        qkv = self.qkv(x).reshape(shape[0], shape[1], 3, 2, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).reshape(shape)) + qkv[2].transpose(1, 2).reshape(shape)


class Ensemble(Tokens):
    def mix_tokens(self, x: Tensor) -> Tensor:
        both = torch.stack([x, x.relu()])
        return self.out(x) + both.mean(0)


class Recurrent(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, num_layers=2, batch_first=True)

    def mix_tokens(self, x: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(x)
        return (self.out(hidden[-1]) + hidden[0])[:, None]


class Interleaved(Tokens):
    """The rows of the images take turns, as inside of torch's own attention."""

    def mix_tokens(self, x: Tensor) -> Tensor:
        shape = x.shape
        rows = x.transpose(0, 1).reshape(-1, 4).softmax(1)
        return self.out(x) + rows.unflatten(0, (shape[1], shape[0])).transpose(0, 1)


@pytest.mark.parametrize("build", [HeadsFirst, Ensemble, Recurrent, Interleaved])
def test_the_batch_may_lie_in_another_dimension(build, images):
    engine = assert_replayed(build(), images, count=90)
    assert not engine._traced.exported
    assert not all(map(engine._traced.batch_first, engine._traced.steps))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("rows", [1, 3])
def test_scalings_select_along_the_batch(rows, dim, interleaved):
    def value(count: int, *order: int) -> Tensor:
        images = torch.arange(10.0 * rows * 20).reshape(10, rows, 4, 5)[list(order) or list(range(count))]
        images = images.transpose(0, 1) if interleaved else images
        return images.flatten(0, 1).movedim(0, dim)

    scaling = Scaling(value(2), value(3))
    assert scaling.settle(value(2), value(2, 1, 0), torch.tensor([1, 0]))
    assert torch.equal(scaling.select(value(4), torch.tensor([3, 1, 1])), value(3, 3, 1, 1))
    assert scaling.batch_first == (dim == 0 and not (interleaved and rows > 1))


class Numbered(Small):
    """The rows are looked up by their numbers, which a replay has to count again."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        number = torch.arange(x.shape[0] * 2)[::2] // 2
        return logits[number, :] + logits[number, number * 0][:, None]


def test_numbers_of_rows_are_counted_again(images):
    assert_replayed(Numbered().eval(), images)


class Placed(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.arange(x.shape[0])[:, None, None, None])


@pytest.mark.parametrize("blank", [False, True])
def test_values_that_depend_on_the_place_in_the_batch_are_not_replayed(blank, images):
    with pytest.raises(UnsupportedModel, match="add makes of an image depends on its place in the batch"):
        TracedModel(Placed().eval(), images[0] * (not blank))


# What torch.fx cannot trace, and torch.export can.


class SamePadding(Small):
    """tf_efficientnet's: how much is padded depends on the image."""

    def features(self, x: Tensor) -> Tensor:
        assert x.dim() == 4, "a batch of images"
        if x.shape[2] % 2 == 0:
            x = F.pad(x, (0, 1, 0, 1))
        if len(x.shape) != 4 or max(x.shape[1:]) < 3:
            raise ValueError
        x = super().features(x)
        x += x.new_ones(1)
        return F.relu(x) + x


class Called(Small):
    """Modules that are called twice, one of them of torch's own steps, and a Softmax of values that no image flows into."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(4))
        self.soft = nn.Softmax(0)

    def features(self, x: Tensor) -> Tensor:
        x = super().features(x)
        if x.shape[1] == 4:
            x = self.relu(self.mix(self.relu(self.mix(x))))
        return x * self.soft(self.gate)[:, None, None]


class Branching(HeadsFirst):
    def mix_tokens(self, x: Tensor) -> Tensor:
        return super().mix_tokens(x) if x.shape[1] > 4 else x


class Assigning(Small):
    """Parts of a value are changed in place, after one of them was read."""

    def features(self, x: Tensor) -> Tensor:
        x = super().features(x)
        first = x[:, 0].relu()
        x[:, 0, 1:3] *= 2
        x[:, 1] = first + x[:, 0]
        x[:, 2:, 0] = 1
        return x


@pytest.mark.parametrize("build", [SamePadding, Called, Branching, Assigning])
def test_control_flow_on_shapes_is_traced_by_export(build, images):
    engine = assert_replayed(build(), images, count=90)
    assert engine._traced.exported
    # Calls of torch's own modules are single steps again, which local faults pass.
    assert [step.target for step in engine._traced.steps if step.op == "call_module"][:3] == ["conv", "norm", "relu"]


def test_weights_of_exported_traces_are_those_of_the_model(images):
    model = Called().eval()
    engine = ReplayEngine(model, images[0], 8)
    assert {name for name, _ in engine._traced.model.named_parameters()} == {name for name, _ in model.named_parameters()}


def test_what_neither_traces_is_run_whole_for_a_reason(images, capsys):
    class Depends(Small):
        def forward(self, x):
            return super().forward(x) if x.mean() > 0 else -super().forward(x)

    engine = make_engine("replay", Depends().eval(), images[0], 8)
    assert type(engine) is WholeEngine
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "control flow" in engine.reason
    assert engine.reason in said


def test_exported_models_can_be_protected(images):
    model = SamePadding().eval()
    loader = DataLoader(TensorDataset(images, torch.zeros(len(images), dtype=torch.long)), batch_size=4)
    bounds = {row.activation: (row.low, row.high) for row in profile_activations(model, loader).itertuples()}
    assert list(bounds) == ["relu", "relu_1"]
    protected = protect(model, images[0], bounds, "ranger")
    torch.testing.assert_close(protected(images), model(images))
    assert_replayed(protected, images, whole=model, count=0)
    assert (protected(images * 1e3).abs() < model(images * 1e3).abs()).all()


def test_len_is_said_to_be_in_the_way(images):
    class Counting(Small):
        def forward(self, x):
            return super().forward(x).reshape(len(x), 4)

    with pytest.raises(UnsupportedModel, match=re.escape("write `x.shape[0]` for `len(x)`")):
        ReplayEngine(Counting().eval(), images[0], 8)


def test_exported_traces_have_the_sites_of_the_model(images, monkeypatch):
    """Plans draw by layer: another trace with other sites would draw other faults."""
    monkeypatch.setattr("textguard.faults.exported._call_modules", lambda graph, model, is_leaf: _forget(graph))

    def _forget(graph):
        for step in graph.nodes:
            step.meta.pop("nn_module_stack", None)
            if step.target is torch.conv2d:
                step.target = torch.ops.aten.conv2d.default

    with pytest.raises(UnsupportedModel, match="has other sites than the model"):
        ReplayEngine(SamePadding().eval(), images[0], 8)
