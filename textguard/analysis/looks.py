"""Where classifiers look under faults, image by image."""

import math

import numpy as np
import pandas as pd

from textguard.analysis.files import CLOSEUP_DIR, LOOKS_DIR, load_closeup, load_looks
from textguard.artifacts import reading
from textguard.errors import InvalidArtifact
from textguard.estimates.maps import rank_correlation


def compare_looks(key: str) -> pd.DataFrame:
    """What `load_looks` reads, and how far each map agrees with that of the same image without faults.

    Adds columns rank_correlation, -1 to 1 and NaN in state `golden`, and changed, whether the class is another one than without
    faults, or logits or map are not finite. Raises InvalidArtifact where the means are not those of metrics/closeup.
    """
    looks, cam = load_looks(key), load_closeup(key).cam
    golden = looks[looks["state"] == "golden"].set_index("image").loc[looks["image"]]
    pairs = zip(golden["map"], looks["map"], strict=True)
    agreement = pd.Series([rank_correlation(*map(np.array, pair)) for pair in pairs], looks.index, dtype=float)
    looks["rank_correlation"] = agreement.where(looks["state"] != "golden")
    looks["changed"] = ~looks["finite"].astype(bool) | (looks["prediction"] != golden["prediction"].to_numpy())
    with reading(LOOKS_DIR / f"{key}.parquet", "closeup"):
        for state, mean in (
            looks.groupby("state", sort=False)["rank_correlation"].mean().drop("golden", errors="ignore").items()
        ):
            if not math.isclose(mean, getattr(cam, state).rank_correlation.value, abs_tol=1e-6):
                raise InvalidArtifact(f"has maps of state {state} that agree otherwise than {CLOSEUP_DIR / key}.json says")
    return looks
