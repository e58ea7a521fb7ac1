"""Effects of single changes and of a design's factors: known ones are found again, in pairs of trainings, and said in words."""

import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import REPOSITORY
from stages import effects as stage
from textguard import strict_yaml
from textguard.analysis.effects import contrast, estimate_effects, factorial
from textguard.errors import InvalidArtifact, TextguardError
from textguard.estimates.factorial import aliases_of
from textguard.estimates.statistics import Estimate
from textguard.params import EffectsParams, load_params
from textguard.report.effect_figures import draw_effects
from textguard.report.effect_tables import effects_table, sentences
from textguard.report.rendering import as_markdown

NAMES = list("abcdef")


def run_with(loss, sdc=0.05, top1=0.9):
    """As much of a run's result as effects look at; its own intervals are narrow."""

    def near(value):
        return Estimate(value, 0.999 * value, 1.001 * value, 1000)

    means = SimpleNamespace(delta_loss=near(loss), sdc=near(sdc))
    return SimpleNamespace(overall=means, by_neurons=means, head=means, confidence=0.99, top1=Estimate(top1, top1, top1, 360))


def half_fraction(count):
    """A design of 2^(count-1) variants, in which the last factor is the product of the others."""
    free = np.array(list(itertools.product((-1, 1), repeat=count - 1)))
    return np.column_stack([free, free.prod(axis=1)])


def design_of(levels):
    factors = {name: [False, True] for name in NAMES[: levels.shape[1]]}
    return EffectsParams(contrasts={}, factors=factors, design=[f"v{number}" for number in range(len(levels))])


def at(effects, measure="delta_loss", place="overall"):
    return next(effect for effect in effects if (effect.measure, effect.place) == (measure, place))


def test_contrasts_hold_as_often_as_they_say_and_pair_trainings_of_one_seed():
    random, seeds, hits, widths = np.random.default_rng(0), range(5), {"effect": 0, "second": 0}, []
    for _ in range(400):
        of_seed = random.normal(0, 1.5, 5)  # cancels in pairs
        own, other = random.normal(0, 0.1, (2, 5))
        runs = {("base", seed): run_with(math.exp(of_seed[seed] + other[seed])) for seed in seeds}
        runs |= {("less", seed): run_with(math.exp(of_seed[seed] + own[seed]) / 8) for seed in seeds}
        found = at(contrast("less", runs, "less", "base", seeds).effects)
        for name in hits:
            hits[name] += getattr(found, name).low < 8 < getattr(found, name).high
        widths.append(found.effect.high / found.effect.low)
    assert 0.975 <= hits["effect"] / 400 <= 1
    assert 0.92 <= hits["second"] / 400 <= 0.975
    assert np.median(widths) < 2.2  # seeds that do not cancel make it 20 and more


def test_points_of_top1_are_ours_minus_theirs_and_no_narrower_than_whole_images():
    runs = {("base", seed): run_with(1.0, top1=0.9) for seed in range(3)} | {
        ("more", seed): run_with(1.0, top1=0.9 + gain) for seed, gain in enumerate([4 / 360] * 3)
    }
    found = at(contrast("more", runs, "more", "base", range(3)).effects, "top1", "all")
    assert found.effect.value == pytest.approx(100 * 4 / 360)
    assert 0.1 < found.effect.high - found.effect.value < 0.3  # a third of an image in 360, or so
    assert found.verdict == "better"


def test_trainings_with_as_many_hits_differ_by_nothing_at_all():
    shares = {"base": (0.9, 0.95, 0.925), "other": (0.95, 0.925, 0.9)}
    runs = {(name, seed): run_with(1.0, top1=share) for name, own in shares.items() for seed, share in enumerate(own)}
    assert at(contrast("other", runs, "other", "base", range(3)).effects, "top1", "all").effect.value == 0


def test_a_design_finds_main_effects_and_interactions_again():
    levels, random, hits = half_fraction(6), np.random.default_rng(1), np.zeros((2, 3))
    wanted = design_of(levels)
    for _ in range(60):
        of_seed = random.normal(0, 1, 2)
        runs = {
            # a: 4 times less damage. a and b together: a's effect is 9 times as large where b is high as where it is low.
            (variant, seed): run_with(
                math.exp(-math.log(4) / 2 * row[0] - math.log(9) / 4 * row[0] * row[1] + of_seed[seed] + random.normal(0, 0.2)),
                top1=0.8 + 0.01 * row[2] + 0.0002 * random.normal(),
            )
            for variant, row in zip(wanted.design, levels, strict=True)
            for seed in (0, 1)
        }
        found = {tuple(effect.factors): effect for effect in factorial(runs, wanted, (0, 1), levels).effects}
        assert len(found) == 6 + 15
        assert not any(effect.aliases for effect in found.values())
        for number, (name, truth) in enumerate(((("a",), 4), (("a", "b"), 9), (("d",), 1))):
            effect = at(found[name].effects)
            hits[:, number] += [part.low < truth < part.high for part in (effect.effect, effect.second)]
        points = at(found["c",].effects, "top1", "all").effect
        assert points.low < points.value < points.high
        assert points.value == pytest.approx(2, abs=0.05)
    assert (hits[0] >= 56).all()
    assert (hits[1] >= 52).all()
    assert hits[1].sum() < 178  # of 180: intervals that always hold are too wide


def test_a_factor_is_known_no_better_than_the_injections_behind_it():
    levels = np.array([[-1], [1]])
    runs = {(f"v{number}", seed): run_with(1.0 + number) for number in (0, 1) for seed in range(4)}
    fitted = factorial(runs, design_of(levels), range(4), levels)
    # Each of eight equal trainings is known to a thousandth of itself, at 99 %: effects are so too, and not exact.
    effect = at(fitted.effects[0].effects).effect
    assert effect.value == pytest.approx(0.5)
    assert 1e-4 < effect.high / effect.value - 1 < 2e-3
    assert [fit.explained for fit in fitted.fits if fit.measure == "sdc"] == [pytest.approx(math.nan, nan_ok=True)] * 3


def test_effects_that_share_a_column_are_named():
    levels = half_fraction(3)
    assert aliases_of(levels) == {(0,): [(1, 2)], (1,): [(0, 2)], (2,): [(0, 1)]}
    runs = {(f"v{number}", seed): run_with(1 + number + seed) for number in range(4) for seed in (0, 1)}
    found = factorial(runs, design_of(levels), (0, 1), levels)
    assert (found.effects[0].factors, found.effects[0].aliases) == (["a"], [["b", "c"]])
    table = effects_table([estimate_effects(("d", "resnet18"), runs, design_of(levels), (0, 1), levels)])
    assert "or of b x c" in table.rows[0][3]


def test_trainings_without_any_sdc_leave_a_bound_and_are_counted():
    runs = {("base", seed): run_with(1.0, sdc=0.1) for seed in (0, 1)} | {
        ("safe", seed): run_with(0.5, sdc=sdc) for seed, sdc in enumerate((0.0, 0.01))
    }
    found = contrast("safe", runs, "safe", "base", (0, 1))
    effect = at(found.effects, "sdc")
    assert math.isnan(effect.effect.value)
    assert math.isnan(effect.effect.high)
    assert effect.zeros == 1
    assert 0 < effect.effect.low < 20
    levels = np.array([[-1], [1]])
    fitted = factorial(
        {
            (f"v{number}", seed): run
            for number, name in enumerate(("base", "safe"))
            for seed in (0, 1)
            for run in [runs[name, seed]]
        },
        design_of(levels),
        (0, 1),
        levels,
    )
    assert at(fitted.effects[0].effects, "sdc").zeros == 1
    assert ("sdc", "overall") not in [(fit.measure, fit.place) for fit in fitted.fits]
    assert at(fitted.effects[0].effects).effect.value == pytest.approx(2)


def whole():
    levels, random = half_fraction(4), np.random.default_rng(2)
    wanted = EffectsParams(
        contrasts={"smoother labels": ["v1", "v0"], "nothing": ["v2", "v0"]},
        factors={
            "frozen": [False, True],
            "recipe.label_smoothing": [0.0, 0.1],
            "start": ["torch", "unit"],
            "normalise": [False, True],
        },
        design=[f"v{number}" for number in range(8)],
    )
    runs = {
        (f"v{number}", seed): run_with(
            math.exp(random.normal(0, 0.05) - 1.2 * (number == 1)), 0.05, 0.9 + 0.001 * (number + random.normal())
        )
        for number in range(8)
        for seed in range(4)
    }
    return estimate_effects(("digits", "resnet18"), runs, wanted, range(4), levels)


def test_sentences_and_table_say_what_was_found():
    found = whole()
    first, second, *rest = sentences(found)
    assert first.startswith("smoother labels (v1 against v0): DeltaLoss 3.")
    assert "times less; SDC cannot be told: 1.00" in first
    assert first.endswith("(4 trainings).")
    assert "DeltaLoss cannot be told: 1.0" in second
    assert any(sentence.startswith("recipe.label_smoothing (0.1 instead of 0.0)") for sentence in rest)
    table = effects_table([found])
    assert [row[2] for row in table.rows[:3]] == ["smoother labels", "nothing", "frozen"]
    assert len(table.rows) == 2 + 4 + 3  # of six interactions, three share the columns of the others
    assert first in as_markdown(table)


def test_the_figure_has_a_row_per_effect_and_marks_what_can_be_told():
    figure, numbers = draw_effects(whole(), "ResNet-18 on digits")
    axes = figure.axes[0]
    names = dict(zip(axes.get_yticks(), (label.get_text() for label in axes.get_yticklabels()), strict=True))
    marks = {names[line.get_ydata()[0]]: line.get_markerfacecolor() for line in axes.lines if line.get_marker() == "o"}
    assert marks.keys() == {"smoother labels", "nothing"}
    assert marks["smoother labels"] != "white"
    assert marks["nothing"] == "white"
    assert figure.get_label().startswith("ResNet-18 on digits, what one change does: DeltaLoss is lower in ")
    assert axes.get_xscale() == "log"
    assert figure.axes[2].get_xscale() == "linear"
    assert len(numbers) == 9 * 7


def smoke(tmp_path, **changes):
    """The smoke grid's params.yaml with other sections, in a folder of its own."""
    content = strict_yaml.parse((REPOSITORY / "grids/smoke/params.yaml").read_text(encoding="utf-8"))
    for name, changed in changes.items():
        content[name] = content[name] | changed if isinstance(changed, dict) else changed
    (tmp_path / "params.yaml").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path / "params.yaml"


ARMS = {f"{n}{s}": {"width": 8, "normalise": bool(n), "recipe": {"label_smoothing": s / 10}} for n in (0, 1) for s in (0, 1)}
FACTORS = {"normalise": [False, True], "recipe.label_smoothing": [0.0, 0.1]}


@pytest.mark.parametrize(
    ("effects", "said"),
    [
        ({"contrasts": {"x": ["descriptions", "smoothed"]}}, "variant 'smoothed' in"),
        ({"contrasts": {"x": ["baseline", "baseline"]}}, "sets 'baseline' against itself"),
        ({"factors": FACTORS}, "belong together"),
        ({"factors": FACTORS, "design": ["00", "baseline"]}, "treatment 'baseline' in"),
        ({"factors": {"normalise": [True, True]}, "design": ["00"]}, "has true as both levels"),
        ({"factors": {"recipe.epochs": [1, 2]}, "design": ["00"]}, "has no field 'recipe.epochs'"),
        (
            {"factors": {"normalise": [False, 1]}, "design": ["00", "10"]},
            "normalise is true, and effects.factors allows false or 1",
        ),
        ({"factors": {"normalise": [False, True]}, "design": ["00", "01", "10"]}, "'normalise' is not balanced: 2 variants"),
        ({"factors": FACTORS, "design": ["00", "11"]}, "are not orthogonal"),
        ({"factors": FACTORS, "design": list(ARMS)}, "its 4 trainings leave none to estimate the spread from"),
    ],
)
def test_a_mistake_in_the_effects_is_one_line(tmp_path, effects, said):
    variants = ["baseline", "descriptions", *ARMS]
    with pytest.raises(TextguardError) as found:
        load_params(smoke(tmp_path, variants=variants, treatments=ARMS, effects=effects))
    assert said in str(found.value)
    assert "\n" not in str(found.value)


def test_a_design_that_tells_its_factors_passes(tmp_path):
    params = {"variants": ["baseline", *ARMS], "treatments": ARMS, "seeds": [0, 1]}
    assert load_params(smoke(tmp_path, **params, effects={"factors": FACTORS, "design": list(ARMS)})).effects.factors == FACTORS


def test_the_stage_writes_what_tables_figures_and_the_page_read(tmp_path, monkeypatch):
    from textguard.report.page import read_revision, write_page
    from textguard.report.tables import tables_of

    for name in ("metrics", "plots"):
        shutil.copytree(REPOSITORY / "grids/smoke" / name, tmp_path / name)
    (tmp_path / "prompts/texts/digits-descriptions").mkdir(parents=True)
    answer = {"class_name": "0", "text": "a ring", "provider": "replay", "model": None}
    (tmp_path / "prompts/texts/digits-descriptions/responses.jsonl").write_text(json.dumps(answer) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    asked = {"effects": {"contrasts": {"text <guided>": ["descriptions", "baseline"]}}, "closeup": {"images": 0}}
    params = load_params(smoke(tmp_path, **asked, root=str(REPOSITORY)))
    stage.main(params)
    (table,) = (table for table in tables_of(params) if table.name == "effects")
    assert "text <guided> (descriptions against baseline): DeltaLoss of this one training: " in table.caption
    shutil.copy(next(Path("plots/figures").glob("outcomes-*.svg")), "plots/figures/effects-digits-resnet18.svg")
    write_page(Path("page.html"), params, read_revision())
    page = Path("page.html").read_text(encoding="utf-8")
    assert "What makes it resilient?" in page
    assert "<li>text &lt;guided&gt; (descriptions against baseline): DeltaLoss" in page
    assert "closeup.images of params.yaml is 0" in page
    with pytest.raises(InvalidArtifact, match="does not have the contrasts"):
        tables_of(load_params(smoke(tmp_path, effects={"contrasts": {"other": ["descriptions", "baseline"]}})))
    assert "effects" not in [found.name for found in tables_of(load_params(smoke(tmp_path)))]


def test_a_grid_of_many_variants_draws_those_that_it_names(tmp_path):
    params = {"variants": ["baseline", *(f"v{number}" for number in range(12))], "treatments": {}}
    params["treatments"] = {name: {"logit_penalty": 0.01} for name in params["variants"][1:]}
    assert load_params(smoke(tmp_path, **params)).drawn == params["variants"][:8]
    shown = load_params(smoke(tmp_path, **params, figures={"shown": ["v9", "v3"]}))
    assert shown.drawn == ["baseline", "v3", "v9"]
    with pytest.raises(TextguardError, match=r"figures\.shown"):
        load_params(smoke(tmp_path, **params, figures={"shown": ["v12"]}))
