"""What a command line names: a network, its weights, and data, as Python objects and files of the user's own."""

import importlib
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from textguard.artifacts import read_pth, read_safetensors, reading
from textguard.errors import InvalidArtifact, InvalidParameter, TextguardError, printable
from textguard.faults.exported import evaluation

FOLDER = "folder:"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Made = TypeVar("Made")


def named(spec: str, option: str) -> Any:
    """The object that MODULE:NAME names, from the working directory or what is installed. Raises InvalidParameter."""
    module, _, name = spec.partition(":")
    if not module or not name:
        raise InvalidParameter(f"{option} is {printable(repr(spec), 80)}; it must be MODULE:NAME, as mypkg.net:build")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = own_code(lambda: importlib.import_module(module), f"{option} {spec}: importing {module}")
    except InvalidParameter as error:
        if isinstance(error.__cause__, ModuleNotFoundError) and error.__cause__.name in (module, module.partition(".")[0]):
            where = f"{here}, or among the installed packages"
            raise InvalidParameter(f"{option} {spec}: there is no module {module} in {where}; go to its folder") from error
        raise
    for part in name.split("."):
        if not hasattr(found, part):
            known = [known for known in vars(found) if not known.startswith("_")] if hasattr(found, "__dict__") else []
            raise InvalidParameter(f"{option} {spec}: there is no {part!r} in it; it has {printable(', '.join(known), 120)}")
        found = getattr(found, part)
    return found


def own_code(work: Callable[[], Made], what: str) -> Made:
    """What code of the user's returns. Raises InvalidParameter, with the place of whatever it raised."""
    try:
        return work()
    except TextguardError:
        raise
    except Exception as error:
        raise InvalidParameter(f"{what} failed: {told(error)}") from error


def told(error: BaseException) -> str:
    """An exception in one line: its class, what it says, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {printable(str(error)) or 'no reason given'}{place}"


def build_model(spec: str, arguments: Mapping[str, Any], weights: Path | None, device: torch.device) -> nn.Module:
    """The network that MODULE:NAME is or makes, with its weights, on the device, in evaluation mode.

    Raises InvalidParameter, InvalidArtifact.
    """
    found = named(spec, "the network")
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise InvalidParameter(
                f"the network {spec} is a {type(found).__name__}; it must be a Module, or make one when called"
            )
        found = own_code(lambda: found(**arguments), f"the network {spec}")
    elif arguments:
        raise InvalidParameter(f"the network {spec} is a Module that takes no --arguments; name what makes it")
    if not isinstance(found, nn.Module):
        raise InvalidParameter(f"the network {spec} made a {type(found).__name__}; it must make a torch.nn.Module")
    if weights:
        load_weights(found, weights)
    return evaluation(found.to(device))


def load_weights(model: nn.Module, file: Path) -> None:
    """Fill a network from a file of weights, each parameter and buffer. Raises InvalidArtifact."""
    if file.suffix == ".safetensors":
        tensors = read_safetensors(file, "")[0]
    elif file.suffix in (".pt", ".pth"):
        tensors = read_pth(file)
        tensors = tensors.get("state_dict", tensors) if isinstance(tensors, dict) else tensors
    else:
        raise InvalidArtifact(
            f"{file} is no file of weights by its name; allowed: .safetensors, .pt, .pth (without code in it)"
        )
    with reading(file, ""):
        if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
            raise InvalidArtifact("holds other things than tensors by name; save model.state_dict()")
        wanted = model.state_dict()
        lacking, surplus = [name for name in wanted if name not in tensors], [name for name in tensors if name not in wanted]
        # A counter of training steps changes no inference, and old files lack it.
        lacking = [name for name in lacking if not name.endswith("num_batches_tracked")]
        if lacking or surplus:
            told = [
                f"{what} {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
                for what, names in (("lacks", lacking), ("has besides", surplus))
                if names
            ]
            raise InvalidArtifact(f"does not fit the network: it {', and '.join(told)}")
        for name, value in tensors.items():
            if value.shape != wanted[name].shape:
                raise InvalidArtifact(f"has {name} of shape {list(value.shape)}, and the network {list(wanted[name].shape)}")
        model.load_state_dict(tensors, strict=False)


def build_loader(spec: str, batch_size: int, workers: int, picture: Mapping[str, Any]) -> DataLoader:
    """The data that the command line names: folder:PATH, or a DataLoader or data set that MODULE:NAME is or makes.

    picture: size, resize, mean and std of images in folders. Raises InvalidParameter, InvalidArtifact.
    """
    if spec.startswith(FOLDER):
        from textguard.assessment.folders import ImageFolders

        found: Any = ImageFolders(Path(spec.removeprefix(FOLDER)).expanduser(), **picture)
    else:
        found = named(spec, "--data")
        if not isinstance(found, DataLoader | Dataset) and callable(found):
            made = found
            found = own_code(made, f"--data {spec}")
    if isinstance(found, DataLoader):
        return found
    if not (hasattr(found, "__getitem__") and hasattr(found, "__len__")) or isinstance(found, tuple | dict | str):
        raise InvalidParameter(
            f"--data {spec} is a {type(found).__name__}; it must be a DataLoader or a data set of (image, label), or make one"
        )
    return DataLoader(found, batch_size=batch_size, num_workers=workers)
