"""Figures of one backbone: layers, bits, thresholds, convergence, the last layer; they show what the results say."""

import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.markers import CARETLEFT
from matplotlib.text import Text

from conftest import REPOSITORY
from textguard.analysis.files import load_cells, load_results
from textguard.analysis.layers import _block, _roles, align, bit_means, layer_means, loss_by_bit
from textguard.analysis.thresholds import crossing, differences
from textguard.estimates.statistics import quantile
from textguard.params import load_params
from textguard.report.bit_figures import FEWEST, bit_fields, draw_bits
from textguard.report.closeup_figures import draw_last_layer
from textguard.report.drawing import SMALL, draw
from textguard.report.figures import group
from textguard.report.layer_figures import draw_layers, draw_outcomes
from textguard.report.run_figures import draw_accuracy, draw_convergence
from textguard.schema.base import Measured
from textguard.schema.results import NO_VERDICT

PLACE = ("digits", "resnet18")


@pytest.fixture
def demo(monkeypatch):
    """The committed results of the demo's ResNet-18: its variants, and their cells."""
    monkeypatch.chdir(REPOSITORY)
    params = load_params()
    variants = group(list(load_results(params.runs).values()), params)[PLACE]
    return variants, [cell for cell in load_cells(params.runs) if (cell.dataset, cell.backbone) == PLACE]


def every(variants):
    return [result for variant in variants for result in variant.results]


def test_layers_that_do_the_same_share_a_row(demo):
    variants, _ = demo
    results = every(variants)
    aligned = align(results)
    assert list(aligned.names[-3:]) == ["layer4.1.conv2", "fc", "fc / head"]
    assert list(aligned.roles[-3:]) == ["block 8", "latent", "class scores"]
    assert list(aligned.roles[:3]) == ["stem", "block 1", "block 1"]
    for result in results:
        places = [aligned.at(result, layer.layer) for layer in result.layers]
        assert places == sorted(set(places))
        assert places[-1] == len(aligned.names) - 1
    baseline, guided = results[0], results[-1]
    assert (aligned.at(baseline, "fc"), aligned.at(guided, "fc")) == (21, 20)


def test_any_two_models_share_rows_by_name(demo):
    variants, _ = demo
    whole = variants[0].results[0]
    part = whole.model_copy(update={"layers": whole.layers[:-1]})
    aligned = align([part, whole])
    assert list(aligned.names) == [layer.layer for layer in whole.layers]
    assert aligned.at(part, "layer4.1.conv2") == aligned.at(whole, "layer4.1.conv2") == len(aligned.names) - 2


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("layer1.0.conv1", "layer1.0"),
        ("features.1.conv.0.0", "features.1"),
        ("features.3", "features"),
        ("layers.2.blocks.5.modulation.focal_layers.1.0", "layers.2.blocks.5"),
        ("encoder.layers.encoder_layer_11.mlp.0", "encoder.layers.encoder_layer_11"),
        ("conv1", "conv1"),
    ],
)
def test_a_layer_belongs_to_a_block(name, block):
    assert _block(name) == block


def test_what_is_no_block_has_no_number():
    names = ["conv", "a.0.x", "a.0.y", "norm", "b.1.x", "b.1.y", "fc"]
    assert _roles(names, {"fc"}) == ["stem", "block 1", "block 1", "", "block 2", "block 2", "latent"]


def test_the_layers_show_the_ratios_of_the_cells(demo):
    variants, cells = demo
    figure, numbers = draw_layers(variants, "ResNet-18", cells)
    assert len(numbers) == sum(len(result.layers) for result in every(variants))
    for cell in cells:
        for layer in cell.layers:
            rows = numbers[(numbers["variant"] == cell.variant) & (numbers["layer"] == layer.layer)]
            for measure in ("sdc", "delta_loss"):
                ratio = getattr(layer.improvement, measure)
                assert len(rows) == len(cell.seeds)
                assert rows[f"{measure}_ratio_low"].tolist() == pytest.approx([ratio.low] * len(rows), nan_ok=True)
                assert set(rows[f"{measure}_verdict"]) == {getattr(layer.verdict, measure)}
    said = [layer.verdict.sdc for cell in cells for layer in cell.layers if layer.verdict.sdc != NO_VERDICT]
    assert f"SDC is lower in {said.count('better')} of {len(said)} comparisons" in figure.get_label()
    picture = draw(figure, "svg", 60).decode()
    own = [layer for cell in cells if cell.variant == "descriptions" for layer in cell.layers]
    shown = sum(math.isfinite(getattr(layer.improvement, measure).value) for layer in own for measure in ("sdc", "delta_loss"))
    marked = picture.count('data-mark="digits resnet18 descriptions"')
    assert marked == shown + 5, "each ratio, their thick bars and their thin ones, and the line of values"


def test_a_ratio_is_filled_where_its_interval_leaves_1_out(demo):
    variants, cells = demo
    figure, _ = draw_layers(variants, "t", cells)
    for axes, measure in zip(figure.axes, ("sdc", "delta_loss"), strict=False):
        marks = [line for line in axes.lines if line.get_gid()]
        told = [line.get_markerfacecolor() != "white" for line in marks]
        verdicts = [getattr(layer.verdict, measure) for cell in cells for layer in cell.layers]
        assert sum(told) == sum(verdict in ("better", "worse") for verdict in verdicts)
        assert all(verdict in line.get_gid() for line, verdict in zip(marks, filter(is_drawn, verdicts), strict=True))


def is_drawn(verdict):
    return verdict != NO_VERDICT


def test_without_a_baseline_there_are_values_alone(demo):
    variants, _ = demo
    figure, numbers = draw_layers(variants[-1:], "t", [])
    assert "there is no baseline to compare with" in figure.get_label()
    assert "sdc_ratio" not in numbers


def test_outcomes_are_those_of_the_trainings(demo):
    variants, _ = demo
    figure, numbers = draw_outcomes(variants, "t")
    assert numbers["masked"].between(0, 1).all()
    means = [layer_means(variant.results)[variant.results[0].layers[-1].layer].sdc.value for variant in variants]
    assert "SDC is largest in the class scores (fc / head)" in figure.get_label()
    assert f"to {100 * max(means):.2g} %; " in figure.get_label()
    alone = layer_means(variants[0].results[:1])
    assert math.isnan(alone["conv1"].masked.low)
    assert alone["conv1"].sdc == variants[0].results[0].layers[0].sdc


def test_a_layer_without_damage_is_an_arrow_at_the_edge(demo):
    variants, _ = demo
    (first, *_), nothing = variants, Measured(0.0, 0.0, 0.01, 512)

    def arrows(conv1):
        runs = [run.model_copy(update={"layers": [conv1(run.layers[0]), *run.layers[1:]]}) for run in first.results]
        figure, _ = draw_outcomes([replace(first, results=runs)], "t")
        return [line for line in figure.axes[0].lines if line.get_marker() == CARETLEFT]

    assert arrows(lambda layer: layer) == []
    (line,) = arrows(lambda layer: layer.model_copy(update={"sdc": nothing}))
    assert line.get_xdata()[0] == line.axes.get_xlim()[0]


def test_a_mean_over_layers_counts_those_in_which_a_bit_was_hit(demo):
    variants, _ = demo
    results = variants[-1].results
    found = bit_means(results, "before")
    for bit in (0, 20, 30):
        per_training = [
            np.mean([layer.by_bit.delta_loss[bit] for layer in result.layers[:-1] if layer.by_bit.n[bit]]) for result in results
        ]
        wanted = np.exp(np.mean(np.log(per_training))) if min(per_training) > 0 else np.mean(per_training)
        assert found[bit].delta_loss.value == pytest.approx(wanted)
        assert found[bit].delta_loss.low < wanted < found[bit].delta_loss.high
    exact, sampled = (bit_means(results[:1], part)[30].sdc for part in ("scores", "before"))
    assert exact.low == exact.value == exact.high
    assert math.isnan(sampled.low)


def test_a_heat_map_has_no_cell_of_a_handful_of_faults(demo):
    variants, _ = demo
    results = variants[0].results
    for number, (layer, losses) in enumerate(loss_by_bit(results, FEWEST).items()):
        hits = np.sum([result.layers[number].by_bit.n for result in results], axis=0)
        assert results[0].layers[number].layer == layer
        assert (np.isfinite(losses) == (hits >= FEWEST)).all()
    figure, numbers = draw_bits(variants, "t")
    assert "SDC is largest at bit 30 (exponent)" in figure.get_label()
    drawn = numbers[(numbers["variant"] == "baseline") & (numbers["layer"] == "conv1")]
    assert len(drawn) == np.isfinite(loss_by_bit(results, FEWEST)["conv1"]).sum()


@pytest.mark.parametrize(
    ("number_format", "bits", "exponent"),
    [("fp32", 32, (23, 30)), ("bf16", 16, (7, 14)), ("fp(4,3)", 8, (3, 6)), ("int8", 8, None), ("fp16", 32, None)],
)
def test_the_fields_of_a_format_are_known_or_not_named(number_format, bits, exponent):
    fields = {name: (low, high) for name, low, high in bit_fields(number_format, bits)}
    assert fields.get("exponent") == exponent
    assert sorted(bit for low, high in fields.values() for bit in range(low, high + 1)) == list(range(bits if exponent else 0))


def test_differences_are_between_trainings_of_one_seed():
    baseline, own = np.array([[90.0, 80], [94, 70], [92, 75]]), np.array([[91.0, 81], [95, 71], [93, 77]])
    level, apart = differences(baseline, own, 0.99)
    assert (level.value, level.low, level.high) == (1.0, 1.0, 1.0)
    assert apart.value == pytest.approx(4 / 3)
    assert apart.low < apart.value < apart.high
    assert math.isnan(differences(baseline[:1], own[:1], 0.99)[0].low)


def test_a_crossing_counts_where_all_trainings_cross():
    at = np.array([0.0, 1.0, 2.0])
    baseline = np.array([[10.0, 8, 6], [10, 8, 6]])
    up, never = np.array([9.0, 7.5, 6.5]), np.array([9.0, 7, 5])
    assert crossing(at, baseline, np.array([up, up]), 0.9)[1].value == pytest.approx(1.5)
    count, last = crossing(at, baseline, np.array([up, never]), 0.9)
    assert (count, math.isnan(last.value)) == (1, True)
    assert math.isnan(crossing(at, baseline[:1], up[None], 0.9)[1].low)


def test_convergence_says_how_well_the_estimate_is_known_and_by_which_plan(demo):
    variants = with_uniform_errors(demo[0], lambda number: None)
    figure, numbers = draw_convergence(variants, "t")
    last = [variant.results[0].convergence[-1] for variant in variants]
    halves = [100 * (point.high - point.low) / 2 / point.value for point in last]
    assert numbers.groupby("variant", sort=False)["half_percent"].last().tolist() == pytest.approx(halves)
    assert set(numbers["plan"]) == {"guided"}
    assert "uniform ones" not in figure.get_label(), "these results do not know what uniform ones would tell"


def test_convergence_sets_uniform_injections_beside_guided_ones(demo):
    def error(number):
        point = demo[0][number].results[0].convergence[-1]
        return (1 + number) * (point.high - point.low) / 2 / quantile(0.99)

    variants = with_uniform_errors(demo[0], error)
    figure, numbers = draw_convergence(variants, "t")
    last = numbers[numbers["injections_per_layer"] == 512]
    assert (last["uniform_percent"] / last["half_percent"]).tolist() == pytest.approx(np.arange(1, 1 + len(variants)))
    assert figure.get_label().endswith(f"uniform ones would have to be 1.00 to {len(variants) ** 2:.1f} times as many")


def with_uniform_errors(variants, error):
    """Variants whose first trainings say that uniform injections have these standard errors, by the variant's number."""
    found = []
    for number, variant in enumerate(variants):
        first, *rest = variant.results
        points = [point.model_copy(update={"uniform_error": error(number)}) for point in first.convergence]
        found.append(replace(variant, results=[first.model_copy(update={"convergence": points}), *rest]))
    return found


def test_peaks_of_the_last_layer_are_named_by_their_bits(demo):
    variants, _ = demo
    figure, numbers = draw_last_layer(variants, "t")
    assert set(numbers["variant"]) == {variant.key for variant in variants}
    assert len(figure.axes) == 2
    guided = {text.get_text(): text.get_position()[0] for text in figure.axes[1].texts}
    assert guided["30"] == pytest.approx(38, abs=2), "of cosines, which are below 2, it makes the largest values"
    assert guided["29"] == pytest.approx(-19.3 - 1, abs=2), "and the next bit small ones"


def test_no_text_is_too_small(demo):
    variants, cells = demo
    figures = [draw_layers(variants, "t", cells)[0]]
    figures += [draw_one(variants, "t")[0] for draw_one in (draw_outcomes, draw_bits, draw_accuracy, draw_convergence)]
    for figure in [*figures, draw_last_layer(variants, "t")[0]]:
        assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= SMALL
