"""Faults that stay in stored values or at neurons: who they hit, what they do, and the fast way against the slow one."""

import gzip
import json
import lzma

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.cifar_resnet import published
from tests.conftest import REPOSITORY
from textguard.errors import CampaignMismatch, InvalidArtifact, InvalidParameter, TextguardError, UnsupportedModel
from textguard.estimates.statistics import mean_interval, sample_mean
from textguard.hardware import carriers, persistent
from textguard.hardware.array import Array, run_stuck
from textguard.hardware.carriers import Replay
from textguard.hardware.crossed import Crossed, crossed_mean, interval, summarise_persistent
from textguard.hardware.lists import read_fault_list
from textguard.hardware.persistent import PersistentResult, run_persistent
from textguard.hardware.stored import draw_persistent, stored_tensors

COUNTS = ["images", "masked", "changed", "nonfinite", "correct", "lost", "gained", "finite", "eligible", "eligible_changed"]


class Mixed(nn.Module):
    """Convolutions of several kinds, norms, a residual connection, features, a table of places and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4, padding_mode="reflect")
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.places = nn.Parameter(torch.randn(4, 8) * 0.1)
        self.layer_norm, self.features = nn.LayerNorm(8), nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.features.weight
        self.head, self.scale = nn.Linear(8, 5), nn.Parameter(torch.tensor(2.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.stem(images)))
        x = F.relu(x + self.norm2(self.grouped(x)))
        x = self.pool(F.relu6(self.depthwise(x))).flatten(2).transpose(1, 2) + self.places
        x = x + self.tied(F.gelu(self.features(self.layer_norm(x))))
        return self.head(x.mean(dim=1)) * self.scale


class Untraceable(nn.Module):
    """A branch on a value, which torch.fx and torch.export refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(images.flatten(1)) if float(images.sum()) < 1e9 else images.flatten(1)[:, :4]


def trained_norms(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """The model, its running statistics taken from random images."""
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(16, *shape))
    return model.eval()


def loader_for(model: nn.Module, shape: tuple[int, ...], count: int = 10) -> DataLoader:
    """Random images; the model is right about most of them."""
    images = torch.randn(count, *shape)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[:2] = (labels[:2] + 1) % 3
    return DataLoader(TensorDataset(images, labels), batch_size=4)


@pytest.fixture(scope="module")
def mixed() -> tuple[nn.Module, DataLoader]:
    torch.manual_seed(0)
    model = trained_norms(Mixed(), (3, 8, 8))
    return model, loader_for(model, (3, 8, 8))


def assert_alike(a: PersistentResult, b: PersistentResult) -> None:
    """Two results are the same but for rounding: it may move a logit over the bound of what is masked, and a loss a little."""
    assert a.outcomes.columns.tolist() == b.outcomes.columns.tolist()
    for name in ("layer", "index", "neuron", "bit", "golden_value", "faulty_value"):
        pd.testing.assert_series_equal(a.outcomes[name], b.outcomes[name])
    for name in COUNTS:
        if name != "masked":
            assert (a.outcomes[name] == b.outcomes[name]).all(), a.outcomes[a.outcomes[name] != b.outcomes[name]]
    assert ((a.outcomes["masked"] - b.outcomes["masked"]).abs() <= 2).all()
    for name in ("delta_loss", "eligible_delta_loss"):
        np.testing.assert_allclose(a.outcomes[name], b.outcomes[name], rtol=2e-3, atol=2e-5)
    both = a.by_image.merge(b.by_image, on=["layer", "image"], suffixes=("", "_b"))
    assert len(both) == len(a.by_image) == len(b.by_image)
    for name in ("faults", "changed", "lost", "gained"):
        assert (both[name] == both[f"{name}_b"]).all()
    np.testing.assert_allclose(both["delta"], both["delta_b"], rtol=2e-3, atol=2e-4)


def test_an_inference_reads_weights_biases_norms_and_their_statistics_tied_ones_once(mixed):
    model, loader = mixed
    tensors = {tensor.name: tensor for tensor in stored_tensors(model, loader.dataset[0][0])}
    expected = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()} - {"tied.weight"}
    assert set(tensors) == expected
    assert tensors["norm1.running_var"].readers == ("batch_norm",)
    assert tensors["features.weight"].product
    assert not tensors["places"].product


def test_a_larger_count_extends_a_plan_and_values_and_bits_are_uniform(mixed):
    model, loader = mixed
    tensors = stored_tensors(model, loader.dataset[0][0])
    few, many = (draw_persistent(tensors, count, seed=3) for count in (5, 400))
    pd.testing.assert_frame_equal(few, many[many["index"] < 5].reset_index(drop=True))
    stem = many[many["layer"] == "stem.weight"]
    assert stem["neuron"].nunique() > 150  # of 216
    assert sorted(stem["bit"].unique()) == list(range(32))
    assert len(draw_persistent(tensors, {"stem.weight": 2}, seed=3, bits=3)) == 6


def test_the_replay_does_what_the_loop_of_all_images_does(mixed):
    model, loader = mixed
    tensors = stored_tensors(model, loader.dataset[0][0])
    plan = draw_persistent(tensors, 12, seed=1)
    # All tensors are hit where it shows, and where it does not.
    high = plan.assign(bit=np.resize([30, 31, 29, 23, 2, 26], len(plan)))
    whole = run_persistent(model, loader, high, engine="whole")
    assert_alike(run_persistent(model, loader, high, batch_size=7, image_batch=4), whole)
    assert 0 < whole.outcomes["changed"].sum() < whole.outcomes["images"].sum()
    assert whole.outcomes["nonfinite"].any()
    assert whole.top1 == 0.8


class Windows(nn.Module):
    """Four windows of each image, one behind the other in dimension 0."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.norm, self.head = nn.Linear(12, 6), nn.LayerNorm(6), nn.Linear(24, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        windows = images.reshape(-1, 12)
        return self.head(F.relu(self.norm(self.each(windows))).reshape(-1, 24))


def test_replays_take_other_dimensions_than_maps():
    torch.manual_seed(0)
    model = trained_norms(
        nn.Sequential(
            nn.Conv1d(3, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(), nn.Linear(48, 6), nn.BatchNorm1d(6)
        ),
        (3, 8),
    )
    for one, shape in ((model, (3, 8)), (Windows().eval(), (3, 4, 4))):
        loader = loader_for(one, shape)
        plan = draw_persistent(stored_tensors(one, loader.dataset[0][0]), 32, seed=1)
        assert_alike(run_persistent(one, loader, plan), run_persistent(one, loader, plan, engine="whole"))


def test_what_gradients_foresee_is_what_inferences_find(mixed, monkeypatch):
    model, loader = mixed
    tensors = stored_tensors(model, loader.dataset[0][0])
    plan = draw_persistent(tensors, 16, seed=2)
    run = []
    finish = Replay._finish
    monkeypatch.setattr(Replay, "_finish", lambda self, values, start: run.append(1) or finish(self, values, start))
    foreseen = run_persistent(model, loader, plan, batch_size=4)
    without = len(run)
    inferred = run_persistent(model, loader, plan, batch_size=4, foresee=False)
    assert without < 0.8 * (len(run) - without)
    assert_alike(foreseen, inferred)


def test_random_sums_of_many_classes_tell_what_is_masked(monkeypatch):
    monkeypatch.setattr(carriers, "FEW_CLASSES", 3)
    monkeypatch.setattr(carriers, "WORTH", 1)
    torch.manual_seed(0)
    model = trained_norms(Mixed(), (3, 8, 8))
    loader = loader_for(model, (3, 8, 8))
    tensors = [tensor for tensor in stored_tensors(model, loader.dataset[0][0]) if tensor.name.startswith("depthwise")]
    plan = draw_persistent(tensors, 60, seed=2)
    foreseen, inferred = (run_persistent(model, loader, plan, foresee=foresee) for foresee in (True, False))
    assert_alike(foreseen, inferred)
    assert 0 < foreseen.outcomes["masked"].sum() < foreseen.outcomes["images"].sum()


def test_batches_of_any_size_and_repeated_bits_come_to_the_same(mixed):
    model, loader = mixed
    plan = draw_persistent(stored_tensors(model, loader.dataset[0][0]), 3, seed=5, bits=2)
    one = run_persistent(model, loader, plan, batch_size=1, image_batch=3, operation="stuck_at_1")
    assert_alike(run_persistent(model, loader, plan, operation="stuck_at_1"), one)
    assert len(one.outcomes) == len(plan) / 2
    assert (one.outcomes["bit"].to_numpy() == plan["bit"].to_numpy().reshape(-1, 2).max(axis=1)).all()


def test_weights_lie_in_the_asked_format_and_other_tensors_in_torchs_own(mixed):
    model, loader = mixed
    tensors = stored_tensors(model, loader.dataset[0][0])
    plan = draw_persistent(tensors, 4, seed=1, number_format="int(8)")
    bits = plan.groupby("layer")["bit"].max()
    assert bits["stem.weight"] < 8 < min(bits["norm1.weight"], bits["head.bias"])
    found = [run_persistent(model, loader, plan, number_format="int(8)", engine=engine) for engine in ("replay", "whole")]
    assert_alike(*found)
    stem = found[0].outcomes[found[0].outcomes["layer"] == "stem.weight"]
    step = float(model.stem.weight.detach().abs().max()) / 127
    np.testing.assert_allclose(stem["golden_value"] / step, (stem["golden_value"] / step).round(), atol=1e-3)
    assert found[0].stored_bits["stem.weight"] == 8 * 216


def test_a_fault_that_stays_at_a_neuron_is_there_in_every_image(mixed):
    model, loader = mixed
    plan = pd.DataFrame({"layer": ["grouped", "head", "stem"], "index": 0, "neuron": [70, 1, 100], "bit": [30, 31, 23]})
    found = [run_persistent(model, loader, plan, target="neuron", engine=engine) for engine in ("replay", "whole")]
    assert_alike(*found)
    images, labels = loader.dataset.tensors

    def flip(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output[:, :1], -output[:, 1:2], output[:, 2:]], dim=1)

    with torch.no_grad():
        golden = model(images).argmax(1)
        handle = model.head.register_forward_hook(flip)
        faulty = model(images).argmax(1)
        handle.remove()
    head = found[0].outcomes.iloc[1]
    assert head["changed"] == (faulty != golden).sum() > 0
    assert head["correct"] == (faulty == labels).sum()


def identity_of(count: int) -> tuple[nn.Module, DataLoader]:
    """A model that gives its two inputs as logits; images of class 0, then as many of class 1."""
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.eye(2)
    images = torch.eye(2).repeat_interleave(count // 2, dim=0)
    return model, DataLoader(TensorDataset(images, images.argmax(1)), batch_size=8)


def test_harmless_and_hopeless_faults_stop_early_and_others_go_on():
    model, loader = identity_of(400)
    # The sign takes class 0 from half of the images. The highest exponent bit makes a logit infinite, or not a number.
    plan = pd.DataFrame({"layer": "weight", "index": [0, 1, 2], "neuron": [0, 0, 0], "bit": [31, 0, 30]})
    everything = run_persistent(model, loader, plan).outcomes
    assert everything["images"].tolist() == [400, 400, 400]
    assert everything["changed"].tolist() == [200, 0, 400]
    assert everything["correct"].tolist() == [200, 400, 0]  # an infinite logit is no answer, though it may be the right one
    assert everything["square"][0] == pytest.approx(2 * everything["delta_loss"][0] ** 2)  # the same for half of the images
    stopped = run_persistent(model, loader, plan, stop=0.1, image_batch=20)
    images = stopped.outcomes["images"].tolist()
    assert images[0] > 100
    assert images[1] == images[2] < 100
    assert abs(stopped.outcomes["changed"][0] / images[0] - 0.5) < 0.15  # though the loader gives class 0 first
    assert stopped.images == 400


def test_an_interrupted_run_goes_on_where_it_stopped_and_ends_the_same(mixed, monkeypatch, tmp_path):
    model, loader = mixed
    plan = draw_persistent(stored_tensors(model, loader.dataset[0][0]), 3, seed=5)
    monkeypatch.setattr(persistent, "FAULTS", 16)
    calls = []
    look = persistent._Run._look

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return look(self, *arguments)

    monkeypatch.setattr(persistent._Run, "_look", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_persistent(model, loader, plan, image_batch=5, shard_dir=tmp_path)
    found = run_persistent(model, loader, plan, image_batch=5, shard_dir=tmp_path)
    assert len(calls) == 2 * -(-len(plan) // 16) + 1
    expected = run_persistent(model, loader, plan, image_batch=5)
    pd.testing.assert_frame_equal(found.outcomes, expected.outcomes)
    pd.testing.assert_frame_equal(found.by_image, expected.by_image)
    with pytest.raises(CampaignMismatch, match="operation was flip, now stuck_at_0"):
        run_persistent(model, loader, plan, image_batch=5, shard_dir=tmp_path, operation="stuck_at_0")


def test_what_cannot_be_traced_runs_whole(capsys):
    torch.manual_seed(0)
    model = Untraceable().eval()
    loader = loader_for(model, (3, 2, 2))
    plan = draw_persistent(stored_tensors(model, loader.dataset[0][0]), 4, seed=0)
    assert_alike(run_persistent(model, loader, plan), run_persistent(model, loader, plan, engine="whole"))
    assert "going on with 'whole'" in capsys.readouterr().err


def test_weights_that_store_their_bits_in_their_own_way_are_refused_in_one_line():
    """As torchao's `quantize_` leaves them. The plan is made by hand, for `stored_tensors` refuses such a model."""
    model = nn.Linear(3, 3, bias=False)
    loader = loader_for(model, (3,))
    model.weight = nn.Parameter(TwoTensor(torch.eye(3), torch.eye(3)))
    at = {"index": [0], "neuron": 0, "bit": 1}
    runs = (
        lambda: stored_tensors(model, loader.dataset[0][0]),
        lambda: run_persistent(model, loader, pd.DataFrame({"layer": "weight", **at})),
        lambda: run_persistent(model, loader, pd.DataFrame({"layer": "", **at}), target="neuron"),
        lambda: run_stuck(model, loader, Array(2, 1), pd.DataFrame({"layer": "all", **at})),
    )
    for run in runs:
        with pytest.raises(
            UnsupportedModel, match=r"'weight' is a tensor of class TwoTensor, .*; give a model of plain tensors"
        ) as found:
            run()
        assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": "stam.weight"}, "'stam.weight', which no inference reads; there are stem.weight"),
        ({"neuron": 216}, "neuron 216 of 'stem.weight', which has neurons from 0 to 215"),
        ({"bit": 32}, "bit 32 of 'stem.weight', which has bits from 0 to 31"),
        ({"neuron": 0.5}, "column neuron holds float64"),
        ({"neuron": [0, 1]}, "several values"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_in_one_line(mixed, change, message):
    model, loader = mixed
    plan = pd.DataFrame({"layer": "stem.weight", "index": 0, "neuron": [0, 0], "bit": [1, 2]}).assign(**change)
    with pytest.raises(CampaignMismatch, match=message):
        run_persistent(model, loader, plan)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stop": 2}, "stop is 2"),
        ({"engine": "pytorchfi"}, "known: replay, whole"),
        ({"target": "weight"}, "known: neuron, stored"),
        ({"operation": "toggle"}, "toggle"),
        ({"image_batch": 0}, "image_batch is 0"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(mixed, arguments, message):
    model, loader = mixed
    plan = pd.DataFrame({"layer": ["stem.weight"], "index": 0, "neuron": 0, "bit": 1})
    with pytest.raises(TextguardError, match=message):
        run_persistent(model, loader, plan, **arguments)


def test_intervals_over_faults_and_images_hold_as_often_as_they_say_and_those_over_faults_alone_do_not():
    rng = np.random.default_rng(0)
    tensors, n, m, repetitions = 2, 30, 100, 300
    hold = faults_alone = 0
    for _ in range(repetitions):
        image = rng.gamma(0.5, 2.0, m)  # some images suffer from any fault
        outcomes = rng.gamma(2.0, 0.5, (tensors, n, 1)) * (0.5 + image) * rng.gamma(2.0, 0.5, (tensors, n, m))
        crossed = [Crossed(y.mean(axis=1), y.mean(axis=0), float((y**2).mean())) for y in outcomes]
        found = interval(crossed_mean(crossed, [1.0] * tensors, confidence=0.95), 0.95)
        hold += found.low <= 1.5 <= found.high
        alone = mean_interval(sample_mean([one.by_fault for one in crossed], [1 / tensors] * tensors, [0.0] * tensors), 0.95)
        faults_alone += alone.low <= 1.5 <= alone.high
    assert 0.93 <= hold / repetitions <= 0.99
    assert faults_alone / repetitions < 0.9


def test_what_neither_faults_nor_images_explain_counts_once():
    rng = np.random.default_rng(0)
    n, m, ratios = 60, 100, []
    for _ in range(20):
        y = rng.gamma(1.0, 1.0, (n, m))
        sample = crossed_mean([Crossed(y.mean(axis=1), y.mean(axis=0), float((y**2).mean()))], [1.0])
        ratios.append(sample.variance * n * m)
    assert 0.9 < np.mean(ratios) < 1.4  # of the true variance, 1; both ways together would say 2


def test_a_summary_has_each_tensor_and_their_means_plain_and_by_bits(mixed):
    model, loader = mixed
    tensors = [tensor for tensor in stored_tensors(model, loader.dataset[0][0]) if tensor.name in ("stem.weight", "head.bias")]
    result = run_persistent(model, loader, draw_persistent(tensors, 40, seed=0))
    summary = summarise_persistent(result)
    assert list(summary.tensors) == ["stem.weight", "head.bias"]
    for name, found in summary.tensors.items():
        of = result.outcomes[result.outcomes["layer"] == name]
        assert found["changed"].value == pytest.approx((of["changed"] / 10).mean())
        assert found["accuracy_lost"].value == pytest.approx(10 * (8 - of["correct"]).mean())
        assert found["sdc"].value == pytest.approx((of["eligible_changed"] / 8).mean())
        assert found["delta_loss"].value == pytest.approx(of["delta_loss"].mean())
        assert found["critical"].value == pytest.approx((of["changed"] > 0).mean())
        assert all(one.low <= one.value <= one.high for one in found.values())
    changed = [found["changed"].value for found in summary.tensors.values()]
    assert summary.mean["changed"].value == pytest.approx(np.mean(changed))
    assert summary.weighted["changed"].value == pytest.approx(np.average(changed, weights=[216, 5]))
    assert json.loads(json.dumps(summary.as_json()))["tensors"]["head.bias"]["changed"]["n"] == 40


LISTS = {
    'Injection,Layer,TensorIndex,Bit,critical\n0,conv,"(1, 0, 2, 1)",30,7\n1,fc,"(0, 1)",3,0\n': [
        ("conv.weight", 16, 30),
        ("fc.weight", 1, 3),
    ],
    "layer,neuron,bit\nconv.bias,1,31\nfc,0,0\n": [("conv.bias", 1, 31), ("fc.weight", 0, 0)],
}


@pytest.mark.parametrize("text", LISTS)
@pytest.mark.parametrize("suffix", [".csv", ".csv.xz", ".csv.gz"])
def test_lists_of_faults_are_read(tmp_path, text, suffix):
    model = nn.ModuleDict({"conv": nn.Conv2d(1, 2, 3), "fc": nn.Linear(2, 2)})
    pack = {".csv": bytes, ".csv.xz": lzma.compress, ".csv.gz": gzip.compress}[suffix]
    file = tmp_path / f"faults{suffix}"
    file.write_bytes(pack(text.encode()))
    plan = read_fault_list(file, model)
    assert list(plan[["layer", "neuron", "bit"]].itertuples(index=False, name=None)) == LISTS[text]
    assert plan.get("critical", pd.Series([7, 0])).tolist() == [7, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'Layer,TensorIndex,Bit\nconv,"(1, 0, 2, 1)",1\nconv,"(2, 0, 0, 0)",1\n',
            r"'\(2, 0, 0, 0\)' in row 2, column TensorIndex; allowed: 4",
        ),
        ('Layer,TensorIndex,Bit\nconv,"(1, 0)",1\n', "row 1, column TensorIndex"),
        ('Layer,TensorIndex,Bit\nconv,"(1, 0, -2, 1)",1\n', "row 1, column TensorIndex"),
        ("Layer,TensorIndex,Bit\nconw,(1),1\n", "'conw' in row 1, column Layer; allowed: a tensor of the model"),
        ("layer,neuron,bit\nconv,18,1\n", "18 in row 1, column neuron; allowed: from 0 to 17 in 'conv.weight'"),
        ("layer,neuron,bit\nconv,7,32\n", "32 in row 1, column bit; allowed: from 0 to 31"),
        ("layer,neuron,bit\nconv,,1\n", "'' in row 1, column neuron; allowed: a whole number"),
        ("layer,neuron\nconv,1\n", "needed are Layer, TensorIndex, Bit or layer, neuron, bit"),
        ("layer,neuron,bit\n", "lists no faults"),
        ("", "cannot be read"),
        ("layer,neuron,bit\nconv,1,2,3\n", "more cells than its header"),
    ],
)
def test_a_bad_row_of_a_list_is_named(tmp_path, text, message):
    file = tmp_path / "faults.csv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidArtifact, match=message) as caught:
        read_fault_list(file, nn.ModuleDict({"conv": nn.Conv2d(1, 2, 3)}))
    assert "\n" not in str(caught.value)


def test_other_files_are_no_lists(tmp_path):
    with pytest.raises(InvalidParameter, match=r"a list of faults is a file \.csv"):
        read_fault_list(tmp_path / "faults.txt", nn.Linear(1, 1))
    with pytest.raises(InvalidArtifact, match="is missing"):
        read_fault_list(tmp_path / "faults.csv", nn.Linear(1, 1))


def test_published_outcomes_of_weight_faults_come_out_again():
    """Without the images that they were measured on, random ones show which faults destroy the network and which do nothing."""
    files = REPOSITORY.parent / "shared" / "data" / "dnn_benchmarks"
    if not files.is_dir():
        pytest.skip("the published faults are not here")
    model = published(20, files)
    plan = read_fault_list(files / "ResNet20_FL.csv.xz", model)
    assert len(plan) == 16_627
    some = plan.iloc[np.linspace(0, len(plan) - 1, 100).astype(int)].reset_index(drop=True)
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(images, model(images).argmax(1)), batch_size=16)
    ours = run_persistent(model, loader, some).outcomes["changed"] / 16
    theirs = some["critical"] / some["n_injections"]
    assert ((ours > 0.5) == (theirs > 0.5)).mean() >= 0.97
    assert np.corrcoef(ours, theirs)[0, 1] > 0.9
