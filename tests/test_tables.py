"""Tables of ours beside published ones, the audit of what is published, and recipes as a table."""

import csv
import math
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from conftest import REPOSITORY
from gate_runs import as_run, even, exact, metrics, right
from textguard.estimates.statistics import Estimate
from textguard.report.published import CLAIMS_FILE, Finding, Published, audit, load_published
from textguard.report.rendering import Judged, Table, as_frame, as_latex, as_markdown, write_table
from textguard.report.tables import RATIOS, make_tables
from textguard.schema.base import Measured
from textguard.schema.closeup import Cam, CloseUp, LastLayerValues, NoCam, WeightShift
from textguard.schema.results import (
    MEASURES,
    PLACES,
    Cell,
    CellLayer,
    CellUnderDetector,
    Headline,
    Improved,
    LayerRatios,
    LayerVerdicts,
    PlaceRatios,
    Places,
    PlaceVerdicts,
    RescaledHead,
    RunResult,
    Verdicts,
)
from textguard.vision.backbones import BACKBONES

NOT_RUN = "not run"


def estimate(value: float, spread: float = 0.1) -> Measured:
    """A number with its interval."""
    return Measured(value, value - spread, value + spread, 360)


def ratios(by_place: dict[str, float]) -> PlaceRatios:
    """Of one measure, 1.1 where nothing else is said."""
    return PlaceRatios(**{place: estimate(by_place.get(place, 1.1)) for place in PLACES})


def places_of(value: float) -> Places:
    """The same everywhere."""
    headline = Headline(**dict.fromkeys(MEASURES, estimate(value, value / 10)))
    return Places(**dict.fromkeys(PLACES, headline), nonfinite=estimate(0.0))


def cell(dataset: str, backbone: str, variant: str = "descriptions", against: str = "baseline", seeds: int = 3) -> Cell:
    """One of metrics/cells.json."""
    improvement = {"delta_loss": {"overall": 4.0, "last_layer": 3.0, "head": 2.0}, "sdc": {"overall": 0.5}, "mismatch": {}}
    said = PlaceVerdicts(**dict.fromkeys(PLACES, "not separable at 99%") | {"last_layer": "better"})
    layer = {"improvement": LayerRatios(**dict.fromkeys(MEASURES, estimate(1.0)))}
    verdicts = [LayerVerdicts(**dict.fromkeys(MEASURES, verdict)) for verdict in ("better", "worse", "worse", "better")]
    detector = CellUnderDetector(
        baseline=places_of(0.05),
        own=places_of(0.04),
        improvement=Improved(**{measure: ratios(by_place) for measure, by_place in improvement.items()}),
        verdict=Verdicts(**dict.fromkeys(MEASURES, said)),
    )
    return Cell(
        dataset=dataset,
        backbone=backbone,
        variant=variant,
        against=against,
        seeds=list(range(seeds)),
        top1_baseline=estimate(0.967, 0.02),
        top1=estimate(0.964, 0.02),
        parameters=250_000,
        multiply_adds=-1_500_000,
        top2diff=estimate(-0.01),
        detectors={"profiled": detector, "off": detector},
        layers=[CellLayer(layer=f"{number}", verdict=verdict, **layer) for number, verdict in enumerate(verdicts)],
    )


def run(key: str, confidence: float = 0.99) -> RunResult:
    """One of metrics/results/."""
    content = metrics(even(), right())
    content |= {"run": key, "confidence": confidence, "largest_logit": 12.345, "top1": exact(0.9)}
    return as_run(content)


VARIANTS = ("random", "template", "descriptions")
CELLS = [cell("digits", "resnet18", variant) for variant in VARIANTS] + [cell("digits", "mobilenet_v2")]
RUNS = {key: run(key) for key in ("a", "b")}


def tables(
    cells: Sequence[Cell],
    main: str = "digits",
    sources: dict[str, str] | None = None,
    contrasts: Sequence[Cell] = (),
    **others: dict[str, Any],
) -> dict[str, Table]:
    parts = [others.get(name, {}) for name in ("recipes", "library", "closeups")]
    return {table.name: table for table in make_tables(cells, contrasts, RUNS, main, sources or {main: main}, *parts)}


def column(table: Table, header: str) -> list[Any]:
    return [row[table.headers.index(header)] for row in table.rows]


def places(table: Table) -> list[tuple[str, str, str]]:
    return list(zip(*(column(table, header) for header in ("Dataset", "Backbone", "Source")), strict=True))


def test_the_demo_shows_published_numbers_of_the_backbones_that_it_runs():
    made = tables(CELLS)
    assert places(made["table1"]) == [
        ("digits", "resnet18", "this grid"),
        ("imagenet", "resnet18", "paper"),
        ("digits", "mobilenet_v2", "this grid"),
        ("imagenet", "mobilenet_v2", "paper"),
    ]
    assert column(made["table1"], "DeltaLoss, Last Layer (x)")[1::2] == [Decimal("2.87"), Decimal("3.92")]
    assert places(made["table2"]) == [("digits", backbone, "this grid") for backbone in ("resnet18", "mobilenet_v2")]
    assert [source for _, _, source in places(made["table3"])] == ["this grid"] * 3 + ["paper"] * 3
    assert column(made["table3"], "Projection Initialization")[:3] == column(made["table3"], "Projection Initialization")[3:]


def test_a_grid_on_imagenet_shows_all_published_backbones_and_which_were_not_run():
    cells = [cell("in1k", "resnet50"), cell("in1k", "focalnet_t")]
    table = tables([*cells, cell("in1k", "convnext_tiny")], "in1k", {"in1k": "imagenet"})["table1"]
    sources = [source for _, _, source in places(table)]
    assert {source: sources.count(source) for source in sources} == {"this grid": 3, NOT_RUN: 12, "paper": 14, "README": 4}
    assert places(table)[0] == ("in1k", "convnext_tiny", "this grid")  # which is not in the paper
    at = places(table).index(("in1k", "focalnet_t", "this grid"))
    assert places(table)[at + 1 : at + 4] == [
        ("imagenet", "focalnet_t", "paper"),
        ("imagenet", "focalnet_t", "README"),
        ("imagenet", "focalnet_s", NOT_RUN),
    ]
    overall = column(table, "DeltaLoss, All Layers (x)")
    assert isinstance(overall[at], Judged)
    assert overall[at + 1 : at + 4] == [Decimal("2.61"), Decimal("1.61"), None]


def test_a_grid_with_a_data_set_of_table_2_shows_all_of_it():
    sources = {"cifar10": "cifar10", "digits": "digits"}
    table = tables([cell("cifar10", "resnet50"), cell("digits", "resnet50")], "cifar10", sources)
    assert places(table["table2"])[:5] == [
        ("digits", "resnet50", "this grid"),
        ("cifar10", "resnet50", "this grid"),
        ("cifar10", "resnet50", "paper"),
        ("cifar10", "focalnet_t", NOT_RUN),
        ("cifar10", "focalnet_t", "paper"),
    ]
    assert len(table["table2"].rows) == 1 + 2 * 8


def test_an_ablation_on_imagenet_stands_row_by_row_beside_the_papers():
    cells = [cell("imagenet", "resnet50", variant) for variant in VARIANTS]
    table = tables(cells, "imagenet")["table3"]
    assert column(table, "Source") == ["this grid", "paper"] * 3
    starts = column(table, "Projection Initialization")
    assert starts[::2] == starts[1::2] == ["random", "text, one template", "text, class descriptions"]


@pytest.mark.parametrize("name", ["table1", "table2", "table3"])
def test_every_ratio_has_a_verdict(name):
    table = tables([cell("digits", "resnet18"), cell("digits", "resnet18", "random")])[name]
    found = {header: column(table, header)[0] for header in table.headers if header in RATIOS}
    assert {header: part.estimate.value for header, part in found.items()} == {
        "SDC, All Layers (x)": 0.5,
        "SDC, All Neurons (x)": 1.1,
        "SDC, Head Alone (x)": 1.1,
        "Mismatches, All Layers (x)": 1.1,
        "DeltaLoss, Head Alone (x)": 2.0,
        "DeltaLoss, Last Layer (x)": 3.0,
        "DeltaLoss, All Layers (x)": 4.0,
    }
    better = [header for header, part in found.items() if part.verdict == "better"]
    assert better == ["DeltaLoss, Last Layer (x)"]
    assert "| 3.00 [2.90, 3.10] better |" in as_markdown(table)
    assert as_frame(table)["DeltaLoss, Last Layer (x) verdict"].iloc[0] == "better"


def test_table_3_sets_heads_against_each_other():
    contrasts = [cell("digits", "resnet18", "template", "random"), cell("digits", "resnet18", "template", "random", seeds=1)]
    table = tables(CELLS, contrasts=contrasts)["table3"]
    assert column(table, "Projection Initialization")[-2:] == ["text, one template, against random"] * 2
    assert column(table, "Largest Effect Left, SDC (x)")[-2:] == ["2.50", None]  # 1 / 0.4; nothing of one training
    assert column(table, "Largest Effect Left, DeltaLoss (x)")[-2:] == ["4.10", None]


def test_layers_before_the_last_are_counted():
    table = tables([cell("digits", "resnet18"), cell("digits", "alexnet", seeds=1)])["layers"]
    numbers = [column(table, name) for name in ("Layers", "Better, SDC", "Worse, SDC")]
    assert numbers == [[3, 3], [1, None], [2, None]]


def test_all_measures_stand_side_by_side():
    table = tables(CELLS[:1])["measures"]
    assert len(table.rows) == len(MEASURES) * len(PLACES)
    rows = {(row[3], row[4]): row[5:8] for row in table.rows}
    assert [found.value for found in rows["DeltaLoss", "head alone"][:2]] == [0.05, 0.04]
    assert [found.value for found in rows["SDC", "all layers"][:2]] == [5, 4]  # percent
    assert rows["SDC", "all layers"][2].estimate.value == 0.5


def test_other_tables_hold_every_variant_detector_and_run():
    made = tables(CELLS)
    assert [row[1:4] for row in made["detectors"].rows] == [
        [part.backbone, part.variant, detector] for part in CELLS for detector in ("profiled", "off")
    ]
    assert [column(made["detectors"], f"DeltaLoss {side}")[0].value for side in ("Baseline", "Ours")] == [0.05, 0.04]
    ratios = [column(made["detectors"], f"DeltaLoss, {name} (x)")[0] for name in ("All Layers", "Last Layer", "Head Alone")]
    assert [found.estimate.value for found in ratios] == [4, 3, 2]
    assert column(made["resilience"], "Run") == list(RUNS)
    assert [found.value for found in column(made["resilience"], "Top-1 (%)")] == [90, 90]
    assert column(made["resilience"], "Largest Logit") == ["12.3", "12.3"]
    assert tables([])["table1"].rows == tables([])["table3"].rows == []


def closeup(cam: Cam | NoCam) -> CloseUp:
    """One of metrics/closeup/."""
    values = LastLayerValues(
        layer="fc", profiled=1.0, images=9, powers=[0], golden=[1.0], faulty=[1.0], beyond=0.0, not_finite=0.0
    )
    return CloseUp(last_layer=values, cam=cam)


def maps(**others: Any) -> Cam:
    """Maps of 8 images under flipped weight bits."""
    one = estimate(0.5)
    weights = WeightShift(finite=7, rank_correlation=one, overlap=one, changed=one, flips=2000)
    return Cam(layer="backbone.conv1", places=16, images=8, detector="off", weights=weights, **others)


def test_the_table_of_maps_says_what_was_seen_and_at_which_confidence():
    table = tables(CELLS, closeups={"a": closeup(maps()), "b": closeup(NoCam(skipped="no map"))})["attention"]
    assert [row[:2] for row in table.rows] == [["a", "2,000 weight bits"], ["b", "no map"]]
    assert table.rows[0][5:] == ["7 of 8", "conv1, 4 x 4"]
    assert "intervals of confidence 0.99 over images" in table.caption
    table = tables(CELLS, closeups={"a": closeup(maps(confidence=0.9))})["attention"]
    assert "intervals of confidence 0.9 over images" in table.caption


def test_heads_at_the_baselines_temperature_and_folded_are_shown_where_they_are_known():
    one = cell("digits", "resnet18")
    known = RescaledHead(same_temperature=estimate(1.5), folded=estimate(1.25))
    detectors = {"profiled": one.first.model_copy(update={"rescaled": known}), "off": one.detectors["off"]}
    table = tables([one.model_copy(update={"detectors": detectors})])["detectors"]
    assert column(table, "DeltaLoss, Head Alone, Same Temperature (x)") == [estimate(1.5), None]
    assert column(table, "DeltaLoss, Head Alone, Scale Folded (x)") == [estimate(1.25), None]


def test_tables_are_written_in_three_formats(tmp_path):
    write_table(tables(CELLS)["table1"], tmp_path)
    markdown = (tmp_path / "table1.md").read_text(encoding="utf-8")
    said = "96.7 [94.7, 98.7] | 96.4 [94.4, 98.4] | +0.25 | -1.50 | 0.500 [0.400, 0.600] not separable | 1.10 [1.00, 1.20] not"
    assert f"| digits | resnet18 | this grid | {said} separable |" in markdown
    assert (
        "| imagenet | resnet18 | paper | 69.60 | 69.68 | 0.26 | 0.26 | - | - | - | - | - | 2.87 | 1.91 | 3.07 | - |" in markdown
    )
    with (tmp_path / "table1.csv").open(encoding="utf-8") as file:
        ours, theirs, *_ = csv.DictReader(file)
    assert float(ours["DeltaLoss, All Layers (x)"]) > 1
    assert (ours["Acc. Ours (%) n"], ours["Trainings"]) == ("360", "3")
    assert (theirs["Acc. Baseline (%)"], theirs["Acc. Baseline (%) n"], theirs["Trainings"]) == ("69.60", "", "")
    latex = (tmp_path / "table1.tex").read_text(encoding="utf-8")
    assert r"Acc. Ours (\%)" in latex
    assert latex.count(r"\begin{") == latex.count(r"\end{") == 2


def test_every_estimate_keeps_its_four_columns_together_whatever_the_first_row_holds(tmp_path):
    table = tables([cell("imagenet", "focalnet_s")], "imagenet")["table1"]
    assert table.rows[0][table.headers.index("Source")] == NOT_RUN
    write_table(table, tmp_path)
    header = next(csv.reader((tmp_path / "table1.csv").read_text(encoding="utf-8").splitlines()))
    at = header.index("Acc. Ours (%)")
    assert header[at + 1 : at + 4] == [f"Acc. Ours (%) {part}" for part in ("low", "high", "n")]


@pytest.mark.parametrize(
    ("estimate", "shown"),
    [
        (Estimate(1268.4, 908.6, 1769.98, 9), "1,268 [909, 1,770]"),
        (Estimate(0.0312, 0.0306, 0.0383, 9), "0.0312 [0.0306, 0.0383]"),
        (Estimate(5e-5, 0.0, 0.001, 9), "5.0e-05 [0, 0.00100]"),
        (Estimate(99.96, 99.0, 100.0, 9), "100 [99.0, 100]"),
        (Estimate(2.5, 2.5, 2.5, 9), "2.50 (exact)"),
        (Estimate(2.5, 0.0, math.inf, 9), "2.50 [0, unbounded]"),
        (Estimate(math.nan, 0.0, 0.25, 9), "< 0.250"),
        (Estimate(math.nan, math.nan, math.nan, 0), "undefined"),
    ],
)
def test_numbers_show_three_digits(estimate, shown):
    assert f"| {shown} |" in as_markdown(Table("t", "c", ["x"], [[estimate]]))


def test_empty_tables_and_odd_texts_are_written_safely(tmp_path):
    table = Table("odd", "100 % of a_b", ["name", "x"], [["<b>|`a_1`\\", Estimate(math.nan, math.nan, math.nan, 0)]])
    assert r"&lt;b>\|\`a\_1\`\\" in as_markdown(table)
    assert "undefined" in as_markdown(table)
    assert r"a\_1" in as_latex(table)
    assert r"100 \% of a\_b" in as_latex(table)
    write_table(Table("empty", "none", ["a", "b"], []), tmp_path)
    assert (tmp_path / "empty.csv").read_text(encoding="utf-8") == "a,b\n"


def finding(what: str, where: str, other: str = "", published: Sequence[Published] = ()) -> Finding:
    found = [
        finding
        for finding in audit(published or load_published())
        if what in finding.what and where == finding.where and other in finding.other
    ]
    (only,) = found
    return only


def test_published_tables_are_whole():
    rows = load_published()
    sizes = {place: sum(row.place == place for row in rows) for place in dict.fromkeys(row.place for row in rows)}
    assert sizes == {
        "paper Table 1": 14,
        "paper Table 2": 8,
        "paper Table 3": 3,
        "README ImageNet": 14,
        "README Other Datasets": 8,
    }
    assert {row.backbone for row in rows} == set(BACKBONES)
    for row in rows:
        numbers = {name: number for name, number in row.numbers.items() if name not in ("parameters", "multiply_adds")}
        assert set(numbers) == (
            {"last_layer", "overall"} if row.table == "Table 3" else set(rows[0].numbers) - {"parameters", "multiply_adds"}
        )
        assert all(number > 1 for number in numbers.values()), row


def test_paper_and_readme_contradict_each_other_on_four_backbones_by_whole_numbers():
    found = [finding for finding in audit(load_published()) if finding.other == "README ImageNet"]
    said = {(part.what.split(" on ")[0], part.what.split(", ")[-1]): (str(part.said), str(part.found)) for part in found}
    assert said == {
        ("maxvit_t", "last layer (x)"): ("3.38", "2.38"),
        ("maxvit_t", "overall (x)"): ("2.63", "1.63"),
        ("swin_v2_s", "last layer (x)"): ("3.51", "2.51"),
        ("swin_v2_s", "overall (x)"): ("2.60", "1.60"),
        ("focalnet_t", "last layer (x)"): ("3.87", "1.87"),
        ("focalnet_t", "overall (x)"): ("2.61", "1.61"),
        ("focalnet_s", "last layer (x)"): ("4.73", "2.73"),
        ("focalnet_s", "overall (x)"): ("3.50", "1.50"),
    }
    assert {part.remark for part in found} == {"differs, by a whole number"}


@pytest.mark.parametrize(
    ("what", "where", "said", "found", "agrees"),
    [
        ("resnet50 on imagenet, improvement, last layer", "paper Table 1", "4.48", "6.09", False),
        ("resnet50 on imagenet, improvement, overall", "paper Table 1", "2.96", "3.93", False),
        ("mean of 14 backbones: improvement, last layer", "paper, abstract", "5.5", "5.481", True),
        ("largest of 14 backbones: improvement, last layer", "paper, abstract", "14", "14.430", True),
        ("mean of 14 backbones: improvement, last layer", "README, abstract", "5.5", "5.053", False),
        ("mean of 14 backbones: change of top-1", "paper, abstract", "-0.3", "-0.329", True),
        ("mean of 14 backbones: change of top-1", "paper, section 1", "-0.32", "-0.329", False),
        ("smallest of 14 backbones: change of top-1", "paper, section 6", "-1.77", "-1.800", False),
        ("largest of 14 backbones: change of top-1", "paper, section 6", "0.52", "0.850", False),
        ("mean of 14 backbones: improvement in Top2Diff", "paper, section 6", "2.50", "2.849", False),
        ("mean of 14 backbones: additional parameters", "paper, section 6", "0.18", "-0.339", False),
        ("resnet152: improvement, last layer", "paper, section 6", "4.01", "4.008", True),
        ("resnet152: improvement, overall", "paper, section 6", "2.61", "2.604", False),
        ("vgg19_bn: improvement, last layer", "paper, section 6", "13.68", "13.860", False),
        ("vgg19_bn: improvement, overall", "paper, section 6", "9.16", "9.155", True),
        ("interval of 4,096 injections", "paper, section 5.2", "0.23", "2.012", False),
        ("injections into all models", "paper, section 5.2", "4.3", "8.544", True),
    ],
)
def test_the_audit_sets_claims_against_their_tables(what, where, said, found, agrees):
    part = finding(what, where)
    assert (str(part.said), str(part.found)) == (said, found)
    assert part.remark.startswith("agrees" if agrees else "differs")
    assert float(part.difference) == pytest.approx(float(said) - float(found), abs=0.0011)


def test_the_audit_dates_what_the_paper_does_not_state():
    part = finding("ranges of the detector", "paper, section 5", "GoldenEye")
    assert (part.said, part.found, part.difference) == (None, None, None)
    for commit, day in (("fc4dd24", "2024-02-01"), ("708bbe5", "2024-03-03")):
        assert f"{commit} of {day}" in part.remark
    assert "`profiled` is likelier" in part.remark
    assert "| - |" in as_markdown(Table("audit", "", ["What", "Said", "Where"], [[part.what, part.said, part.where]]))


def test_the_audit_computes_what_it_says():
    """Another number in a table, another finding."""
    rows = load_published()
    alexnet = rows[0]
    changed = [replace(alexnet, numbers={**alexnet.numbers, "last_layer": alexnet.numbers["last_layer"] + 14}), *rows[1:]]
    part = finding("mean of 14 backbones: improvement, last layer", "paper, abstract", published=changed)
    assert (str(part.found), part.remark) == ("6.481", "differs")
    assert finding("alexnet on imagenet", "paper Table 1", "README", changed).difference == 14


def test_the_docs_quote_the_audit():
    text = " ".join((REPOSITORY / "docs" / "published.md").read_text(encoding="utf-8").split())
    readme_mean = finding("mean of 14 backbones: improvement, last layer", "README, abstract")
    trainings = finding("resnet50 on imagenet, improvement, last layer", "paper Table 1")
    interval = finding("interval of 4,096", "paper, section 5.2")
    parameters = finding("additional parameters", "paper, section 6")
    for quoted in (
        f"is {readme_mean.found:.2f}, not {readme_mean.said}",
        f"{trainings.said} times in Table 1 and {trainings.found} in Table 3",
        f"({-trainings.difference}) than descriptions do from one template ({trainings.remark.split()[-1]})",
        f"+-{interval.found:.2f} points at 99 %, not {interval.said}, which takes {interval.remark.split()[3]}",
        f"down by {-parameters.found:.2f} M on average, not up by {parameters.said} M",
    ):
        assert quoted in text


@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        *((name, 64) for name in ("alexnet", "resnet18", "resnet34", "resnet50", "mobilenet_v2", "swin_v2_t", "focalnet_t")),
        ("vgg16_bn", 32),
    ],
)
def test_hooks_reach_as_many_layers_as_the_audit_counts(backbone, size):
    fired = set()
    network = BACKBONES[backbone].build(num_classes=10).eval()
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda *_, name=name: fired.add(name))
    with torch.no_grad():
        network(torch.zeros(1, 3, size, size))
    assert len(fired) == yaml.safe_load(CLAIMS_FILE.read_text(encoding="utf-8"))["hooked_layers"][backbone]


def test_recipes_show_what_was_overridden_and_leave_out_what_has_no_effect():
    library = {
        "epochs": 90,
        "optimizer": "sgd",
        "momentum": 0.9,
        "betas": [0.9, 0.999],
        "weight_decay": 4e-05,
        "norm_weight_decay": None,
        "mixup": 0.0,
        "ema": False,
    }
    fields = {**library, "epochs": 4}
    recipes = {"resnet": fields, "swin_v2": {**fields, "optimizer": "adamw", "mixup": 0.8, "ema": True, "a_b": "x_%"}}
    table = tables(CELLS, recipes=recipes, library={"resnet": library, "swin_v2": library})["recipes"]
    assert table.headers == ["Field", "resnet", "swin_v2"]
    assert {name: row for name, *row in table.rows} == {
        "epochs": ["4 (library: 90)", "4 (library: 90)"],
        "optimizer": ["sgd", "adamw (library: sgd)"],
        "momentum": ["0.9", None],
        "betas": [None, "0.9, 0.999"],
        "weight_decay": ["0.00004", "0.00004"],
        "norm_weight_decay": ["as weight_decay", "as weight_decay"],
        "mixup": ["off", "0.8 (library: off)"],
        "ema": ["no", "yes (library: no)"],
        "a_b": [None, "x_%"],
    }
    assert r"| a\_b | - | x\_% |" in as_markdown(table)
    assert r"a\_b & - & x\_\%" in as_latex(table)
