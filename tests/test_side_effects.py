"""What belongs to the caller of an engine stays as it is: the model, its mode, its images."""

import pytest
import torch
from torch import nn

from conftest import TINY, settle
from fault_helpers import TOLERANCE, make_faults, random_faults
from textguard.faults.damage import FaultModel
from textguard.faults.engines import ENGINES, make_engine


def snapshot(model):
    return {name: (tensor.clone(), tensor.stride()) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("target", ["neuron", "weight"])
@pytest.mark.parametrize("name", ENGINES)
def test_the_model_and_the_images_are_left_alone(tiny_model, images, name, target):
    if name == "pytorchfi" and (target == "weight" or isinstance(tiny_model, TINY["transformer"])):
        pytest.skip("PyTorchFI cannot")
    before, pictures = snapshot(tiny_model), images.clone()
    golden = tiny_model(images).detach()
    engine = make_engine(name, tiny_model, images[0], 16, target=target)
    sizes = [site.weights if target == "weight" else site.neurons for site in engine.sites]
    draw = torch.Generator().manual_seed(0)
    position = torch.arange(40) % len(sizes)
    neuron = (torch.rand(40, generator=draw) * torch.tensor(sizes)[position]).long()
    mask = 1 << torch.randint(32, (40,), generator=draw)
    faults = make_faults(position, torch.arange(40) % 12, neuron, mask, 3.0, FaultModel(target))
    first, second = engine.run(images, faults), engine.run(images, faults)
    engine.observe(images)
    # Nor does one run leave anything behind for the next.
    assert torch.equal(first.logits.view(torch.int32), second.logits.view(torch.int32))
    for key, (tensor, stride) in snapshot(tiny_model).items():
        assert torch.equal(before[key][0], tensor)
        assert before[key][1] == stride
    assert all(parameter.requires_grad for parameter in tiny_model.parameters())
    assert torch.equal(pictures, images)
    assert torch.equal(tiny_model(images), golden)


@pytest.mark.parametrize("name", ENGINES)
def test_models_that_change_their_input_do_not_change_the_callers_images(name, images):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    ).eval()
    pictures = images.clone()
    engine = make_engine(name, model, images[0], 16)
    faults = random_faults(engine, len(images), 40, 3.0)
    outcomes = engine.run(images, faults)
    torch.testing.assert_close(engine.observe(images), outcomes.golden_logits, **TOLERANCE)
    assert torch.equal(images, pictures)
    assert model[0].inplace


@pytest.mark.parametrize("name", ENGINES)
def test_a_model_in_training_stays_in_training(resnet, images, name):
    engine = make_engine(name, resnet.train(), images[0], 16)
    faults = random_faults(engine, len(images), 40, 3.0)
    outcomes = engine.run(images, faults)
    assert all(module.training for module in resnet.modules())
    torch.testing.assert_close(outcomes.golden_logits, resnet.eval()(images), **TOLERANCE)


@pytest.mark.parametrize("name", ENGINES)
def test_engines_can_be_built_in_inference_mode(name, images):
    torch.manual_seed(0)
    model = settle(TINY["resnet"]())
    engine = make_engine(name, model, images[0], 16)
    faults = random_faults(engine, len(images), 60, 3.0)
    expected = engine.run(images, faults)
    with torch.inference_mode():
        pictures = images.clone()
        inside = make_engine(name, model, pictures[0], 16)
        outcomes = inside.run(pictures, faults)
        assert torch.equal(pictures, images)
    assert type(inside) is type(engine)
    assert torch.equal(outcomes.logits, expected.logits)
    # And a model whose weights were made there.
    with torch.inference_mode():
        torch.manual_seed(0)
        made_inside = TINY["resnet"]().eval()
        made_inside.load_state_dict(model.state_dict())
        before = snapshot(made_inside)
        outcomes = make_engine(name, made_inside, pictures[0], 16).run(pictures, faults)
        assert torch.equal(outcomes.logits, expected.logits)
        assert all(torch.equal(before[key][0], tensor) for key, tensor in made_inside.state_dict().items())
