"""Corrupted images: what is done to them, campaigns on them, and what results, tables, figures and the page make of it."""

import doctest
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats

import textguard.estimates.ranks
import textguard.vision.corruptions
from bad_input_grid import says
from conftest import REPOSITORY, TinyResNet, settle
from stages.corruptions import inject_faults
from stored_grid import INJECT, STATISTICS, store_corruptions
from textguard.analysis.corruptions import compare_corruptions, difference_of
from textguard.analysis.files import load_compared_corruptions, load_results
from textguard.analysis.results import write_results
from textguard.errors import InvalidArtifact, InvalidParameter, UnknownName
from textguard.estimates.ranks import rank_correlation
from textguard.estimates.statistics import Estimate
from textguard.faults import Campaign, CampaignSettings
from textguard.faults.profiling import largest_outputs, profile_ranges
from textguard.params import load_params
from textguard.report.corruption_figures import draw_together
from textguard.report.figures import group, write_figures
from textguard.report.page import Revision, write_page
from textguard.report.tables import tables_of
from textguard.vision import transforms
from textguard.vision.corruptions import STRENGTHS, CorruptedView, Corruption
from textguard.vision.datasets import IMAGENET_MEAN, IMAGENET_STD, PackedSplit
from textguard.vision.transforms import evaluation_view, image_loader

VIEW = (16, 16, "bilinear")


def smooth(channels: int, count: int = 1, side: int = 32) -> torch.Tensor:
    """Images with large and small structures, as photographs have."""
    coarse = torch.rand(count, channels, 8, 8, generator=torch.manual_seed(channels))
    fine = torch.rand(count, channels, side, side, generator=torch.manual_seed(7))
    shown = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return (200 * shown + 55 * fine).to(torch.uint8)


def packed(images: torch.Tensor) -> PackedSplit:
    return PackedSplit(images, torch.arange(len(images)) % 4, list("abcd"), list(IMAGENET_MEAN), list(IMAGENET_STD))


@pytest.mark.parametrize("side", [32, 96])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", STRENGTHS)
def test_each_severity_is_farther_from_the_clean_image(kind, channels, side):
    (image,) = smooth(channels, side=side)
    before, state = image.clone(), torch.get_rng_state()
    worse = [Corruption(kind, severity, 0).apply(image, 3) for severity in range(1, 6)]
    distances = [(one.float() - image.float()).abs().mean().item() for one in worse]
    assert all(one.dtype == torch.uint8 and one.shape == image.shape for one in worse)
    assert distances == sorted(distances)
    assert len(set(distances)) == 5
    assert distances[0] > 0
    assert torch.equal(image, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_strengths_mean_what_they_say(tmp_path):
    grey = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    noise = Corruption("noise", 5, 0).apply(grey, 0).float() - 128
    assert noise.std().item() == pytest.approx(0.1 * 255, rel=0.05)
    assert Corruption("contrast", 2, 0).apply(torch.tensor([[[0, 200]]], dtype=torch.uint8), 0).tolist() == [[[50, 150]]]
    assert Corruption("brightness", 2, 0).apply(grey, 0).unique().tolist() == [int(128 * 1.2)]
    point = torch.zeros(1, 33, 33, dtype=torch.uint8)
    point[0, 16, 16] = 255
    spread = Corruption("blur", 5, 0).apply(point, 0)[0].float()
    sigma = 33 / 32  # of a Gaussian, whose middle holds 1 / (2 pi sigma^2) of it
    assert spread[16, 16].item() == pytest.approx(255 / (2 * np.pi * sigma**2), rel=0.03)
    (photo,) = smooth(3)
    Image.fromarray(photo.permute(1, 2, 0).numpy()).save(tmp_path / "x.jpg", quality=40)
    saved = np.array(Image.open(tmp_path / "x.jpg"))
    assert np.array_equal(saved, Corruption("jpeg", 5, 0).apply(photo, 0).permute(1, 2, 0).numpy())


def test_a_corruption_that_is_none_is_refused():
    with pytest.raises(UnknownName, match=r"corruption 'fog' in .*; known: blur, brightness, contrast, jpeg, noise"):
        Corruption("fog", 1, 0)
    for severity in (0, 6):
        with pytest.raises(InvalidParameter, match=f"severity is {severity}; it must be from 1 to 5"):
            Corruption("noise", severity, 0)


@pytest.mark.parametrize("kind", ["noise", "blur"])
def test_an_image_is_the_same_in_any_batch_and_from_any_split(kind, monkeypatch):
    split, corruption = packed(smooth(1, 7, 20)), Corruption(kind, 4, 5)
    kept = CorruptedView(split, *VIEW, corruption)
    together = torch.cat([images for images, _ in image_loader(kept, 7)])
    assert torch.equal(together, torch.cat([images for images, _ in image_loader(kept, 2)]))
    monkeypatch.setattr(transforms, "PREPARED_BYTES", 0)
    read_again = CorruptedView(split, *VIEW, corruption)
    assert read_again.prepared is None
    assert torch.equal(together, torch.cat([images for images, _ in image_loader(read_again, 3)]))
    assert [label for _, label in read_again.__getitems__([5, 0])] == [1, 0]
    assert torch.equal(read_again[5][0], together[5])
    other = CorruptedView(split, *VIEW, replace(corruption, seed=6))
    assert torch.equal(other[1][0], together[1]) == (kind != "noise")
    if kind == "noise":
        same = CorruptedView(packed(split.images[:1].repeat(2, 1, 1, 1)), *VIEW, corruption)
        assert not torch.equal(same[0][0], same[1][0]), "two images have the same noise"


def test_a_campaign_is_the_same_on_images_that_were_corrupted_before(tmp_path):
    torch.manual_seed(0)
    model, images, corruption = settle(TinyResNet()), smooth(3, 6, 16), Corruption("contrast", 3, 0)
    worse = torch.stack([corruption.apply(image, index) for index, image in enumerate(images)])
    with torch.inference_mode():
        labels = model(torch.stack([image for image, _ in evaluation_view(packed(worse), *VIEW)])).argmax(dim=1)
    clean, beforehand = packed(images), packed(worse)
    clean.labels = beforehand.labels = labels
    default = load_params(REPOSITORY / "params.yaml")
    inject = replace(default.inject, batch_size=16, image_batch=4, enumerate_up_to=0)
    params = replace(default, inject=inject, corruptions=replace(default.corruptions, injections_per_layer=12))
    ranges = profile_ranges(model, image_loader(evaluation_view(clean, *VIEW), 3))
    run = SimpleNamespace(model=model, image=images[0].float(), bounds={}, ranges=ranges)
    found, records = inject_faults(run, CorruptedView(clean, *VIEW, corruption), params, tmp_path, "test")
    plain = CampaignSettings(
        injections_per_layer=12,
        plan="guided",
        pilot=12,
        batch_size=16,
        image_batch=4,
        kinds=inject.kinds,
        seed=inject.seed,
    )
    view = evaluation_view(beforehand, *VIEW)
    result = Campaign(model, image_loader(view, 16), plain, largest_outputs(ranges)).run()
    pd.testing.assert_frame_equal(records, result.records)
    layers = result.layers.values()
    assert found["overall"]["delta_loss"]["value"] == pytest.approx(np.mean([layer.delta_loss.value for layer in layers]))
    assert found["overall"]["sdc"]["value"] == pytest.approx(np.mean([layer.sdc.value for layer in layers]))
    assert (found["images"], found["injections"]) == (6, 12 * len(layers))
    _, elsewhere = inject_faults(run, evaluation_view(clean, *VIEW), params, tmp_path / "clean", "test")
    assert not records.equals(elsewhere), "the images make no difference"


@pytest.mark.parametrize(
    ("place", "value", "parts"),
    [
        ("kinds", ["fog"], ['corruptions.kinds.0 is "fog"', "'noise', 'blur'"]),
        ("severities", [6], ["corruptions.severities.0 is 6", "less than or equal to 5"]),
        ("kinds", ["blur", "blur"], ["corruptions.kinds", "hold 'blur' once"]),
        ("datasets", ["cifar10"], ["data set 'cifar10'", "corruptions.datasets.0", "known: digits"]),
        ("severities", [1], ["corruptions.campaign_severities.0 is 3; it must be one of corruptions.severities, 1"]),
    ],
)
def test_a_mistake_in_params_yaml_is_one_line(untouched, place, value, parts):
    untouched.change(f"corruptions.{place}", value)
    says(untouched.fails("check"), "params.yaml", *parts)


def test_only_the_data_sets_that_are_named_are_studied(untouched):
    params = load_params(untouched.folder / "params.yaml")
    assert params.corrupted == {}
    untouched.change("corruptions.datasets", ["digits"])
    assert load_params(untouched.folder / "params.yaml").corrupted == params.runs


@pytest.fixture
def corrupted(runs, params):
    """The stored grid, of which data set d was tested on corrupted images, with its results."""
    for number, (key, run) in enumerate(runs.items()):
        if run.dataset == "d":
            store_corruptions(key, run.variant != "baseline", lost=20.0 - 5 * number)
    found = replace(params, corruptions=replace(params.corruptions, datasets=["d"], kinds=["noise"], severities=[1, 4]))
    vars(found)["runs"] = runs
    write_results(runs, STATISTICS, INJECT, found.corrupted)
    return found


def test_variants_are_compared_with_the_baseline(corrupted):
    compared = load_compared_corruptions(corrupted.corrupted)
    assert [(cell.dataset, cell.variant) for cell in compared.cells] == [("d", "template"), ("d", "descriptions")]
    found = {(effect.kind, effect.severity, effect.measure): effect for effect in compared.cells[1].effects}
    assert found["noise", 4, "top1"].effect.value == pytest.approx(20)  # 60 % against 40 %
    assert found["noise", 4, "top2diff"].effect.value == pytest.approx(10)
    assert found["noise", 4, "loss"].effect.value == pytest.approx(0.6 / 0.4)
    assert found["clean", 0, "top1"].effect.value == pytest.approx(0)
    assert found["clean", 0, "delta_loss"].effect.value == pytest.approx(2)
    assert found["noise", 4, "sdc"].own.value == pytest.approx(0.025)
    assert ("noise", 1, "sdc") not in found, "no faults were injected there"
    assert found["noise", 4, "top1"].verdict.startswith("1 training")
    results = load_results(corrupted.corrupted).values()
    assert [(one.dataset, one.measure, one.correlation.n) for one in compared.together] == [
        ("d", "delta_loss", 3),
        ("d", "sdc", 3),
    ]
    assert [both.lost.value for both in compared.classifiers] == [20, 15, 10]
    for one in compared.together:  # with the runs' own campaigns, which have more injections than those on corrupted images
        damage = [getattr(result.overall, one.measure).value for result in results]
        assert [getattr(both, one.measure).value for both in compared.classifiers] == damage
        assert one.correlation.value == pytest.approx(stats.spearmanr(damage, [20, 15, 10]).statistic, nan_ok=True)
    assert abs(compared.together[0].correlation.value) <= 1


def test_verdicts_are_of_the_side_that_an_effect_is_on(corrupted):
    runs = dict(corrupted.corrupted)
    results: dict = load_results(runs)
    for seed in (1, 2):
        for variant in ("baseline", "descriptions"):
            first = f"d-resnet18-{variant}-0"
            run = replace(runs[first], seed=seed)
            runs[run.key], results[run.key] = run, results[first]
            store_corruptions(run.key, variant != "baseline", 3.0)
    (cell,) = (cell for cell in compare_corruptions(runs, results, 0.99).cells if cell.variant == "descriptions")
    found = {(effect.severity, effect.measure): effect for effect in cell.effects}
    assert found[4, "top1"].verdict == "better"
    assert found[4, "top1"].effect.low > 0
    assert found[4, "loss"].verdict == "better"
    assert found[0, "top1"].verdict == "not separable at 99%"
    assert found[4, "sdc"].verdict == "better"
    for key, run in runs.items():  # the other way round
        store_corruptions(key, run.variant == "baseline", 3.0)
    (cell,) = (cell for cell in compare_corruptions(runs, results, 0.99).cells if cell.variant == "descriptions")
    said = {(effect.severity, effect.measure): effect.verdict for effect in cell.effects}
    assert (said[4, "top1"], said[4, "loss"], said[4, "sdc"]) == ("worse",) * 3


def test_a_difference_adds_distances_in_quadrature():
    found = difference_of(Estimate(8, 5, 9, 10), Estimate(2, 1, 6, 20))
    assert (found.value, found.low, found.high, found.n) == (6, 1, pytest.approx(6 + 2**0.5), 10)


def test_rank_correlations_are_spearmans_and_their_intervals_hold():
    assert doctest.testmod(textguard.estimates.ranks).failed == doctest.testmod(textguard.vision.corruptions).failed == 0
    draw, hits = np.random.default_rng(0), 0
    for _ in range(300):
        both = draw.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 24)
        found = rank_correlation(*both.T, confidence=0.9)
        assert found.value == pytest.approx(stats.spearmanr(both).statistic)
        hits += found.low < 6 / np.pi * np.arcsin(0.3) < found.high  # Spearman's of such a distribution
    assert 255 <= hits <= 285
    line = np.arange(9.0)
    assert rank_correlation(line, line).value == 1 == rank_correlation(line, line).high
    assert 0.5 < rank_correlation(line, line).low < 1
    assert rank_correlation(line, -line).low == -1
    assert np.isnan(rank_correlation(line, np.ones(9)).value)
    assert rank_correlation(np.array([1, 2, np.nan]), np.array([1, 2, 3.0])) == Estimate(1.0, -1.0, 1.0, 2)


def test_tables_and_figures_show_them(corrupted):
    tables = {table.name: table for table in tables_of(corrupted)}
    worse, together = tables["corruptions"], tables["faults_and_corruptions"]
    assert [row[:4] for row in worse.rows] == [
        ["d", "resnet18", variant, images]
        for variant in ("template", "descriptions")
        for images in ("clean", "noise 1", "noise 4")
    ]
    row = dict(zip(worse.headers, worse.rows[5], strict=True))
    assert (row["Top-1 Baseline (%)"].value, row["Top-1 Ours (%)"].value) == pytest.approx((40, 60))
    assert row["Top-1 (points)"].estimate.value == pytest.approx(20)
    assert row["SDC Ours (%)"].value == pytest.approx(2.5)
    assert dict(zip(worse.headers, worse.rows[4], strict=True))["SDC (x)"] is None
    assert [row[1] for row in together.rows] == ["DeltaLoss", "SDC"]
    results = list(load_results(corrupted.runs).values())
    folder = Path("plots/figures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("textguard.report.figures.PER_BACKBONE", {})
        patch.setattr("textguard.report.figures.DRAWN_BY_DVC", ())
        patch.setattr("textguard.report.figures._draw_hardware", lambda *_: None)
        write_figures(results, [], corrupted, folder)
    curve, points = (pd.read_csv(folder / f"{name}.csv") for name in ("corruptions-d-resnet18", "faults_and_corruptions"))
    assert curve.groupby(["run", "kind", "severity"])["value"].first()["d-resnet18-baseline-0", "noise", 4] == pytest.approx(40)
    assert set(points["run"]) == set(corrupted.corrupted)
    assert not (folder / "corruptions-e-alexnet.png").exists(), "data set e is not studied"


def test_the_page_shows_them_where_they_were_studied(corrupted, monkeypatch):
    monkeypatch.setattr("textguard.report.page.FIGURES", {"corruptions": "Accuracy on corrupted images"})
    names = ("improvement", "tradeoff", "range_effect", "faults_and_corruptions", "corruptions-d-resnet18")
    for name in names:
        file = Path("plots/figures") / f"{name}.svg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4"/>', encoding="utf-8")
    page = replace(corrupted, texts={})
    vars(page)["runs"] = corrupted.runs
    write_page(Path("page.html"), page, Revision("", "", changed=False))
    shown = Path("page.html").read_text(encoding="utf-8")
    assert [f'id="picture-{name}"' in shown for name in (*names, "corruptions-e-alexnet")] == [True] * 5 + [False]
    assert "Corrupted images" in shown
    assert "Whether what stands faults stands corruption" in shown


def test_results_of_other_runs_are_refused(corrupted):
    runs = {key: run for key, run in corrupted.corrupted.items() if run.variant != "template"}
    with pytest.raises(InvalidArtifact, match=r"corruptions\.json .*does not have the cells"):
        load_compared_corruptions(runs)
    file = Path("metrics/corruptions") / "d-resnet18-baseline-0.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["conditions"] = content["conditions"][1:]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InvalidArtifact, match="must have clean images first"):
        compare_corruptions(corrupted.corrupted, {}, 0.99)
    assert load_compared_corruptions({}).cells == []


def test_a_figure_of_some_classifiers_says_of_how_many_it_tells(monkeypatch):
    monkeypatch.chdir(REPOSITORY / "grids" / "factorial")
    params = load_params()
    variants = [
        variant
        for found in group([run for run in load_results(params.runs).values() if run.variant in params.drawn], params).values()
        for variant in found
    ]
    compared = load_compared_corruptions(params.corrupted)
    figure, numbers = draw_together(variants, compared)
    assert figure.get_label().startswith("Over 64 classifiers")
    assert len(numbers) == 2 * 12, "both measures of those that are drawn"
    assert "one mark per training, 12 of 64 drawn" in " ".join(figure.get_supxlabel().split())
