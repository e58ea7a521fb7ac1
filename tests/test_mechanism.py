"""How what faults do goes with how far the scores go, over classifiers."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from textguard.analysis.mechanism import association, layer_ranks, mean_over_kinds

GENERATOR = np.random.default_rng(3)


def made_up(slope=1.2, kinds=12, trainings=3, shift=0.0, between=0.3, noise=0.05, networks=1):
    """Classifiers whose log effect is slope times their log cause, their kind's own part, and noise."""
    rows = []
    for network in range(networks):
        for kind in range(kinds):
            place, own = GENERATOR.normal(0, 1), GENERATOR.normal(0, between)
            for seed in range(trainings):
                x = place + GENERATOR.normal(0, noise) + shift * network
                y = slope * (x - shift * network) + own + GENERATOR.normal(0, noise) - shift * network
                names = {"grid": "g", "dataset": "d", "backbone": f"n{network}", "variant": f"v{kind}", "seed": seed}
                rows.append(names | {"largest_logit": np.exp(x), "delta_loss": np.exp(y)})
    return pd.DataFrame(rows)


def test_the_slope_and_the_correlation_are_those_of_logarithms():
    table = made_up()
    found = association(table, "largest_logit", "delta_loss")
    x, y = np.log(table["largest_logit"]), np.log(table["delta_loss"])
    assert found["correlation"].value == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found["slope"].value == pytest.approx(np.polyfit(x, y, 1)[0])
    assert found["slope"].n == 36


def test_intervals_are_over_kinds_because_trainings_of_one_are_alike():
    """Of 90 % intervals, some 90 % hold; with each training on its own, where there are ten of each kind, half would."""
    held = 0
    for _ in range(60):
        estimate = association(made_up(trainings=10, kinds=20, between=0.8), "largest_logit", "delta_loss", 0.9)["slope"]
        held += estimate.low <= 1.2 <= estimate.high
    assert held >= 46


def test_within_networks_what_differs_between_them_does_not_count():
    """Networks with larger logits that are less fragile hide what holds in each of them."""
    table = made_up(networks=2, shift=6.0)
    found = association(table, "largest_logit", "delta_loss")
    assert found["slope"].value < 0 < found["slope_within"].low
    assert found["slope_within"].low < 1.2 < found["slope_within"].high


def test_what_has_no_logarithm_is_left_out_and_two_kinds_tell_no_error():
    table = made_up(kinds=3)
    table.loc[0, "delta_loss"] = 0.0
    table.loc[1, "delta_loss"] = np.inf
    assert association(table, "largest_logit", "delta_loss")["slope"].n == 7
    few = association(made_up(kinds=2), "largest_logit", "delta_loss")["slope"]
    assert np.isfinite(few.value)
    assert np.isnan(few.low)


def run(weights, variant, losses, sdcs):
    """A run whose layers a, b, c, ... have this damage."""
    layers = [
        SimpleNamespace(layer=name, delta_loss=SimpleNamespace(value=loss), sdc=SimpleNamespace(value=sdc))
        for name, loss, sdc in zip("abcde", losses, sdcs, strict=False)
    ]
    return SimpleNamespace(weights=weights, dataset="d", backbone="n", variant=variant, layers=layers)


def test_layers_are_ranked_within_a_classifier_and_a_classifier_counts_once():
    ranges = pd.DataFrame({"layer": list("dcbax"), "max_abs": [4.0, 3.0, 2.0, 1.0, 9.0]})  # of more layers, in any order
    one = run("w1", "v", [10, 20, 30, 40], [0.4, 0.3, 0.2, 0.1])
    other = run("w2", "v", [5, 5, 5, 5], [0.1, 0.2, 0.4, 0.3])
    found = layer_ranks({"g": [(one, ranges), (other, ranges)], "h": [(one, ranges)]})
    assert found["grid"].to_list() == ["g", "g"]
    assert found["delta_loss"].to_list() == pytest.approx([1, np.nan], nan_ok=True)
    assert found["sdc"].to_list() == pytest.approx([-1, 0.8])


def test_a_mean_over_kinds_draws_kinds_whole():
    """Ten trainings of each kind, all alike: the interval is as wide as that of the kinds' own values."""
    kinds = GENERATOR.normal(0.4, 0.1, 25)
    table = pd.DataFrame(
        [
            {"grid": "g", "dataset": "d", "backbone": "n", "variant": f"v{number}", "sdc": value}
            for number, value in enumerate(kinds)
            for _ in range(10)
        ]
    )
    found = mean_over_kinds(table, "sdc", 0.9)
    assert (found.value, found.n) == (pytest.approx(kinds.mean()), 250)
    assert found.high - found.low == pytest.approx(2 * 1.645 * kinds.std() / 5, rel=0.1)
    few = mean_over_kinds(table[table["variant"].isin(["v0", "v1"])], "sdc")
    assert np.isfinite(few.value)
    assert np.isnan(few.low)
