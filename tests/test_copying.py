"""Models with attributes that Python cannot copy go through a campaign, or are refused in one line."""

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from textguard.errors import UnsupportedModel
from textguard.faults import make_engine
from textguard.faults.copying import copy_model


class Keeps(nn.Module):
    """A classifier that keeps something."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(1, 2, 3), nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(x))
        self.seen = {"last": [x]}
        return self.fc(x.flatten(1))


class Stubborn:
    def __deepcopy__(self, memo: dict) -> None:
        raise RuntimeError("never\nmind")


def hook_of(lock: object) -> object:
    class Camera:
        def __init__(self) -> None:
            self.lock = lock

        def look(self, module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            self.output = output

    return Camera().look


@pytest.mark.parametrize("name", ["replay", "whole"])
@pytest.mark.parametrize("kept", ["lock", "file", "generator", "activation", "hook", "weight_norm"])
def test_a_model_that_keeps_what_cannot_be_copied_is_taken(kept, name, tmp_path: Path):
    model, images = Keeps().eval(), torch.randn(3, 1, 6, 6)
    with (tmp_path / "log").open("w", encoding="utf-8") as file:
        match kept:
            case "lock":
                model.fc.state = [threading.Lock()]
            case "file":
                model.log = file
            case "generator":
                model.generator = torch.Generator()
            case "hook":
                model.conv.register_forward_hook(hook_of(threading.Lock()))
            case "weight_norm":
                with pytest.warns(FutureWarning):
                    nn.utils.weight_norm(model.fc)
        expected = model(images)  # with gradients: what is left behind has some
        left = model.seen["last"][0]
        engine = make_engine(name, model, images[0], 4)
        torch.testing.assert_close(engine.observe(images), expected.detach())
        assert model.seen["last"][0] is left  # the user's model is as it was
        assert left.grad_fn is not None


def test_what_cannot_be_copied_at_all_is_one_line():
    model = Keeps()
    model.stubborn = Stubborn()
    assert copy_model(model).stubborn is model.stubborn

    class Rare(Keeps):
        def __deepcopy__(self, memo: dict) -> None:
            raise TypeError("cannot pickle this")

    with pytest.raises(UnsupportedModel, match=r"Rare cannot be copied \(TypeError: cannot pickle this\); keep what"):
        make_engine("replay", Rare().eval(), torch.zeros(1, 6, 6), 4)
