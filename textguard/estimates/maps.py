"""How far two maps of one image agree."""

import math

import numpy as np


def rank_correlation(golden: np.ndarray, faulty: np.ndarray) -> float:
    """Spearman's rank correlation of two maps, -1 to 1; 0 where the faulty one is not finite, or one of them is flat."""
    if not np.isfinite(faulty).all():
        return 0.0
    from scipy.stats import rankdata  # takes as long to load as all of a closeup, and training rehearses one

    ranks = [rankdata(image) - (image.size + 1) / 2 for image in (golden.ravel(), faulty.ravel())]
    length = math.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return round(float(ranks[0] @ ranks[1] / length), 12) if length else 0.0


def overlap(golden: np.ndarray, faulty: np.ndarray) -> float:
    """Intersection over union of the quarters of two maps' places that speak most for the class; 0 where the faulty map is not
    finite.
    """
    if not np.isfinite(faulty).all():
        return 0.0
    most = [set(np.argsort(-image.ravel(), kind="stable")[: max(1, image.size // 4)].tolist()) for image in (golden, faulty)]
    return len(most[0] & most[1]) / len(most[0] | most[1])
