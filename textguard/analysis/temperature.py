"""Heads at other temperatures: what all faults of a last layer do once its logits are multiplied by a constant.

That changes no prediction, but DeltaLoss by any factor. An improvement that stays when both models' largest logits are alike is
more than such a constant.
"""

from dataclasses import replace

import numpy as np

from textguard.analysis.campaigns import CampaignRecords
from textguard.estimates.summary import LayerResult, Totals, summarise_totals
from textguard.schema.campaign import Rescaled


def at_temperature(totals: Totals, rescaled: Rescaled, temperature: float) -> Totals:
    """What all faults of a last layer do where its logits are multiplied by a constant, behind the range detector.

    DeltaLoss between two stored temperatures is interpolated, in its logarithm and the temperature's.

    Parameters
    ----------
    totals : Totals
        What they do as the classifier is.
    rescaled : Rescaled
        The sums of DeltaLoss at the stored temperatures.
    temperature : float
        The constant.

    Returns
    -------
    Totals
        `totals` with another `delta_loss`, in nats. It is NaN where the temperature is beyond the stored ones, or no fault does
        harm.

    Examples
    --------
    >>> import numpy as np
    >>> from textguard.analysis.temperature import at_temperature
    >>> from textguard.estimates.summary import Totals
    >>> from textguard.schema.campaign import Rescaled
    >>> totals = Totals("fc", 2, *(np.array([count]) for count in (4, 1, 0, 2, 0, 6.0)))
    >>> rescaled = Rescaled(factor=1.0, temperatures=[0.25, 1.0, 4.0], delta_loss=[3.0, 6.0, 24.0])
    >>> [float(at_temperature(totals, rescaled, t).delta_loss.sum().round(6)) for t in (0.5, 1.0, 2.0, 8.0)]
    [4.242641, 6.0, 12.0, nan]
    """
    stored = np.log(rescaled.temperatures)
    with np.errstate(divide="ignore", invalid="ignore"):
        sums = np.log(rescaled.delta_loss)
        wanted, one = np.interp([np.log(temperature), 0.0], stored, sums, left=np.nan, right=np.nan)
        share = np.exp(wanted - one)
    return replace(totals, delta_loss=totals.delta_loss * share)


def rescaled_heads(campaign: CampaignRecords, detector: str, temperature: float, nonfinite: str) -> dict[str, LayerResult]:
    """A campaign's last layer with its logits scaled.

    Parameters
    ----------
    campaign : CampaignRecords
        The campaign.
    detector : str
        The range detector, one of the campaign's.
    temperature : float
        What brings the logits to those of another classifier.
    nonfinite : str
        The policy of params.yaml's section `statistics`.

    Returns
    -------
    dict of str to LayerResult
        `same_temperature`, at that temperature, and `folded`, with the scale behind the layer in its weights. Empty where the
        last layer has no closed form; `folded` is missing where there is no scale.
    """
    rescaled = campaign.stored.rescaled.get(detector)
    if rescaled is None:
        return {}
    totals = Totals.from_json(campaign.stored.exact[detector][-1].as_json())
    heads = {"same_temperature": at_temperature(totals, rescaled, temperature)}
    if rescaled.folded:
        heads["folded"] = Totals.from_json(rescaled.folded.as_json())
    return {name: summarise_totals(found, nonfinite) for name, found in heads.items()}
