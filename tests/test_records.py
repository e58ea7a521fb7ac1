"""Records of campaigns and predictions as the stages read them: damaged, incomplete, or of something else."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_schema import put

from bad_input_grid import RECORDS, RUN, says
from smoke_grid import BASELINE
from stored_grid import INJECT, INPUTS, STATISTICS
from textguard.analysis.files import load_cells, load_closeup, load_looks, load_ranges, load_results, short_names
from textguard.analysis.looks import compare_looks
from textguard.analysis.results import write_results
from textguard.artifacts import write_json, write_parquet
from textguard.errors import InvalidArtifact
from textguard.estimates.summary import mean_over_layers, summarise
from textguard.faults.plans import PLAN_COLUMNS
from textguard.schema.base import read
from textguard.schema.campaign import StoredCampaign
from textguard.schema.corruptions import Corruptions
from textguard.schema.hardware import Hardware
from textguard.schema.results import MEASURES, RunResult

KEY = "d-resnet18-baseline-0"
OTHER = "d-resnet18-descriptions-0"


def setting(column: str, value: Any, row: int = 3) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """One cell becomes something else, whatever type its column gets by that."""

    def change(table: pd.DataFrame) -> pd.DataFrame:
        values = table[column].to_list()
        values[row] = value
        return table.assign(**{column: values})

    return change


def typed(column: str, kind: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda table: table.assign(**{column: table[column].astype(kind)})


INJECTIONS = {
    "a layer that is null": (setting("layer", None), "column layer that holds anything else than text"),
    "another layer": (setting("layer", "conv9"), "injections into layer 'conv9', and"),
    "the enumerated layer": (setting("layer", "fc"), "injections into layer 'fc', and"),
    "a bit below 0": (setting("bit", -1), "column bit that holds anything else than whole numbers from 0 to 63"),
    "a bit of other formats": (setting("bit", 40), "has bit 40 of layer 'conv1', whose values have 32"),
    "a bit of terabytes": (setting("bit", 10**12), "column bit that holds"),
    "a bit that is null": (setting("bit", None), "column bit that holds"),
    "half a bit": (setting("bit", 0.5), "column bit that holds"),
    "a neuron too many": (setting("neuron", 100), "has neuron 100 of layer 'conv1', which has 100"),
    "no weight": (setting("weight", 0.0), "column weight that holds anything else than finite numbers above 0"),
    "NaN for a weight": (setting("weight", math.nan), "column weight that holds"),
    "a negative weight": (setting("weight", -1.0), "column weight that holds"),
    "an infinite weight": (setting("weight", math.inf), "column weight that holds"),
    "text for detected": (typed("detected", "str"), "column detected that holds anything else than true or false"),
    "numbers for mismatch": (typed("mismatch", "int64"), "column mismatch that holds anything else than true or false"),
    "null for masked": (setting("masked", None), "column masked that holds"),
    "text for a loss": (typed("faulty_loss", "str"), "column faulty_loss that holds"),
    "a negative loss": (setting("faulty_loss", -1.0), "column faulty_loss that holds anything else than numbers of at least 0"),
    "minus infinity": (setting("faulty_loss", -math.inf), "column faulty_loss that holds"),
    "NaN without faults": (setting("golden_loss", math.nan), "column golden_loss that holds anything else than finite numbers"),
    "no trace and another class": (setting("masked", True), "injections that left no trace, and another class"),
    "an index below 0": (setting("index", -1), "column index that holds"),
    "an index too high": (setting("index", 10**9), "lacks some of the injections into layer 'conv1'"),
    "an index twice": (setting("index", 4), "has 2 rows of injection 4 into layer 'conv1', instead of 1"),
    "one missing": (lambda table: table.iloc[1:], "has 199 injections into layer 'conv1', instead of 200"),
    "half of them": (lambda table: table.iloc[::2], "has 100 injections into layer 'conv1', instead of 200"),
    "all missing": (lambda table: table.iloc[:0], "has no injections into layer 'conv1', which"),
    "one more": (lambda table: pd.concat([table, table.iloc[:1].assign(index=200)]), "has 201 rows, and there can be 200"),
    "a column less": (lambda table: table.drop(columns="weight"), "lacks the columns weight"),
    "another detector's": (lambda table: table.assign(detector="off"), "is not what its name says"),
    "more images than are eligible": (lambda table: table.assign(image=range(200)), "more images than the 10"),
}


@pytest.mark.parametrize(("spoil", "said"), INJECTIONS.values(), ids=INJECTIONS)
def test_injections_that_cannot_be_are_refused(runs, spoil, said):
    refused(runs, f"metrics/records/{KEY}/injections.parquet", spoil, said, "inject")


def refused(
    runs: dict, file: str, spoil: Callable[[pd.DataFrame], pd.DataFrame], said: str, maker: str, inputs: str = INPUTS
) -> None:
    """Stage results ends in one line, and writes nothing."""
    before = Path(f"metrics/results/{KEY}.json").read_bytes()
    write_parquet(Path(file), spoil(pd.read_parquet(file)), {"inputs": inputs})
    with pytest.raises(InvalidArtifact) as caught:
        write_results(runs, STATISTICS, INJECT)
    says(str(caught.value), file, said, f"delete it and run 'dvc repro': stage '{maker}' writes it")
    assert "\n" not in str(caught.value)
    assert Path(f"metrics/results/{KEY}.json").read_bytes() == before


CHANGES = {
    "an unknown detector": (setting("detector", "fixed:7"), "under detector 'fixed:7', which the campaign did not compare"),
    "the detector that counts": (setting("detector", "profiled"), "under detector 'profiled'"),
    "one missing": (lambda table: table.iloc[1:], "lacks some of the injections that detector 'off' changes"),
    "one more": (lambda table: pd.concat([table, table.iloc[:1].assign(index=150, bit=0)]), "detector 'off'"),
    "one twice": (lambda table: pd.concat([table, table.iloc[:1]]), "has 2 rows of injection 0"),
    "another weight": (setting("weight", 2.0), "under detector 'off' that the campaign did not draw"),
    "null": (setting("detector", None), "column detector that holds anything else than text"),
    "the campaign's own": (lambda table: table.drop(columns="detector"), "is not what its name says"),
}


@pytest.mark.parametrize(("spoil", "said"), CHANGES.values(), ids=CHANGES)
def test_injections_under_other_detectors_that_cannot_be_are_refused(runs, spoil, said):
    refused(runs, f"metrics/records/{KEY}/detectors.parquet", spoil, said, "inject")


@pytest.mark.parametrize("name", ["injections", "detectors"])
def test_records_of_another_campaign_are_refused(runs, name):
    said = f"{name}.parquet is of another campaign than metrics/runs/{KEY}/campaign.json"
    refused(runs, f"metrics/records/{KEY}/{name}.parquet", lambda table: table, said, "inject", inputs="another")


def relabelled(table: pd.DataFrame) -> pd.DataFrame:
    """Other labels, predicted as well as before."""
    return table.assign(label=table["label"] + 1, prediction=table["prediction"] + 1)


PREDICTIONS = {
    "none": (lambda table: table.iloc[:0], "must have one row for each of the 100 images"),
    "one missing": (lambda table: table.iloc[1:], "must have one row for each of the 100 images"),
    "an image twice": (setting("image", 4), "must have one row for each of the 100 images"),
    "text": (typed("loss", "str"), "column loss that holds"),
    "NaN": (setting("loss", math.nan), "column loss that holds anything else than finite numbers of at least 0"),
    "Top2Diff above 1": (setting("top2diff", 1.5), "column top2diff that holds anything else than numbers from 0 to 1"),
    "a label below 0": (setting("label", -1), "column label that holds"),
    "another label": (setting("label", 7), "has a mean top1 of 0.96, and"),
    "another Top2Diff": (setting("top2diff", 0.1), "has a mean top2diff of 0.892, and"),
    "other labels, as well predicted": (relabelled, "other labels"),
}


@pytest.mark.parametrize(("spoil", "said"), PREDICTIONS.values(), ids=PREDICTIONS)
def test_predictions_that_cannot_be_are_refused(runs, spoil, said):
    key = OTHER if said == "other labels" else KEY
    refused(runs, f"metrics/records/{key}/predictions.parquet", spoil, said, "evaluate")


CAMPAIGNS = {
    "more bits than any format": ("bits", 10**12, "bits: Input should be less than or equal to 64"),
    "strata of another number": ("strata", 7, "strata is 7, neither 0 nor bits, 32"),
    "no eligible image": ("eligible_images", 0, "eligible_images: Input should be greater than or equal to 1"),
    "negative neurons": ("layers.0.neurons", -5, "layers.0.neurons: Input should be greater than or equal to"),
    "no neurons": ("layers.0.neurons", 0, "layers.0.neurons: Input should be greater than or equal to 1"),
    "a layer twice": ("layers.0.layer", "fc", "layers holds 'fc' twice"),
    "a layer without a kind": ("layers.0.kind", ..., "layers.0.kind: Field required"),
    "a detector twice": ("detectors", ["profiled", "profiled"], "detectors holds 'profiled' twice"),
    "another detector first": (
        "detectors",
        ["off", "profiled"],
        "exact has other detectors, profiled, off, than off, profiled",
    ),
    "negative faults": ("exact.profiled.0.masked.0", -1.0, "exact.profiled.0.masked.0: Input should be greater"),
    "half a fault": ("exact.profiled.0.masked.0", 0.5, "masked must be whole numbers, none above that of the bit's faults"),
    "more than all faults": ("exact.profiled.0.mismatches.0", 101.0, "mismatches must be whole numbers"),
    "a bit less": ("exact.profiled.0.faults", [100.0] * 31, "its lists must have one entry per bit each"),
    "fewer faults": ("exact.off.0.faults", [50.0] * 32, "another number of faults in 'fc' than one per neuron, image and bit"),
    "more images": ("eligible_images", 101, "another number of faults in 'fc'"),
    "another enumerated layer": ("exact.off.0.layer", "conv1", "exact.off must have each enumerated layer once"),
    "an enumerated layer that is none": ("exact.off.0.neurons", 11, "has a layer 'fc' of 11 neurons; layers has none"),
    "another setting": ("settings.seed", 1, "is of a campaign with seed 1; params.yaml has 0"),
    "other faults": ("settings.faults.bits", 2, "is of a campaign with faults"),
    "another number of injections": (
        "settings.injections_per_layer",
        100,
        "with injections_per_layer 100; params.yaml has 200",
    ),
    "an unknown key": ("extra", 1, "extra: no such key"),
}


@pytest.mark.parametrize(("place", "value", "said"), CAMPAIGNS.values(), ids=CAMPAIGNS)
def test_campaigns_that_cannot_be_are_refused(runs, place, value, said):
    refused_json(runs, f"metrics/runs/{KEY}/campaign.json", place, value, said, "inject")


EVALUATIONS = {
    "a share above 1": ("top1", {"value": 97.0, "low": 90.0, "high": 99.0, "n": 100}, "top1 is 97, not from 0 to 1"),
    "another number of images": ("top1.n", 10**13, "must have one row for each of the"),
    "NaN": ("scale", None, "scale: Input should be a valid number"),
    "no scale": ("scale", 0.0, "scale: Input should be greater than 0"),
    "a text-guided one": ("scale", 10.0, f"is not of run '{KEY}'"),
    "another seed": ("seed", 1, f"is not of run '{KEY}'"),
    "text": ("parameters", "many", "parameters: Input should be a valid integer"),
}


@pytest.mark.parametrize(("place", "value", "said"), EVALUATIONS.values(), ids=EVALUATIONS)
def test_evaluations_that_cannot_be_are_refused(runs, place, value, said):
    refused_json(runs, f"metrics/runs/{KEY}/evaluation.json", place, value, said, "evaluate")


def refused_json(runs: dict, file: str, place: str, value: Any, said: str, maker: str) -> None:
    path = Path(file)
    path.write_text(json.dumps(put(json.loads(path.read_text(encoding="utf-8")), place, value)), encoding="utf-8")
    with pytest.raises(InvalidArtifact) as caught:
        write_results(runs, STATISTICS, INJECT)
    says(str(caught.value), said, f"delete it and run 'dvc repro': stage '{maker}' writes it")


def test_a_small_file_of_many_rows_is_refused_unread(runs):
    """Parquet stores a column of equal values as one value and their number."""
    file = Path(f"metrics/records/{KEY}/injections.parquet")
    schema = pq.read_schema(file)
    with pq.ParquetWriter(file, schema) as writer:
        for _ in range(20):
            writer.write_table(pa.table({field.name: pa.array([None] * 1000, field.type) for field in schema}, schema))
    with pytest.raises(InvalidArtifact, match="has 20,000 rows, and there can be 200"):
        write_results(runs, STATISTICS, INJECT)


def test_layers_keep_their_names_apart():
    """A Swin transformer's own last layer is called as the text-guided classifier's is."""
    assert short_names(["conv1", "fc"]) == ["conv1", "fc"]
    assert short_names(["backbone.conv1", "backbone.fc", "head"]) == ["conv1", "fc", "head"]
    assert short_names(["backbone.norm", "backbone.head", "head"]) == ["norm", "backbone.head", "head"]


def test_swapped_results_and_cells_are_refused(runs):
    with pytest.raises(InvalidArtifact, match=r"is of seed 0; params.yaml has 1"):
        load_results({KEY: type(runs[KEY])("d", "resnet18", "baseline", 1)})
    path = Path("metrics/cells.json")
    cells = json.loads(path.read_text(encoding="utf-8"))
    for content, said in (
        ([*cells, cells[0]], "has the cell d-resnet18-baseline-template twice"),
        (cells[1:], r"does not have the cell d-resnet18-baseline-template with the seeds \[0\]"),
        ([cells[0] | {"seeds": [1]}, *cells[1:]], r"does not have the cell d-resnet18-baseline-template with the seeds \[0\]"),
    ):
        path.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(InvalidArtifact, match=rf"cells\.json {said}.*stage 'results' writes it"):
            load_cells(runs)


LOOKS = {
    "an image less": (
        lambda table: table[table["image"] != 1],
        "must have 2 images, each in the states golden, weights, worst",
    ),
    "a state less": (lambda table: table[table["state"] != "worst"], "must have 2 images, each in the states"),
    "another state": (setting("state", "golden", 4), "must have 2 images, each in the states"),
    "a smaller map": (setting("map", [1.0]), "must have maps of 4 places"),
    "a map that is not finite": (setting("map", [math.nan] * 4), "must have maps of 4 places, finite where it says so"),
    "text for a map": (lambda table: table.assign(map="x"), "column map that holds anything else than lists of numbers"),
    "no picture": (setting("picture", b"", 0), "must have a PNG picture in the rows of state golden"),
    "a confidence of 2": (setting("confidence", 2.0), "column confidence that holds"),
    "text for a class": (typed("prediction", "str"), "column prediction that holds"),
    "null for a name": (setting("predicted", None), "column predicted that holds anything else than text"),
    "far more rows": (lambda table: pd.concat([table] * 9), "has 54 rows, and there can be 6"),
    "a map more that is not finite": (setting("finite", False, 1), "has other maps of state weights than"),
    "another prediction": (setting("prediction", 1, 1), "has other maps of state weights than"),
}


@pytest.mark.parametrize(("spoil", "said"), LOOKS.values(), ids=LOOKS)
def test_looks_that_cannot_be_are_refused(runs, spoil, said):
    file = Path(f"metrics/looks/{KEY}.parquet")
    assert len(load_looks(KEY)) == 6
    write_parquet(file, spoil(pd.read_parquet(file)))
    with pytest.raises(InvalidArtifact, match="stage 'closeup' writes it") as caught:
        load_looks(KEY)
    says(str(caught.value), str(file), said)


def test_maps_that_agree_otherwise_than_is_stated_are_refused(runs):
    file = Path(f"metrics/looks/{KEY}.parquet")
    looks = compare_looks(KEY)
    assert looks["rank_correlation"].tolist() == pytest.approx([math.nan, 0.8, 0, math.nan, 0.8, 0], nan_ok=True)
    assert looks["changed"].tolist() == [False, False, True, False, True, True]
    write_parquet(file, setting("map", [0.0, 1.0, 2.0, 3.0], 1)(pd.read_parquet(file)))
    with pytest.raises(InvalidArtifact, match="stage 'closeup' writes it") as caught:
        compare_looks(KEY)
    says(str(caught.value), str(file), f"has maps of state weights that agree otherwise than metrics/closeup/{KEY}.json says")


CLOSEUPS = {
    "shares that do not add up": ("last_layer.golden.0", 0.5, "golden add up to 1.5, not to 1"),
    "a power less": ("last_layer.powers.0", ..., "golden and faulty must have one entry per power"),
    "powers that jump": ("last_layer.powers.3", 7, "powers must be neighbours"),
    "no square map": ("cam.places", 5, "places is 5, which no square map has"),
    "more finite images than images": ("cam.weights.finite", 3, "weights.finite is 3, and there are 2 images"),
    "a target that is none": ("cam.worst.target", "bias", "Input should be 'neuron', 'weight' or 'metadata'"),
    "a correlation of 2": ("cam.worst.rank_correlation", {"value": 2, "low": 2, "high": 2, "n": 2}, "is 2, not from -1 to 1"),
    "a confidence of 1": ("cam.confidence", 1.0, "less than or equal to 0.9999"),
}


@pytest.mark.parametrize(("place", "value", "said"), CLOSEUPS.values(), ids=CLOSEUPS)
def test_closeups_that_cannot_be_are_refused(runs, place, value, said):
    path = Path(f"metrics/closeup/{KEY}.json")
    path.write_text(json.dumps(put(json.loads(path.read_text(encoding="utf-8")), place, value)), encoding="utf-8")
    with pytest.raises(InvalidArtifact, match="stage 'closeup' writes it") as caught:
        load_closeup(KEY)
    says(str(caught.value), said)


def test_ranges_that_cannot_be_are_refused(runs):
    file = Path(f"metrics/runs/{KEY}/ranges.csv")
    table = pd.read_csv(file)
    for spoilt in (table.assign(max_abs=-1.0), table.assign(mean_abs=99.0), table.assign(layer="fc"), table.assign(images=0)):
        spoilt.to_csv(file, index=False)
        with pytest.raises(InvalidArtifact, match=r"ranges\.csv .*stage 'ranges' writes it"):
            load_ranges(KEY)


# What stage closeup makes of the same files: it knows the model too.


def test_a_closeup_wants_the_records_of_its_own_campaign(grid):
    file = grid.folder / RECORDS / "injections.parquet"
    records, metadata = pd.read_parquet(file), pq.read_schema(file).metadata
    known = {name.decode(): value.decode() for name, value in metadata.items()}
    for spoil, said in (
        (setting("layer", "conv9"), "is of another campaign: the plan names layer 'conv9', which the model does not have"),
        (setting("neuron", 10**7), "has a neuron that does not exist"),
        (typed("golden_value", "str"), "column golden_value that holds anything else than numbers"),
    ):
        write_parquet(file, spoil(records), known)
        says(grid.fails("closeup", BASELINE), "InvalidArtifact", "injections.parquet", said, "'inject'")
    write_parquet(file, records, known | {"inputs": "another"})
    says(grid.fails("closeup", BASELINE), f"is of another campaign than that of {BASELINE} with today's params.yaml")


def test_results_want_campaigns_that_params_describe(grid):
    grid.change("variants", ["baseline"])
    grid.change("inject.seed", 5)
    says(grid.fails("results"), f"{RUN}/campaign.json is of a campaign with seed 0; params.yaml has 5", "stage 'inject'")


# What little or harmless faults tell: no number where there is none, and no error.


def test_one_injection_per_layer_has_a_value_and_no_interval(grid):
    grid.change("variants", ["baseline"])
    grid.change("inject.injections_per_layer", 1)
    for stage in (f"inject {BASELINE}", f"closeup {BASELINE}", "results"):
        code, lines = grid.run(*stage.split())
        assert code == 0, lines
    result = read(grid.folder / f"metrics/results/{BASELINE}.json", "results", RunResult)
    sampled = [layer.delta_loss for layer in result.layers if layer.method == "sampled"]
    assert {estimate.n for estimate in sampled} == {1}
    assert all(estimate.value >= 0 for estimate in sampled)
    assert all(math.isnan(end) for estimate in (*sampled, *result.convergence) for end in (estimate.low, estimate.high))
    assert [point.injections_per_layer for point in result.convergence] == [1]


def test_faults_that_do_nothing_have_no_improvement(runs):
    for key in (KEY, OTHER):
        for name in ("injections", "detectors"):
            file = Path(f"metrics/records/{key}/{name}.parquet")
            harmless = pd.read_parquet(file).assign(faulty_loss=0.0, mismatch=False)
            write_parquet(file, harmless, {"inputs": INPUTS})
        file = f"metrics/runs/{key}/campaign.json"
        stored = json.loads(Path(file).read_text(encoding="utf-8"))
        for layers in stored["exact"].values():
            layers[0] |= {name: [0.0] * 32 for name in ("mismatches", "delta_loss")}
        write_json(Path(file), stored)
    write_results(runs, STATISTICS, INJECT)
    results = load_results({KEY: runs[KEY], OTHER: runs[OTHER]})
    assert [results[key].overall.delta_loss.value for key in (KEY, OTHER)] == [0, 0]
    assert {point.value for point in results[KEY].convergence} == {0}
    improvement = results[OTHER].improvement
    assert math.isnan(improvement.delta_loss.overall.value)


def test_other_faults_are_summed_up_from_their_records(finished_grid):
    found = read(finished_grid / f"metrics/hardware/{BASELINE}.json", "hardware", Hardware)
    channel, lasting = found.models
    records = pd.read_parquet(finished_grid / f"metrics/records/{BASELINE}/hardware.parquet")
    assert set(records["faults"]) == {"channel", "mitigation-none", "mitigation-learned"}
    sites = read(finished_grid / f"metrics/runs/{BASELINE}/campaign.json", "inject", StoredCampaign).layers
    neurons = {site.layer: site.neurons for site in sites}
    for found_of, name in zip((channel, *found.mitigations), ("channel", "mitigation-none", "mitigation-learned"), strict=True):
        own = records[records["faults"] == name]
        assert (found_of.injections, found_of.places) == (len(own), own["layer"].nunique())
        layers = list(summarise(own, neurons, shared=True).values())
        for means, weights in ((found_of.overall, None), (found_of.by_values, list(neurons.values()))):
            for measure in MEASURES:
                expected = pytest.approx(mean_over_layers(layers, measure, weights).value, nan_ok=True)
                assert getattr(means, measure).value == expected
    assert channel.overall.delta_loss.value != pytest.approx(channel.by_values.delta_loss.value)
    assert lasting.lost
    assert [curve.protection for curve in found.curves] == ["none", "secded(64)"]


def test_what_corruption_costs_is_summed_up_from_its_records(grid):
    grid.change("variants", ["baseline"])
    section = {"datasets": ["digits"], "kinds": ["contrast"], "severities": [1, 5], "campaign_severities": [1]}
    for place, value in (section | {"injections_per_layer": 2}).items():
        grid.change(f"corruptions.{place}", value)
    for stage in ("corruptions " + BASELINE, "results"):
        code, lines = grid.run(*stage.split())
        assert code == 0, "\n".join(lines[-4:])
    found = read(grid.folder / f"metrics/corruptions/{BASELINE}.json", "corruptions", Corruptions)
    records = grid.folder / "metrics" / "records" / BASELINE
    seen, injected = (pd.read_parquet(records / f"{name}.parquet") for name in ("corrupted", "corruptions"))
    places = [(images.kind, images.severity) for images in found.conditions]
    assert places == [("clean", 0), ("contrast", 1), ("contrast", 5)]
    right = {}
    for images, place in zip(found.conditions, places, strict=True):
        rows = seen[(seen["kind"] == place[0]) & (seen["severity"] == place[1])]
        right[place] = (rows["prediction"] == rows["label"]).mean()
        measured = (images.top1.value, images.loss.value, images.top2diff.value)
        assert measured == pytest.approx((right[place], rows["loss"].mean(), rows["top2diff"].mean()))
        assert images.top1.n == found.images == len(rows) == 40
    clean = seen[seen["kind"] == "clean"].drop(columns=["kind", "severity"])
    pd.testing.assert_frame_equal(clean, pd.read_parquet(records / "predictions.parquet"))
    lost = 100 * (right["clean", 0] - np.mean([right["contrast", 1], right["contrast", 5]]))
    assert found.lost.value == pytest.approx(lost)
    with_faults = [images.faults.images if images.faults else None for images in found.conditions]
    assert with_faults == [round(40 * right["clean", 0]), round(40 * right["contrast", 1]), None]
    counts = injected.groupby(["kind", "severity"]).size().to_dict()
    assert counts == {place: images.faults.injections for place, images in zip(places[:2], found.conditions, strict=False)}
    assert len(json.loads((grid.folder / "metrics" / "corruptions.json").read_text(encoding="utf-8"))["classifiers"]) == 1


def test_mitigations_meet_the_same_faults_without_a_range_detector(finished_grid):
    found = read(finished_grid / f"metrics/hardware/{BASELINE}.json", "hardware", Hardware)
    plain, learned = found.mitigations
    assert (plain.mitigation, plain.comparisons, plain.bits, plain.top1_change.value) == ("none", 0, 1, 0)
    assert plain.top1_change.low < 0 < plain.top1_change.high  # that no image changed is no proof that none would
    assert learned.comparisons > 0
    assert 1 < learned.bits < 1.01
    records = pd.read_parquet(finished_grid / f"metrics/records/{BASELINE}/hardware.parquet")
    without, under = (records[records["faults"] == f"mitigation-{name}"] for name in ("none", "learned"))
    assert without[PLAN_COLUMNS].to_numpy().tolist() == under[PLAN_COLUMNS].to_numpy().tolist()
    ranges = pd.read_csv(finished_grid / f"metrics/runs/{BASELINE}/ranges.csv").set_index("layer")["max_abs"]
    assert (without["faulty_value"].abs() > 2 * without["layer"].map(ranges)).any()
    clipped = pd.read_csv(finished_grid / f"metrics/runs/{BASELINE}/clipping.csv")
    bounds = pd.read_csv(finished_grid / f"metrics/runs/{BASELINE}/activations.csv").set_index("activation")
    assert set(clipped["activation"]) == set(bounds.index)
    # The threshold of a channel is at most the largest value of its activation.
    assert (clipped["high"] <= clipped["activation"].map(bounds["high"]) + 1e-6).all()
