"""Factorial designs at two levels: what they can tell, and what they cannot tell apart."""

import itertools

import numpy as np

# The places of a main effect's factor, or of two factors that interact.
Term = tuple[int, ...]


def terms_of(levels: np.ndarray) -> dict[Term, np.ndarray]:
    """The columns of all main effects and two-way interactions of a design.

    Parameters
    ----------
    levels : ndarray
        int [V, F]: of each variant, -1 where a factor is low and 1 where it is high.

    Returns
    -------
    dict of tuple to ndarray
        Term -> int [V] of -1 and 1, main effects first.

    Examples
    --------
    >>> [(term, column.tolist()) for term, column in terms_of(np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]])).items()]
    [((0,), [-1, 1, -1, 1]), ((1,), [-1, -1, 1, 1]), ((0, 1), [1, -1, -1, 1])]
    """
    factors = range(levels.shape[1])
    terms = [*((factor,) for factor in factors), *itertools.combinations(factors, 2)]
    return {term: levels[:, list(term)].prod(axis=1) for term in terms}


def aliases_of(levels: np.ndarray) -> dict[Term, list[Term]]:
    """The terms that have columns of their own, and those that share them.

    Parameters
    ----------
    levels : ndarray
        int [V, F], see `terms_of`.

    Returns
    -------
    dict of tuple to list of tuple
        Term -> later terms with the same column, or its negative: an effect of one is an effect of all. An interaction whose
        column is constant stands nowhere, as no design without its other value tells of it.

    Examples
    --------
    >>> aliases_of(np.array([[-1, -1, 1], [1, -1, -1], [-1, 1, -1], [1, 1, 1]]))  # the third is the product of the others
    {(0,): [(1, 2)], (1,): [(0, 2)], (2,): [(0, 1)]}
    """
    found: dict[Term, list[Term]] = {}
    terms = terms_of(levels)
    for term, column in terms.items():
        same = [kept for kept in found if abs(int(terms[kept] @ column)) == len(column)]
        if same:
            found[same[0]].append(term)
        elif len(set(column.tolist())) > 1:
            found[term] = []
    return found
