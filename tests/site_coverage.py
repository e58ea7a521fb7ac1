"""What of a network is a site, what is listed, and whether that is true: on the meta device, where nothing is computed."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from textguard.faults.sites import DEFAULT_KINDS, SURVEYED, SiteList, Survey, callers, owner_of


@dataclass(frozen=True)
class Coverage:
    """sites: how many. listed: reason -> how many. unaccounted: parameters that are neither. false: said wrongly to be unread, or
    to be read by nothing though they are.
    """

    sites: int
    listed: Counter
    unaccounted: list[str]
    false: list[str]


def coverage(build: Callable[[], nn.Module], side: int, kinds: tuple[str, ...] = DEFAULT_KINDS) -> Coverage:
    """Survey a network for images [3, side, side]. Which parameters it reads, its gradients say without the code under test."""
    with torch.device("meta"):
        model = build()
    model = model.to("meta").eval()
    surveys = []
    with callers(model) as caller, torch.no_grad():
        for size in SURVEYED:
            surveys.append(Survey(model, caller))
            with surveys[-1]:
                model(torch.empty(size, 3, side, side, device="meta"))
    small, large = (survey.seen for survey in surveys)
    found = SiteList(model, kinds)
    sites = [site for pair in zip(small, large, strict=True) if (site := found.add(*pair))]
    found.finish(surveys[0].others)
    model(torch.empty(2, 3, side, side, device="meta")).sum().backward()
    read = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    modules = {site.layer.partition("#")[0] for site in sites} | {layer.partition("#")[0] for layer, _ in found.skipped}
    heard = {name for seen in small for name in seen.sources} | set(surveys[0].others)
    names = [name for name, _ in model.named_parameters()]
    unaccounted = [name for name in names if not {name, owner_of(name)} & modules and name not in heard]
    return Coverage(len(sites), Counter(reason for _, reason in found.skipped), unaccounted, sorted(heard ^ read))
