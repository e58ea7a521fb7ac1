"""What of a network is a site, what is listed, and whether that is true: on the meta device, where nothing is computed.

`python tests/site_coverage.py` surveys torchvision's classification networks and one of each of timm's families.
"""

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.networks import timm_networks
from textguard.faults.sites import DEFAULT_KINDS, SiteList, owner_of, survey_batches
from textguard.runtime import import_torchvision


@dataclass(frozen=True)
class Coverage:
    """What `coverage` finds.

    sites: how many; of_kind: by kind. listed: reason -> how many. unaccounted: parameters that are neither; false: of which it
    is wrongly said that they are read, or that they are not.
    """

    sites: int
    of_kind: Counter
    listed: Counter
    unaccounted: list[str]
    false: list[str]


def coverage(build: Callable[[], nn.Module], side: int, kinds: tuple[str, ...] = DEFAULT_KINDS) -> Coverage:
    """Survey a network for images [3, side, side]. Which parameters it reads, its gradients say without the code under test."""
    model, twin = (_on_meta(build) for _ in range(2))  # what one of them caches, the other does not have
    small, large, others, _ = survey_batches(model, torch.empty(3, side, side, device="meta"))
    found = SiteList(model, kinds)
    sites = [site for pair in zip(small, large, strict=True) if (site := found.add(*pair))]
    found.finish(others)
    twin(torch.empty(2, 3, side, side, device="meta")).sum().backward()
    read = {name for name, parameter in twin.named_parameters() if parameter.grad is not None}
    layers = {site.layer.partition("#")[0] for site in sites} | {layer.partition("#")[0] for layer, _ in found.skipped}
    heard = {name for seen in small for name in seen.sources} | set(others)
    owned = [name for name, _ in model.named_parameters() if not {name, owner_of(name)} & layers]
    return Coverage(
        len(sites),
        Counter(site.kind for site in sites),
        Counter(reason for _, reason in found.skipped),
        [name for name in owned if name not in heard],
        sorted((heard ^ read) | (_said_unread(found.skipped) & read)),
    )


def _said_unread(skipped: list[tuple[str, str]]) -> set[str]:
    """The parameters of which it is said that no operation reads them."""
    said = set()
    for layer, reason in skipped:
        names, found, _ = reason.removeprefix("no operation reads the ").partition(" of this ")
        said |= {f"{layer}.{name}" for name in names.split(" and ")} if found else set()
    return said


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return build().to("meta").eval()
    except NotImplementedError:  # such as RegNet's, whose widths are computed with tensors
        return build().to("meta").eval()


def torchvision_networks() -> Iterator[tuple[str, Callable[[], nn.Module], int]]:
    """Every classification network of torchvision: name, constructor, image side."""
    import_torchvision()
    from torchvision import models

    for name in models.list_models(module=models):
        side = 224 if name.startswith(("vit", "maxvit")) else 96 if name.startswith("inception") else 64
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        yield name, functools.partial(models.get_model, name, weights=None, **options), side


def main() -> int:
    """Survey all of them, and print what of each is a site and what is listed. Returns 1 where something is neither."""
    wrong = 0
    for name, build, side in (*torchvision_networks(), *timm_networks()):
        try:
            found = coverage(build, side)
        except Exception as error:
            print(f"{name:34} cannot be surveyed: {type(error).__name__}: {str(error).partition(chr(10))[0]:.90}", flush=True)
            continue
        others = {reason: count for reason, count in found.listed.items() if "not among the wanted" not in reason}
        bad = [*found.unaccounted, *found.false]
        wrong += bool(bad)
        print(f"{name:34} {found.sites:4} sites {found.listed.total():4} listed {bad or ''} {others or ''}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
