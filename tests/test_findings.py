"""The page of findings says what the files say: by verdict and never by value, and what no grid answers is said."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from textguard.estimates.statistics import Estimate
from textguard.report.findings import QUESTIONS, STUDIES, Study, TextClassifier, _goes, page
from textguard.report.rendering import show_estimate


def studies(**folders: Path) -> dict[str, Study]:
    return {name: Study(name, folders.get(name, Path("nowhere"))) for name in STUDIES}


def sections(text: str) -> dict[str, str]:
    """Question -> what stands below it."""
    return dict(part.split("\n\n", 1) for part in text.split("\n## ")[1:])


def change(path: str, **changes: object) -> None:
    """Three trainings instead of one, and other values at these places, `__` between the steps, in what a stage left."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    for cell in found:
        cell["seeds"] = [0, 1, 2]
        (first, *_) = cell.get("detectors", {"": {}}).values()
        for steps, value in changes.items():
            *parents, last = steps.split("__")
            node = first
            for step in parents:
                node = node[step]
            node[last] = value
    Path(path).write_text(json.dumps(found), encoding="utf-8")


RATIO = {"value": 2.5, "low": 1.25, "high": 5.0, "n": 3}
SHOWN = "2.50 [1.25, 5.00]"


@pytest.mark.parametrize("verdict", ["better", "worse", "not separable at 99%"])
def test_a_verdict_chooses_the_words_and_not_the_value(runs, verdict):
    changes = {"improvement__sdc__overall": RATIO, "verdict__sdc__overall": verdict}
    changes["verdict__delta_loss__overall"] = "not separable at 99%"
    change("metrics/cells.json", **changes)
    found = sections(page(studies(demo=Path())))["Does it carry over to other networks and data?"]
    better, worse = (str(int(verdict == one)) for one in ("better", "worse"))
    assert f"better than the baseline's in {better} and worse in {worse}" in found
    (line,) = (line for line in found.splitlines() if line.startswith("| d, resnet18, descriptions"))
    assert f"| {SHOWN} {verdict.split(' at ')[0]} |" in line
    assert line.endswith("| 3 |")


@pytest.mark.parametrize(("verdict", "told"), [("better", 1), ("worse", 1), ("not separable at 99%", 0)])
def test_a_text_is_set_against_a_random_start(runs, verdict, told):
    cells = [
        cell for cell in json.loads(Path("metrics/cells.json").read_text(encoding="utf-8")) if cell["variant"] == "descriptions"
    ]
    cells = [cells[0] | {"against": "random"}, cells[0] | {"against": "template"}]
    Path("metrics/contrasts.json").write_text(json.dumps(cells), encoding="utf-8")
    assert sections(page(studies(demo=Path())))["Does better text give more resilience?"].startswith("**Not answered here")
    changes = {"improvement__sdc__overall": RATIO, "verdict__sdc__overall": verdict}
    change("metrics/contrasts.json", **changes, improvement__delta_loss__overall={**RATIO, "low": 0.1})
    found = sections(page(studies(demo=Path(), faults=Path())))["Does better text give more resilience?"]  # demo's, once
    assert f"changes SDC in {told} and DeltaLoss in 0 of 1 comparisons" in found
    assert f"| {SHOWN} {verdict.split(' at ')[0]} |" in found
    assert "| 5.00 / 10.0 | 3 |" in found  # the farther end, in either direction
    assert "Made by: `make repro`." in found


def test_other_faults_are_counted_by_verdict(runs):
    file = Path("metrics/hardware.json")
    cells = json.loads(file.read_text(encoding="utf-8"))
    for cell in cells:
        for one in cell["ratios"]:
            one["verdict"] = {"two_bits": "worse"}.get(one["faults"], "better" if one["measure"] == "sdc" else "no verdict")
            one["verdict"] = one["verdict"].replace("no verdict", "not separable at 99%")
    file.write_text(json.dumps(cells), encoding="utf-8")
    found = sections(page(studies(faults=Path())))["Where does the ranking of the variants flip under other faults?"]
    names = {one["faults"] for one in cells[0]["ratios"] if one["place"] == "overall" and one["measure"] == "sdc"}
    assert f"Of {len(names)} kinds of faults" in found
    assert f"by SDC in {len(names) - 1} and by DeltaLoss in 0; they are told worse in 1 and 1." in found
    (line,) = (line for line in found.splitlines() if line.startswith("| two bits"))
    assert line.count("worse") == 2


def test_how_scores_go_with_damage_is_said_by_the_interval():
    assert _goes(Estimate(0.9, 0.1, 1.0, 9)) == "goes with"
    assert _goes(Estimate(-0.9, -1.0, -0.1, 9)) == "goes against"
    assert _goes(Estimate(0.9, -0.1, 1.0, 9)) == _goes(Estimate(0.9, np.nan, np.nan, 2)) == "cannot be told to go with"


def test_largest_logits_are_those_of_all_classifiers_and_a_rescaled_head_is_shown_beside_its_gain(runs):
    change("metrics/cells.json", rescaled={"same_temperature": RATIO})
    cells = json.loads(Path("metrics/cells.json").read_text(encoding="utf-8"))
    (head,) = (
        cell["detectors"]["profiled"]["improvement"]["delta_loss"]["head"]
        for cell in cells
        if cell["variant"] == "descriptions"
    )
    found = sections(page(studies(demo=Path(), faults=Path())))["Is it how far the scores go?"]
    assert f"Over {len(runs)} classifiers, DeltaLoss" in found  # those of `faults` are the demo's
    assert found.count(f"{SHOWN} of {show_estimate(Estimate(**head))} (demo: d, resnet18)") == 1
    assert len(re.findall(r"^\| (?:DeltaLoss|SDC), .* \| 4 \|$", found, re.MULTILINE)) == 4


def test_without_any_results_nothing_is_answered():
    found = sections(page(studies()))
    assert "not answered here" in found.pop("For a sceptic of the paper")
    assert len(found) == len(QUESTIONS) + 2  # those of the text classifier and of the cost
    assert all(text.startswith("**Not answered here: ") for text in found.values())
    assert not any("|" in text for text in found.values())


def effect(verdict: str) -> list[dict]:
    """An effect on everything, which the intervals judge so; its value would say that it is a gain."""
    places = [("delta_loss", "overall"), ("sdc", "overall"), ("top1", "all")]
    same = {"effect": RATIO, "second": RATIO, "largest": 5.0, "zeros": 0, "verdict": verdict}
    return [{"measure": measure, "place": place, **same} for measure, place in places]


def test_changes_and_factors_are_named_by_verdict(tmp_path):
    unclear = "not separable at 99%"
    changes = {"smoothing": "better", "longer": "worse", "cooler": unclear}
    contrasts = [
        {"name": name, "variant": name, "against": "baseline", "seeds": [0, 1, 2], "effects": effect(verdict)}
        for name, verdict in changes.items()
    ]
    factors = {"decay": "worse", "head": unclear, "decay head": unclear, "decay text": "better"}
    found = [{"factors": names.split(), "aliases": [], "effects": effect(verdict)} for names, verdict in factors.items()]
    levels = {name: [0, 1] for name in ("decay", "head", "text")}
    design = {"factors": levels, "variants": ["a"], "seeds": [0], "effects": found, "fits": []}
    network = {"dataset": "d", "backbone": "b", "confidence": 0.99}
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "effects.json").write_text(
        json.dumps([network | {"contrasts": contrasts, "factorial": design}]), encoding="utf-8"
    )
    told = sections(page(studies(factorial=tmp_path)))["Which factors act, and which need each other?"]
    assert told.startswith("**Of 2 factors, none leaves less SDC and 1 more, none leaves less DeltaLoss and 1 more. Of 2 pairs")
    assert "none saves less SDC together than apart, and 1 more; none saves less DeltaLoss together than apart" in told
    assert f"| decay x text | {SHOWN} better |" in told
    assert "| decay x head" not in told  # only those that are told
    (tmp_path / "metrics" / "effects.json").write_text(json.dumps([network | {"contrasts": contrasts}]), encoding="utf-8")
    told = sections(page(studies(causes=tmp_path)))["What makes these classifiers resilient?"]
    assert told.startswith("**Of 3 single changes of the plain classifier, 1 leaves less SDC and 1 more, 1 leaves less Delta")
    assert "Less SDC: smoothing.**" in told
    assert f"| cooler | {SHOWN} not separable | {SHOWN} not separable | {SHOWN} not separable | 3 |" in told


def test_texts_are_set_against_a_random_start_and_a_language_model_against_itself(tmp_path):
    verdicts = {
        ("one answer", "random"): "better",
        ("three answers", "random"): "not separable at 99%",
        ("colder", "one answer"): "worse",
    }
    contrasts = [
        {"name": name, "variant": name, "against": against, "seeds": [0, 1, 2], "effects": effect(verdict)}
        for (name, against), verdict in verdicts.items()
    ]
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "effects.json").write_text(
        json.dumps([{"dataset": "d", "backbone": "b", "confidence": 0.99, "contrasts": contrasts}]), encoding="utf-8"
    )
    found = sections(page(studies(texts=tmp_path)))
    told = found["Do more questions or more answers give more?"]
    assert told.startswith("**Of 2 starts, each set against a head that starts at random, 1 leaves less SDC and none more, 1 l")
    assert f"| three answers | {SHOWN} not separable |" in told
    assert "colder" not in told
    told = found["What do the language model's temperature and size do?"]
    assert told.startswith("**Of 1 changes of who answers the questions, none leaves less SDC and 1 more, none leaves less Del")
    assert "three answers" not in told


def test_a_mitigation_helps_where_its_interval_says_so_on_the_one_and_on_the_other(runs):
    def bargain(low):
        bought = {"without": RATIO, "under": RATIO, "ratio": RATIO | {"low": low}}
        share = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 3}
        sdc = bought | {"without": share, "under": share}
        costs = {"bits": 1.0, "gates": None, "comparisons": 2.5e6, "top1_change": {"value": 0, "low": -1, "high": 1, "n": 3}}
        return costs | {"sdc": sdc, "delta_loss": bought}

    cells = json.loads(Path("metrics/hardware.json").read_text(encoding="utf-8"))
    for cell in cells:
        cell["protected"] = [
            {"kind": "mitigation", "name": "clip_to_zero", "baseline": bargain(1.25), "own": bargain(0.5)},
            {"kind": "mitigation", "name": "ranger", "baseline": bargain(0.5), "own": bargain(0.5)},
        ]
    Path("metrics/hardware.json").write_text(json.dumps(cells), encoding="utf-8")
    told = sections(page(studies(faults=Path())))["Which mitigation pays, and on which model?"]
    assert told.startswith(
        "**Of 2 mitigations of neurons, those that leave less SDC beyond their 99 % intervals are: on the base"
    )
    assert "on the baseline clip to zero; with descriptions none.**" in told
    assert "| clip to zero | descriptions | 0 [-1.00, 1.00] | 2.5 | 2.50 [0.500, 5.00] | 2.50 [0.500, 5.00] |" in told


def test_resilience_to_faults_and_to_corruption_go_together_by_the_interval(tmp_path):
    together = [
        {"dataset": "d", "measure": measure, "correlation": {"value": 0.5, "low": low, "high": 0.9, "n": 15}}
        for measure, low in (("delta_loss", 0.1), ("sdc", -0.1))
    ]
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "corruptions.json").write_text(
        json.dumps({"cells": [], "classifiers": [], "together": together}), encoding="utf-8"
    )
    told = sections(page(studies(vit=tmp_path)))["Does what stands faults stand corrupted images?"]
    assert told.startswith("**In vit, DeltaLoss goes with the points of top-1 that a corruption costs (0.500 [0.100, 0.900]);")
    assert "in vit, SDC cannot be told to go with the points" in told


def test_a_classifier_of_texts_is_told_of_by_verdict():
    pairs = {"smoothing": ("baseline", "better"), "text": ("baseline", "worse"), "text beyond random": ("random", "better")}
    contrasts = [
        {"name": name, "variant": name, "against": against, "seeds": [0, 1, 2], "effects": effect(verdict)}
        for name, (against, verdict) in pairs.items()
    ]
    effects = {"dataset": "d", "backbone": "b", "confidence": 0.99, "contrasts": contrasts}
    measured = TextClassifier.model_validate_json(json.dumps({"top1": {"baseline": 0.664, "text": 0.9}, "effects": effects}))
    told = sections(page(studies(), texts=measured))["Does a classifier of texts gain?"]
    assert told.startswith(
        "**Of 2 changes of a small transformer that classifies sentences, 1 leaves less SDC and 1 more, 1 lea"
    )
    assert f"| text beyond random | {SHOWN} better | {SHOWN} better | {SHOWN} better | 3 |" in told
    assert "66 % predicted right by the baseline" in told


def test_what_text_guidance_costs_is_said_from_the_medians_of_rounds():
    def network(step, single):
        return {
            "training": {"ratio": [step, step - 0.1, step + 0.1]},
            "inference_1": {"ratio": [single, 0.5, 1.5]},
            "inference_64": {"ratio": [1.0, 0.9, 1.1]},
            "training_mb": {"random": 103.0, "baseline": 100.0},
        }

    told = sections(page(studies(), {"a": network(1.2, 1.04), "b": network(1.05, 1.01)}))["What does text guidance cost?"]
    assert told.startswith(
        "**A training step takes 1.05 to 1.20 times as long as the baseline's, and the inference of one image 1."
    )
    assert "| a | 1.200 (1.100 to 1.300) | 1.040 (0.500 to 1.500) | 1.000 (0.900 to 1.100) | 1.030 |" in told
