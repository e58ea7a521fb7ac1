"""Results and figures from stored records."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axis import Tick
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from conftest import REPOSITORY
from textguard.artifacts import write_json, write_parquet
from textguard.errors import InvalidArtifact, InvalidParameter
from textguard.estimates.statistics import Estimate, exact, sample_mean
from textguard.estimates.summary import LayerResult, Totals
from textguard.params import FiguresParams, Params, RunParams, StatisticsParams, load_params
from textguard.report.architecture import draw_architecture
from textguard.report.breakdown import describe_layer, sums_by_bit
from textguard.report.cells import Cell, trainings
from textguard.report.figures import DRAWN_BY_DVC, PER_BACKBONE, write_figures
from textguard.report.improvement import across, draw_pairs, improvement, verdict, weigh
from textguard.report.results import load_cells, load_closeup, load_result, load_run, write_results
from textguard.report.run_figures import crossings

COLOURS = {"baseline": "#d55e00", "random": "#7f7f7f", "template": "#56b4e9", "descriptions": "#0072b2"}
STATISTICS = StatisticsParams(0.99, 300, "goldeneye", "neurons", 2e-5, "neurons")
INJECTIONS = 200
SETTINGS = {
    **{"seed": 0, "plan": "uniform", "images": "uniform", "injections_per_layer": INJECTIONS, "pilot": 64, "stop_at": "never"},
    **{"enumerate_up_to": 1, "faults": {}, "format": "fp32", "kinds": ["Conv2d", "Linear"], "detector": "profiled"},
}


def campaign_of(layers: dict[str, tuple[int, float]], exact_layer: str, seed: int) -> tuple[dict, pd.DataFrame, pd.DataFrame]:
    """What the stage inject leaves: layer -> (neurons, mean DeltaLoss); one layer is enumerated, without a spread."""
    draw = np.random.default_rng(seed)
    records = []
    for layer, (_, mean) in layers.items():
        if layer == exact_layer:
            continue
        loss = draw.exponential(mean, INJECTIONS).astype("float32")
        records.append(
            pd.DataFrame(
                {
                    **{
                        "layer": layer,
                        "index": range(INJECTIONS),
                        "image": 0,
                        "neuron": 0,
                        "bit": draw.integers(0, 32, INJECTIONS),
                    },
                    **{"weight": 1.0, "golden_value": 0.0, "faulty_value": 0.0, "detected": np.arange(INJECTIONS) < 10},
                    **{"masked": False, "golden_loss": 0.0, "faulty_loss": loss, "mismatch": np.arange(INJECTIONS) < 20},
                }
            )
        )
    together = pd.concat(records, ignore_index=True)
    changed = together[together["detected"]].assign(faulty_loss=math.nan, detector="off")
    neurons, mean = layers[exact_layer]
    totals = Totals(exact_layer, neurons, *(np.full(32, number) for number in (100, 5, 10, 20, 0)), np.full(32, 100 * mean))
    stored = {
        "layers": [
            {"layer": layer, "kind": "Linear", "neurons": neurons, "multiply_adds": 2 * neurons}
            for layer, (neurons, _) in layers.items()
        ],
        **{
            "bits": 32,
            "strata": 0,
            "eligible_images": 40,
            "detectors": ["profiled", "off"],
            "skipped": {},
            "settings": SETTINGS,
        },
        "exact": {name: [totals.as_json()] for name in ("profiled", "off")},
    }
    return stored, together, changed


def store(key: str, run: RunParams, layers: dict[str, tuple[int, float]], correct: int, seed: int = 0) -> None:
    out, records_out = Path("metrics/runs") / key, Path("metrics/records") / key
    stored, records, changed = campaign_of(layers, list(layers)[-1], seed)
    write_json(out / "campaign.json", stored)
    write_parquet(records_out / "injections.parquet", records)
    write_parquet(records_out / "detectors.parquet", changed)
    guided = run.variant != "baseline"
    cost = {"parameters": 11_000_000 + 250_000 * guided, "multiply_adds": 40_000_000}
    write_json(out / "evaluation.json", {**cost, "scale": 12.0 if guided else 1.0})
    top2diff = np.full(100, 0.95 if guided else 0.9)
    predictions = pd.DataFrame({"label": 0, "prediction": np.arange(100) >= correct, "loss": 0.1, "top2diff": top2diff})
    write_parquet(records_out / "predictions.parquet", predictions)
    ranges = pd.DataFrame(
        {
            **{"layer": list(layers), "kind": "Conv2d", "neurons": 1, "max_abs": np.arange(len(layers)) + 2.0},
            **{"mean_abs": 0.5, "images": 50},
        }
    )
    ranges.to_csv(out / "ranges.csv", index=False)
    epochs = pd.DataFrame({"epoch": [1, 2], "loss": [2.0, 1.0], "accuracy": [0.5, 0.6], "learning_rate": 0.1})
    epochs.to_csv(out / "training.csv", index=False)
    curve = pd.DataFrame({"threshold_percent": range(41), "accuracy_percent": [100 - i for i in range(41)]})
    curve.to_csv(out / "thresholds.csv", index=False)
    store_closeup(key)


def store_closeup(key: str) -> None:
    """What stage closeup leaves: two images under two kinds of faults, the second of which leaves nothing finite."""
    powers = list(range(-40, 39))
    shares = [float(power == 0) for power in powers]
    last = {"layer": "fc", "profiled": 2.0, "images": 50, "powers": powers, "golden": shares, "faulty": shares}
    found = {name: {"value": 0.5, "low": 0.4, "high": 0.6, "n": 2} for name in ("rank_correlation", "overlap", "changed")}
    cam = {"layer": "conv1", "places": 4, "images": 2, "detector": "off", "weights": {**found, "flips": 2000, "finite": 2}}
    cam["worst"] = {**found, "finite": 0, "target": "neuron", "layer": "conv1", "neuron": 7, "bit": 30}
    write_json(Path(f"metrics/closeup/{key}.json"), {"last_layer": {**last, "beyond": 0.1, "not_finite": 0.01}, "cam": cam})
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (90, 90, 90)).save(file, "png")
    looks = pd.DataFrame(
        {
            **{"image": image, "label": 0, "class": "<b>$x", "state": state, "finite": state != "worst", "prediction": image},
            **{"predicted": "a very long class", "confidence": 0.5, "map": [0.0, -1.0, 2.0, 1.0]},
            **{"picture": file.getvalue() if state == "golden" else b""},
        }
        for image in (0, 1)
        for state in ("golden", "weights", "worst")
    )
    write_parquet(Path(f"metrics/closeup/{key}.parquet"), looks)


BASELINE_LAYERS = {"conv1": (100, 0.2), "fc": (10, 3.0)}
GUIDED_LAYERS = {"backbone.conv1": (100, 0.1), "backbone.fc": (90, 0.2), "head": (10, 1.2)}


@pytest.fixture
def runs(tmp_path, monkeypatch) -> dict[str, RunParams]:
    """A baseline and two text-guided runs of one backbone, and a baseline without a partner: stored, and their results."""
    monkeypatch.chdir(tmp_path)
    runs = {}
    for seed, variant in enumerate(("baseline", "template", "descriptions")):
        key = f"d-resnet18-{variant}-s0"
        runs[key] = RunParams("d", "resnet18", variant, "r", 0, "x", None)
        store(key, runs[key], BASELINE_LAYERS if variant == "baseline" else GUIDED_LAYERS, 97, seed)
    runs["e-alexnet-baseline-s0"] = RunParams("e", "alexnet", "baseline", "r", 0, "x", None)
    store("e-alexnet-baseline-s0", runs["e-alexnet-baseline-s0"], {"conv1": (100, 0.2), "fc": (10, 1.0)}, 50)
    write_results(runs, STATISTICS)
    return runs


def value(estimate: dict) -> float:
    return estimate["value"]


def test_every_number_of_a_run_has_an_interval(runs):
    run = load_run("d-resnet18-baseline-s0")
    conv, last = run["layers"]
    assert (conv["method"], conv["injections"], conv["detected"]) == ("sampled", 200, 10)
    assert conv["delta_loss"]["low"] < value(conv["delta_loss"]) < conv["delta_loss"]["high"]
    assert value(conv["delta_loss"]) == pytest.approx(0.2, rel=0.3)
    assert conv["sdc"]["low"] < value(conv["sdc"]) == 0.1 < conv["sdc"]["high"]
    assert (last["method"], last["injections"]) == ("exact", 3200)
    assert last["delta_loss"] == {"value": 3.0, "low": 3.0, "high": 3.0, "n": 3200}
    assert value(last["sdc"]) == 0.2
    overall = run["overall"]
    assert value(overall["delta_loss"]) == pytest.approx((value(conv["delta_loss"]) + 3.0) / 2)
    assert value(overall["delta_loss_by_neurons"]) == pytest.approx((100 * value(conv["delta_loss"]) + 10 * 3.0) / 110)
    assert value(overall["sdc"]) == pytest.approx(0.15)
    assert overall["sdc"]["low"] < 0.15 < overall["sdc"]["high"]
    assert value(run["top1"]) == 0.97
    assert (run["largest_logit"], load_run("d-resnet18-descriptions-s0")["largest_logit"]) == (3.0, 12 * 4.0)


def test_the_parts_of_a_sample_average_to_its_estimate(runs):
    run = load_run("d-resnet18-baseline-s0")
    conv, last = run["layers"]
    assert len(run["top1"]["blocks"]) == len(conv["delta_loss"]["blocks"]) == len(conv["sdc"]["blocks"]) == 32
    assert np.mean(conv["delta_loss"]["blocks"]) == pytest.approx(value(conv["delta_loss"]), rel=0.05)
    assert "blocks" not in last["delta_loss"]
    overall = np.array(run["overall"]["delta_loss"]["blocks"])
    assert overall == pytest.approx((np.array(conv["delta_loss"]["blocks"]) + value(last["delta_loss"])) / 2, rel=1e-4)
    assert "blocks" not in run["last_layer"]["delta_loss"]


def test_failures_in_time_come_from_bits_neurons_and_sdc(runs):
    run = load_run("d-resnet18-baseline-s0")
    conv, last = run["layers"]
    assert value(conv["fit"]) == pytest.approx(2e-5 * 32 * 100 * 0.1)
    assert value(last["fit"]) == pytest.approx(2e-5 * 32 * 10 * 0.2)
    assert value(run["overall"]["fit"]) == pytest.approx(value(conv["fit"]) + value(last["fit"]))
    write_results(runs, StatisticsParams(0.99, 300, "goldeneye", "neurons", 2e-5, "multiply_adds"))
    assert value(load_run("d-resnet18-baseline-s0")["layers"][0]["fit"]) == pytest.approx(2 * value(conv["fit"]))


def test_a_layer_without_sdc_has_a_bound_for_its_failures(runs):
    file = Path("metrics/records/d-resnet18-baseline-s0/injections.parquet")
    write_parquet(file, pd.read_parquet(file).assign(mismatch=False))
    write_results(runs, STATISTICS)
    fit = load_run("d-resnet18-baseline-s0")["layers"][0]["fit"]
    assert fit["value"] is None
    assert fit["high"] > 0


def test_the_last_layer_is_the_weighted_mean_of_latent_layer_and_head(runs):
    def last_layer(weights: str) -> float:
        write_results(runs, StatisticsParams(0.99, 300, "goldeneye", weights, 2e-5, "neurons"))
        assert value(load_run("d-resnet18-baseline-s0")["last_layer"]["delta_loss"]) == 3.0
        return value(load_run("d-resnet18-descriptions-s0")["last_layer"]["delta_loss"])

    latent = value(load_run("d-resnet18-descriptions-s0")["layers"][1]["delta_loss"])
    assert last_layer("neurons") == pytest.approx(0.9 * latent + 0.1 * 1.2)
    assert last_layer("equal") == pytest.approx((latent + 1.2) / 2)
    assert last_layer("head_only") == 1.2


def test_improvement_is_baseline_over_guided_with_interval_and_verdict(runs):
    baseline, guided = load_run("d-resnet18-baseline-s0"), load_run("d-resnet18-descriptions-s0")
    assert baseline["improvement"] is None
    found = guided["improvement"]
    expected = value(baseline["overall"]["delta_loss"]) / value(guided["overall"]["delta_loss"])
    assert value(found["overall"]) == pytest.approx(expected)
    assert found["overall"]["low"] < expected < found["overall"]["high"]
    assert found["verdict"] == {"overall": "better", "last_layer": "better", "head": "better"}
    assert value(found["head"]) == pytest.approx(3.0 / 1.2)  # both are enumerated
    assert value(found["top2diff"]) == pytest.approx(0.05)
    by_layer = [layer.get("improvement") for layer in guided["layers"]]
    assert value(by_layer[0]) == pytest.approx(2.0, rel=0.5)
    assert by_layer[2] is None  # the baseline has no such layer


def test_non_finite_losses_are_left_out_or_capped_and_never_forgotten(runs):
    def off(nonfinite: str) -> dict:
        write_results(runs, StatisticsParams(0.99, 300, nonfinite, "neurons", 2e-5, "neurons"))
        return load_run("d-resnet18-baseline-s0")["detectors"]["off"]

    left_out, capped = off("goldeneye"), off("cap:50")
    assert (
        value(left_out["nonfinite"]) == value(capped["nonfinite"]) == pytest.approx(0.05 / 2)
    )  # 10 of 200, in one of 2 layers
    assert value(left_out["overall"]["sdc"]) == value(capped["overall"]["sdc"]) == pytest.approx((0.1 + 0.2) / 2)
    assert value(capped["overall"]["delta_loss"]) > value(left_out["overall"]["delta_loss"]) + 1
    for policy in ("cap", "cap:-1", "cap:x", "none"):
        with pytest.raises(InvalidParameter, match=r"statistics\.nonfinite is .*; allowed: goldeneye, or cap:X"):
            off(policy)


def layer_result(values: np.ndarray | float) -> LayerResult:
    if isinstance(values, float):
        mean, strata = exact(values, 100), []
    else:
        mean, strata = sample_mean([values], [1.0], [2 * values.max()]), [values]
    return LayerResult("x", 1, "sampled", 100, 0, 0, 0, mean, mean, mean, mean, np.ones(len(strata)), strata)


def test_shared_injections_narrow_an_improvement():
    draw = np.random.default_rng(0)
    base = draw.exponential(1.0, 2000)
    widths = []
    for other in (base * 0.5 + draw.exponential(0.01, 2000), draw.permutation(base) * 0.5 + draw.exponential(0.01, 2000)):
        pairs = draw_pairs([layer_result(base)], [layer_result(other)], 500, seed=1)
        found = improvement(pairs[0][0], pairs[1][0], 0.99).estimate
        assert found.low < 2 < found.high
        widths.append(math.log(found.high / found.low))
    assert widths[0] < widths[1] / 2


def test_exact_layers_give_exact_improvements():
    pairs = draw_pairs([layer_result(3.0), layer_result(1.0)], [layer_result(1.0), layer_result(0.5)], 200, seed=1)
    found = improvement(weigh(pairs[0], [1, 1]), weigh(pairs[1], [1, 1]), 0.99).estimate
    assert found == Estimate(pytest.approx(4 / 1.5), pytest.approx(4 / 1.5), pytest.approx(4 / 1.5), 200)
    assert verdict(found, 0.99) == "better"
    nothing = improvement(pairs[0][0], draw_pairs([], [layer_result(0.0)], 200, seed=1)[1][0], 0.99).estimate
    assert math.isnan(nothing.value)
    assert verdict(nothing, 0.99) == "not separable at 99%"


def test_several_trainings_widen_an_improvement():
    draw = np.random.default_rng(0)
    found = []
    for factor in (2.0, 4.0, 8.0):
        base, guided = draw.exponential(factor, 3000), draw.exponential(1.0, 3000)
        pairs = draw_pairs([layer_result(base)], [layer_result(guided)], 300, seed=1)
        found.append(improvement(pairs[0][0], pairs[1][0], 0.99))
    assert across(found[:1], 0.99) == found[0].estimate
    together = across(found, 0.99)
    assert together.value == pytest.approx(4.0, rel=0.1)
    assert together.low < 2
    assert together.high > 8
    assert verdict(together, 0.99) == "not separable at 99%"


def test_seeds_of_a_cell_share_a_row(runs, tmp_path):
    for seed in (1, 2):
        for variant, layers in (("baseline", BASELINE_LAYERS), ("descriptions", GUIDED_LAYERS)):
            key = f"d-resnet18-{variant}-s{seed}"
            runs[key] = RunParams("d", "resnet18", variant, "r", seed, "x", None)
            store(key, runs[key], layers, 90 + seed, 10 + seed)
    write_results(runs, STATISTICS)
    cells = load_cells(runs)
    assert [(cell["variant"], cell["seeds"]) for cell in cells] == [("template", [0]), ("descriptions", [0, 1, 2])]
    top1 = cells[1]["top1"]
    assert value(top1) == pytest.approx((0.97 + 0.91 + 0.92) / 3)
    assert top1["low"] < 0.8
    assert cells[1]["overall"]["low"] < value(cells[1]["overall"]) < cells[1]["overall"]["high"]


def test_the_summary_has_a_few_short_columns_per_variant(runs):
    lines = json.loads(Path("metrics/summary.json").read_text())
    assert {variant: list(line) for variant, line in lines.items()} == {
        "baseline": ["top1", "sdc", "dl"],
        "template": ["top1", "sdc", "dl", "x_last", "x_all"],
        "descriptions": ["top1", "sdc", "dl", "x_last", "x_all"],
    }
    assert lines["baseline"]["top1"] == pytest.approx((97 + 50) / 2)
    cell = load_cells(runs)[1]
    assert lines["descriptions"]["x_last"] == pytest.approx(value(cell["last_layer"]), rel=1e-4)


def test_the_same_records_give_the_same_bytes(runs):
    files = [Path("metrics/summary.json"), Path("metrics/cells.json"), *Path("metrics/results").iterdir()]
    before = {file: file.read_bytes() for file in files}
    write_results(runs, STATISTICS)
    assert {file: file.read_bytes() for file in files} == before


@pytest.fixture
def params(runs) -> Params:
    """The default grid's parameters with the runs above, and what is known of their texts."""
    default = load_params(REPOSITORY / "params.yaml")
    texts = {f"d-{variant}": default.texts[f"digits-{variant}"] for variant in ("template", "descriptions")}
    for key, answers, embedded in (("d-template", 10, 10), ("d-descriptions", 150, 148)):
        write_json(Path(f"metrics/texts/{key}.json"), {"answers": answers, "embedded": embedded, "encoder": "minilm"})
    return replace(
        default, texts=texts, recipes={"r": default.recipes["resnet"]}, runs=runs, figures=FiguresParams(COLOURS, 60)
    )


def test_figures_come_with_their_numbers_and_the_same_bytes_each_time(runs, params, tmp_path):
    results = [load_result(key, run) for key, run in runs.items()]
    for folder in ("a", "b"):
        write_figures(results, load_cells(runs), params, tmp_path / folder)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 4 * (2 * (len(PER_BACKBONE) + 1) + 2) + len(DRAWN_BY_DVC) + 1
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    numbers = pd.read_csv(tmp_path / "a" / "delta_loss-d-resnet18.csv")
    assert numbers.groupby("variant").size().to_dict() == {"baseline": 2, "template": 3, "descriptions": 3}
    together = pd.read_csv(tmp_path / "a" / "delta_loss.csv")
    assert together.groupby(["dataset", "backbone"]).size().to_dict() == {("d", "resnet18"): 8, ("e", "alexnet"): 2}
    assert (tmp_path / "a" / "value_ranges-d-resnet18.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("counts", "said"), [([1, 1], "1 training"), ([3, 3], "3 trainings"), ([3, 1], "1 to 3 trainings")], ids=str
)
def test_captions_say_how_many_trainings(counts, said):
    assert trainings([Cell("v", "#000000", [None] * count) for count in counts]) == said


def test_no_text_leaves_its_figure(runs, params, tmp_path, monkeypatch):
    results = [load_result(key, run) for key, run in runs.items()]
    trained_twice = results + [replace(result, run=replace(result.run, seed=1)) for result in results]
    drawn = []

    def look(figure, numbers, stem, dpi):
        FigureCanvasAgg(figure).draw()
        unseen = [label for tick in figure.findobj(Tick) for label in (tick.label1, tick.label2)]  # those beyond the limits
        texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text not in unseen]
        room = figure.bbox.padded(1)
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
        outside = [text for text, box in boxes if not (room.contains(*box.min) and room.contains(*box.max))]
        assert outside == [], stem.name
        drawn.append(stem.name)

    monkeypatch.setattr("textguard.report.figures.save_figure", look)
    write_figures(trained_twice, load_cells(runs), params, tmp_path)
    assert len(drawn) == 2 * (len(PER_BACKBONE) + 1) + 2


def cells_of(runs: dict[str, RunParams], dataset: str) -> list[Cell]:
    return [
        Cell(run.variant, COLOURS[run.variant], [load_result(key, run)]) for key, run in runs.items() if run.dataset == dataset
    ]


def words(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_the_architecture_is_drawn_from_parameters_and_measured_numbers(runs, params):
    figure, table = draw_architecture(cells_of(runs, "d"), "resnet18 on d", params)
    numbers = table.set_index("variant")
    assert list(numbers.index) == ["baseline", "template", "descriptions"]
    described = params.texts["d-descriptions"]
    drawn = numbers.loc["descriptions"]
    assert (drawn["questions"], drawn["samples"]) == (len(described.questions), described.samples)
    assert (drawn["answers"], drawn["embedded"], drawn["encoder"]) == (150, 148, "minilm")
    assert (drawn["classes"], drawn["width"], drawn["image_size"]) == (10, 90, params.recipes["r"].image_size)
    assert numbers["parameters"].to_list() == [load_run(key)["parameters"] for key, run in runs.items() if run.dataset == "d"]
    assert numbers["extra_parameters"].to_list() == [0, 250_000, 250_000]
    assert math.isnan(numbers.loc["baseline", "width"])
    said = words(figure)
    assert {"10 classes x 5 questions", "x 3 answers", "150 texts", "148 kept", "“a photo of a [class]”", "10 x 90"} <= set(
        said
    )
    assert any("11,250,000 parameters (+250,000)" in text for text in said)


def test_a_grid_of_baselines_has_an_architecture_without_texts(runs, params):
    figure, table = draw_architecture(cells_of(runs, "e"), "alexnet on e", replace(params, texts={}))
    assert table["variant"].to_list() == ["baseline"]
    assert "its own last layer" in words(figure)
    assert not any("guided" in text or "text" in text or "head" in text for text in words(figure))


def test_the_architecture_says_what_starts_without_texts(runs, params):
    cells = cells_of(runs, "d")[1:]
    runs_without = [RunParams("d", "resnet18", "random", "r", 0, "x", None)]
    runs_without.append(RunParams("d", "resnet18", "descriptions", "r", 0, "features/gpt.pth", None))
    others = [
        Cell(run.variant, cell.colour, [replace(cell.results[0], run=run)])
        for cell, run in zip(cells, runs_without, strict=True)
    ]
    figure, table = draw_architecture(others, "resnet18 on d", params)
    said = words(figure)
    assert {"no text: nothing is asked, nothing encoded", "random numbers", "from the file gpt.pth", "vectors"} <= set(said)
    assert table["answers"].to_list() == [0, 0]
    assert table["extra_parameters"].isna().all()


def overlapping(figure) -> list[tuple[str, str]]:
    boxes = [(text.get_text(), text.get_window_extent()) for text in figure.axes[0].texts]
    return [
        (one, other)
        for number, (one, first) in enumerate(boxes)
        for other, second in boxes[number + 1 :]
        if first.padded(-1).overlaps(second.padded(-1))
    ]


def test_long_names_do_not_overlap_in_the_architecture(runs, params, tmp_path):
    write_json(
        Path("metrics/texts/d-descriptions.json"),
        {
            "answers": 1_000_000,
            "embedded": 999_999,
            "encoder": "open_clip:ViT-B-16-SigLIP-i18n-256:/checkpoints/webli.safetensors",
        },
    )
    template = replace(params.texts["d-template"], questions=["a bad photo of many of the many, many handwritten {class}"])
    params = replace(params, texts=params.texts | {"d-template": template})
    for cells in (cells_of(runs, "d"), cells_of(runs, "d")[:2], cells_of(runs, "d")[1:]):
        figure, _ = draw_architecture(cells, "resnet18 on d", params)
        assert overlapping(figure) == []


def test_a_layer_is_broken_down_by_bit_and_by_outcome(runs):
    conv, last = load_run("d-resnet18-baseline-s0")["layers"]
    assert conv["outcomes"] == {"masked": 0.0, "benign": 0.9, "sdc": 0.1, "nonfinite": 0.0}
    assert last["outcomes"] == {"masked": 0.05, "benign": 0.75, "sdc": 0.2, "nonfinite": 0.0}
    assert sum(conv["by_bit"]["n"]) == INJECTIONS
    pooled = np.nansum(np.array(conv["by_bit"]["n"]) * np.array(conv["by_bit"]["delta_loss"], float)) / INJECTIONS
    assert pooled == pytest.approx(value(conv["delta_loss"]), rel=1e-4)
    assert last["by_bit"] == {"n": [100] * 32, "delta_loss": [3.0] * 32, "sdc": [0.2] * 32}


def test_bits_that_were_hit_more_often_count_no_more():
    columns = ["index", "bit", "weight", "masked", "golden_loss", "faulty_loss", "mismatch"]
    rows = [(0, 0, 1.0, True, 0.0, 0.0, False), (1, 1, 0.5, False, 0.0, 2.0, True), (2, 1, 1.5, False, 0.0, math.inf, False)]
    sums = sums_by_bit(pd.DataFrame(rows, columns=columns), 3)
    drawn = describe_layer(sums, strata=0)
    assert drawn["outcomes"] == pytest.approx({"masked": 1 / 3, "benign": 0, "sdc": 0.5 / 3, "nonfinite": 1.5 / 3}, abs=1e-6)
    assert drawn["by_bit"] == {"n": [1, 2, 0], "delta_loss": [0.0, 2.0, None], "sdc": [0.0, 1.0, None]}
    by_bit = describe_layer(sums.iloc[:2], strata=2)["outcomes"]
    assert by_bit == {"masked": 0.5, "benign": 0.0, "sdc": 0.125, "nonfinite": 0.375}


def test_convergence_ends_at_the_sampled_layers_mean(runs):
    run = load_run("d-resnet18-baseline-s0")
    assert [point["injections_per_layer"] for point in run["convergence"]] == [8, 16, 32, 64, 128, 200]
    last = {name: run["convergence"][-1][name] for name in ("value", "low", "high", "n")}
    assert last == {name: run["layers"][0]["delta_loss"][name] for name in last}


def test_the_crossing_is_the_last_one_up_or_down():
    at = np.array([0.0, 1.0, 2.0, 3.0])
    baseline = np.array([10.0, 8.0, 6.0, 4.0])
    assert crossings(at, baseline, np.array([9.0, 9.0, 5.0, 5.0])) == [(2.5, 5.0)]
    assert crossings(at, baseline, np.array([12.0, 9.0, 4.0, 2.0])) == [(1 + 1 / 3, pytest.approx(22 / 3))]
    assert crossings(at, baseline, np.array([11.0, 8.0, 6.0, 3.0])) == [(1.0, 8.0)]  # level in between
    for never in (baseline, baseline + 1, baseline - 1, np.array([9.0, 8.0, 6.0, 4.0]), np.array([9.0, 8.0, 5.0, 4.0])):
        assert crossings(at, baseline, never) == []


def test_damaged_metrics_are_named(runs):
    for name in ("evaluation.json", "campaign.json"):
        path = Path("metrics/runs/d-resnet18-baseline-s0") / name
        whole = path.read_text()
        for damage in ("{", "[]", "{}", '{"layers": [{"layer": "x"}]}', '{"layers": []}'):
            path.write_text(damage)
            with pytest.raises(InvalidArtifact, match=rf"{name} "):
                write_results(runs, STATISTICS)
        path.write_text(whole)
    path = Path("metrics/results/d-resnet18-baseline-s0.json")
    for damage in ("{", "[]", "{}", '{"top1": {"value": "x"}}'):
        path.write_text(damage)
        with pytest.raises(InvalidArtifact, match=r"d-resnet18-baseline-s0\.json cannot be read"):
            load_result("d-resnet18-baseline-s0", runs["d-resnet18-baseline-s0"])
        with pytest.raises(InvalidArtifact, match=r"d-resnet18-baseline-s0\.json cannot be read"):
            load_run("d-resnet18-baseline-s0")
    path = Path("metrics/cells.json")
    whole = json.loads(path.read_text())
    for damage in ({}, {"verdict": {}}, {"head": {}}, {"detectors": {"profiled": {}}}):
        path.write_text(json.dumps([whole[0] | damage] if damage else {}))
        with pytest.raises(InvalidArtifact, match=r"cells\.json (cannot be read|is no list)"):
            load_cells(runs)
    path = Path("metrics/closeup/d-resnet18-baseline-s0.json")
    for damage in ("[]", "{}", '{"cam": {}}'):
        path.write_text(damage)
        with pytest.raises(InvalidArtifact, match=r"d-resnet18-baseline-s0\.json cannot be read"):
            load_closeup("d-resnet18-baseline-s0")


def test_a_layer_without_records_is_named(runs):
    file = Path("metrics/records/d-resnet18-baseline-s0/injections.parquet")
    records = pd.read_parquet(file)
    write_parquet(file, records[records["layer"] != "conv1"])
    with pytest.raises(InvalidArtifact, match=r"campaign\.json: layer 'conv1' has no records"):
        write_results(runs, STATISTICS)
