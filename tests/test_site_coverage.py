"""Each parameter's operation is a site or listed, in networks of torchvision and timm. All of them: tests/site_coverage.py."""

import functools

import pytest
import torch
from site_coverage import coverage
from torch import nn

from textguard.faults.operations import KINDS
from textguard.runtime import import_torchvision

import_torchvision()
import timm  # noqa: E402 (needs the operators)
from torchvision import models  # noqa: E402

# Network -> image side, and how many of its layers are no sites, because they compute what all images share.
NETWORKS = {
    "torchvision:vit_b_16": (224, 0),
    "torchvision:swin_v2_t": (64, 24),
    "torchvision:convnext_tiny": (64, 0),
    "torchvision:shufflenet_v2_x0_5": (64, 0),
    "timm:test_vit": (160, 0),
    "timm:eca_resnet33ts": (64, 0),
    "timm:test_nfnet": (64, 0),
    "timm:levit_128s": (224, 0),
    "timm:xcit_nano_12_p8_224": (224, 1),
    "timm:beit_base_patch16_224": (224, 0),
    "timm:gmixer_12_224": (224, 0),
    "timm:mobilevit_xxs": (64, 0),
}
WITH_ALL_KINDS = ("torchvision:vit_b_16", "timm:test_vit", "timm:test_nfnet", "timm:levit_128s")
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.MultiheadAttention)


@pytest.mark.parametrize("name", NETWORKS)
def test_each_parameter_is_of_a_site_or_listed(name):
    library, _, network = name.partition(":")
    side, shared = NETWORKS[name]
    options = {"weights": None} if library == "torchvision" else {}
    build = functools.partial(models.get_model if library == "torchvision" else timm.create_model, network, **options)
    found = coverage(build, side)
    assert (found.unaccounted, found.false) == ([], [])
    with torch.device("meta"):
        layers = sum(isinstance(module, LAYERS) for module in build().modules())
    assert found.sites == layers - shared
    if name in WITH_ALL_KINDS:
        asked = coverage(build, side, tuple(KINDS))
        assert (asked.unaccounted, asked.false) == ([], [])
        assert not any("wanted" in reason for reason in asked.listed)
