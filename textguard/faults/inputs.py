"""What a model and its data are, looked at before anything is injected: the loader, its first batch, and the logits of that.

Engines know models from one tensor to logits. Here whatever else a loader gives becomes that: `batches` gives one tensor and
labels for positions in the data set, and `prepare` the model that takes this tensor.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from textguard.errors import InvalidParameter, Setting, TextguardError, UnsupportedModel, printable
from textguard.faults.exported import evaluation
from textguard.faults.task import CLASSES, Task

LOADER = Setting("loader")
ALIGNED = 16  # bytes, which the largest numbers of torch take
_kept: WeakKeyDictionary[DataLoader, DataLoader] = WeakKeyDictionary()  # with workers that stay


def count_images(loader: DataLoader) -> int:
    """The number of positions in the loader's data set, whether it reads all of them or not. Raises InvalidParameter."""
    if not isinstance(loader, DataLoader):
        raise InvalidParameter(
            LOADER,
            f" is a {type(loader).__name__}; it must be a torch.utils.data.DataLoader, such as "
            "DataLoader(TensorDataset(images, labels), batch_size=64)",
        )
    if isinstance(loader.dataset, IterableDataset):
        raise InvalidParameter("the DataLoader's data set must give images by their position (a map-style data set)")
    try:
        count = len(loader.dataset)
    except TypeError as error:
        raise InvalidParameter(LOADER, " has a data set without a length; give it a __len__") from error
    if not count:
        raise InvalidParameter(LOADER, " has an empty data set; at least one image is needed")
    return count


def positions(loader: DataLoader) -> Sequence[int]:
    """Where in its data set the images lie that a loader reads, ascending.

    A sampler may leave images out. One that gives some twice, or others each time, is refused, because then what was assessed
    would be another data set.

    Parameters
    ----------
    loader : DataLoader
        Reads a map-style data set, in whatever order.

    Returns
    -------
    sequence of int
        The positions.

    Raises
    ------
    InvalidParameter
        The data set is no map-style one, is empty, or is not read the same way each time.

    Examples
    --------
    >>> import torch
    >>> from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset
    >>> from textguard.faults.inputs import positions
    >>> data = TensorDataset(torch.zeros(9, 2), torch.zeros(9).long())
    >>> positions(DataLoader(data, sampler=SubsetRandomSampler([7, 2, 3]))), positions(DataLoader(data, shuffle=True))
    ([2, 3, 7], range(0, 9))
    """
    count = count_images(loader)
    own = type(loader.batch_sampler) not in (BatchSampler, type(None))
    sampler = loader.batch_sampler if own else loader.sampler
    if isinstance(sampler, DistributedSampler):
        raise _refused(sampler, "gives each process other images; processes share injections without it, so leave it out")
    if isinstance(sampler, (RandomSampler, WeightedRandomSampler)):
        if isinstance(sampler, WeightedRandomSampler) or sampler.replacement or sampler.num_samples != count:
            raise _refused(sampler, "reads other images each time")
        return range(count)
    if type(sampler) is SequentialSampler and sampler.data_source is loader.dataset:
        return range(count)
    found = _order(sampler, own, count)
    if type(sampler) is not SubsetRandomSampler and sorted(_order(sampler, own, count)) != sorted(found):
        raise _refused(sampler, "reads other images each time")
    if not found:
        raise _refused(sampler, "reads no image")
    wrong = [position for position in found if not 0 <= position < count]
    if wrong:
        raise _refused(sampler, f"reads position {wrong[0]} of a data set of {count} images")
    twice = len(found) - len(set(found))
    if twice:
        raise _refused(sampler, "reads images more than once")
    return range(count) if len(found) == count else sorted(found)


def _order(sampler: Any, of_batches: bool, count: int) -> list[int]:
    """The positions that a user's sampler gives; no more of them than it can rightly have, as it may be endless."""
    order = itertools.chain.from_iterable(sampler) if of_batches else sampler
    try:
        return [int(position) for position in itertools.islice(order, count + 1)]
    except (TypeError, ValueError) as error:
        raise _refused(sampler, f"gives no positions ({_reason(error)})") from error


def _refused(sampler: object, problem: str) -> InvalidParameter:
    return InvalidParameter(
        LOADER,
        f" has a {type(sampler).__name__} that {problem}; each image is read once, all or some of them: sampler="
        "SubsetRandomSampler(positions), or the data set torch.utils.data.Subset(dataset, positions)",
    )


def batches(
    loader: DataLoader, device: torch.device, parts: Sequence[Sequence[int]] | None = None, task: Task = CLASSES
) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
    """Positions, images [B, ...] and labels [B, ...], on the device: of `parts`, else of all that the loader reads, ascending.

    The loader's data set, workers and way to collate are used, not its order: positions are those in its data set. Where the
    task has a `forward` and the batch holds several tensors, they lie in one, byte behind byte; see `prepare`. Raises
    InvalidParameter where a batch is not what the task needs.
    """
    if parts is None:
        size, read = loader.batch_size or 1, positions(loader)
        parts = [read[start : start + size] for start in range(0, len(read), size)]
    shape = None
    for part, batch in raw_batches(loader, device, parts):
        images, labels = _images_of(batch, len(part), task), _labels_of(batch, len(part), task)
        if shape not in (None, images.shape[1:]):
            raise InvalidParameter(
                LOADER,
                f" gives images of several sizes, {_size(shape, images)} and {_size(images.shape[1:], images)}; bring all to "
                "one (a transform such as Resize and CenterCrop, or padding to one length)",
            )
        shape = images.shape[1:]
        yield part, images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _size(shape: Sequence[int], images: Tensor) -> str:
    return f"{shape[0]} bytes" if images.dtype == torch.uint8 and len(shape) == 1 else f"{list(shape)}"


def raw_batches(
    loader: DataLoader, device: torch.device, parts: Sequence[Sequence[int]]
) -> Iterator[tuple[Sequence[int], Any]]:
    """Positions and what the loader's collate function makes of the items there. Raises InvalidParameter."""
    chosen, parts = _chosen(loader, device, parts), iter(parts)
    found = None
    try:
        found = iter(chosen)
        for part in parts:
            try:
                batch = next(found)
            except StopIteration:  # not of ours: a data set of the user's raised it
                raise InvalidParameter(LOADER, f" ends before the images {_shown(part)}") from None
            except TextguardError:
                raise
            except Exception as error:
                raise InvalidParameter(LOADER, f" cannot give the images {_shown(part)}: {_loading(error)}") from error
            yield part, batch
    finally:
        del found


def _chosen(loader: DataLoader, device: torch.device, parts: Sequence[Sequence[int]]) -> DataLoader:
    """A loader that reads these parts as the user's would."""
    if loader in _kept:
        _kept[loader].batch_sampler.parts = parts
        return _kept[loader]
    options = {}
    if loader.num_workers:
        options = {
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": loader.persistent_workers,
            "timeout": loader.timeout,
        }
    chosen = DataLoader(
        loader.dataset,
        batch_sampler=_Parts(parts),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn if loader.batch_sampler else None,  # without batches, it would not stack
        pin_memory=device.type == "cuda",
        generator=loader.generator,
        **options,
    )
    if loader.persistent_workers:
        _kept[loader] = chosen
    return chosen


class _Parts:
    """A batch sampler whose batches can be others in the next pass."""

    def __init__(self, parts: Sequence[Sequence[int]]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[Sequence[int]]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def _shown(part: Sequence[int]) -> str:
    return f"{part[0]} to {part[-1]}" if len(part) > 1 else f"{part[0]}"


def _reason(error: BaseException) -> str:
    """The last line of an error, which may hold the traceback of a worker process."""
    lines = str(error).strip().splitlines()
    return printable(f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__)


def _loading(error: Exception) -> str:
    text = str(error)
    if "stack expects each tensor to be equal size" in text:
        sizes = text[text.rfind("equal size") :]
        return f"they have several sizes ({printable(sizes)}); bring all to one with a transform (Resize, CenterCrop, padding)"
    if "PIL" in text and "found <class" in text:
        return "they are PIL images; make tensors of them: transform=torchvision.transforms.ToTensor()"
    return _reason(error)


def _structure(batch: Any, leaf: Callable[[Tensor], Any]) -> Any:
    """The batch with `leaf` of each tensor in its place, and None for what is neither tensor nor container."""
    if isinstance(batch, Tensor):
        return leaf(batch)
    if isinstance(batch, MutableMapping):  # transformers' batches are no dict, and have attributes
        found = copy.copy(batch)
        found.update({name: _structure(item, leaf) for name, item in batch.items()})
        return found
    if isinstance(batch, (tuple, list)):
        items = [_structure(item, leaf) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return None


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _structure(batch, found.append)
    return found


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor [B, ...] as uint8 [B, a multiple of ALIGNED]."""
    rows = tensor.contiguous().reshape(len(tensor), -1).view(torch.uint8)
    return F.pad(rows, (0, -rows.shape[1] % ALIGNED))


def _images_of(batch: Any, count: int, task: Task) -> Tensor:
    """The one tensor of a batch that the model of `prepare` takes. Raises InvalidParameter."""
    if task.forward is None:
        images, found = _pair(batch, task)[0], []
        if not isinstance(images, Tensor):
            several = isinstance(images, (tuple, list, Mapping))
            cure = (
                "say how the model gets them: forward=lambda model, batch: model(*batch[0])"
                if several and not isinstance(images, Mapping)
                else "say how the model gets them: forward=lambda model, batch: model(**batch[0])"
                if several
                else "a tensor is needed (ToTensor() makes one)"
            )
            raise InvalidParameter(LOADER, f" gives images that are a {type(images).__name__}; {cure}")
        found = [images]
    else:
        found = _tensors(batch)
        if not found:
            raise InvalidParameter(LOADER, f" gives batches of {_described(batch)} without a tensor; tensors are needed")
    for tensor in found:
        if tensor.ndim == 0 or len(tensor) != count:
            raise InvalidParameter(
                LOADER,
                f" gives a tensor of shape {list(tensor.shape)} for {count} positions; one row per position is needed: a "
                "collate function may drop none (leave bad images out with torch.utils.data.Subset)",
            )
    return found[0] if len(found) == 1 else torch.cat([_bytes(tensor) for tensor in found], dim=1)


def _labels_of(batch: Any, count: int, task: Task) -> Tensor:
    """The labels of a batch; whole numbers as int64. Raises InvalidParameter."""
    given = _pair(batch, task)[1] if task.labels is None else _called("labels", task.labels, batch)
    try:
        labels = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidParameter(
            LOADER,
            f" gives labels such as {_first(given)!r:.60}; the number of each image's class is needed, such as "
            "names.index(label) in the data set",
        ) from error
    if labels.ndim == 0 or len(labels) != count:
        raise InvalidParameter(
            LOADER, f" gives labels of shape {list(labels.shape)} for {count} images; one per image is needed"
        )
    return labels if labels.is_floating_point() or labels.is_complex() else labels.long()


def _first(values: Any) -> Any:
    return values[0] if isinstance(values, (tuple, list)) and values else values


def _pair(batch: Any, task: Task) -> tuple[Any, Any]:
    """Images and labels, where batches are such pairs. Raises InvalidParameter."""
    if isinstance(batch, (tuple, list)) and (len(batch) == 2 or (task.labels is not None and len(batch) > 0)):
        return batch[0], batch[-1]
    cure = "labels=lambda batch: batch[1]"
    if isinstance(batch, Mapping):
        named = next((name for name in ("labels", "label", "target", "targets", "y") if name in batch), "labels")
        inputs = [name for name in batch if name != named]
        call = "model(**batch).logits" if "input_ids" in inputs else f"model(batch[{_first(inputs)!r}])"
        cure = f"forward=lambda model, batch: {call}, labels=lambda batch: batch[{named!r}]"
    elif isinstance(batch, (tuple, list)) and len(batch) > 2:
        cure = "forward=lambda model, batch: model(batch[0]), labels=lambda batch: batch[1]"
    raise InvalidParameter(
        LOADER, f" gives batches of {_described(batch)}, not of two items, images and labels; say which are which: {cure}"
    )


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with {', '.join(map(repr, itertools.islice(batch, 6)))}"
    if isinstance(batch, (tuple, list)):
        return f"{len(batch)} item{'' if len(batch) == 1 else 's'}"
    return f"a {type(batch).__name__}"


def _called(name: str, function: Callable, *arguments: Any) -> Any:
    """What a function of the user's returns. Raises InvalidParameter where it fails."""
    try:
        return function(*arguments)
    except TextguardError:
        raise
    except Exception as error:
        raise InvalidParameter(Setting(name), f" fails on the first batch ({_reason(error)})") from error


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters lie; without any, its buffers; without these, the CPU."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


class Adapted(nn.Module):
    """A model that takes one tensor: what `forward` makes of the user's model and the batch that lies in the tensor.

    Parameters
    ----------
    model : torch.nn.Module
        The user's.
    forward : callable
        From the model and a batch to logits.
    batch : Any
        One of the loader's batches; its tensors have one row per image.
    another : Tensor
        An image as `forward` of this class takes it, [...]: bytes in another order would be none.
    """

    adapted = True

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module, Any], Tensor], batch: Any, another: Tensor) -> None:
        super().__init__()
        self.model, self._forward, self.another = model, forward, another
        self.training = model.training
        self._single, end = len(_tensors(batch)) == 1, 0

        def place(tensor: Tensor) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
            nonlocal end
            start, size = end, tensor[0].numel() * tensor.element_size()
            end += size + -size % ALIGNED
            return start, start + size, tensor.dtype, tuple(tensor.shape[1:])

        self._places: list[tuple[int, int, torch.dtype, tuple[int, ...]]] = [place(tensor) for tensor in _tensors(batch)]
        self._batch = _structure(batch, lambda tensor: torch.empty(0, device="meta"))

    def forward(self, images: Tensor) -> Any:
        """images: [B, ...], as `batches` gives them."""
        tensors = [images]
        if not self._single:
            tensors = [images[:, start:end].view(kind) for start, end, kind, _ in self._places]
            shapes = [place[3] for place in self._places]
            tensors = [row.unflatten(1, shape) if shape else row[:, 0] for row, shape in zip(tensors, shapes, strict=True)]
        found = iter(tensors)
        return self._forward(self.model, _structure(self._batch, lambda _: next(found)))


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in its own again."""
    modes = {module: module.training for module in model.modules()}
    evaluation(model)
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def prepare(model: nn.Module, loader: DataLoader, task: Task = CLASSES, labelled: bool = True) -> tuple[nn.Module, Tensor]:
    """Check a model on the first batch of its data, and give what engines are made with.

    Parameters
    ----------
    model : torch.nn.Module
        The user's, on the device to use. It stays as it is.
    loader : DataLoader
        Gives the batches, from a map-style data set.
    task : Task, default that of an ordinary classifier
        What batches and logits mean.
    labelled : bool, default True
        Whether labels are looked at.

    Returns
    -------
    model : torch.nn.Module
        From one tensor [B, ...] to logits: the given one, or, where the task has a `forward`, one that holds it as `model`.
    image : Tensor
        One image of that tensor, [...], on the model's device.

    Raises
    ------
    InvalidParameter
        The loader or its batches are not what the task needs.
    UnsupportedModel
        The model does not run on them, or returns no such logits.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader
    >>> from textguard.faults import make_engine, make_task, prepare
    >>> data = [{"x": torch.ones(2), "scale": torch.tensor(2.0), "y": 0}]
    >>> task = make_task(
    ...     forward=lambda model, batch: model(batch["x"] * batch["scale"][:, None]), labels=lambda batch: batch["y"]
    ... )
    >>> model, image = prepare(nn.Linear(2, 3), DataLoader(data), task)
    >>> [site.layer for site in make_engine("replay", model, image, batch_size=8).sites]
    ['linear']
    """
    _refuse_kinds(model)
    device, read = device_of(model), positions(loader)
    ((part, batch),) = raw_batches(loader, device, [read[:2]])
    images, labels = (found.to(device) for found in (_images_of(batch, len(part), task), _labels_of(batch, len(part), task)))
    if (
        loader.batch_sampler is None
        and task.problem is CLASSES.problem
        and images.ndim > 2
        and labels.shape == images.shape[:2]
    ):
        raise InvalidParameter(
            LOADER,
            f" has batch_size=None and a data set that gives {labels.shape[1]} images at a time; give single ones, and let "
            "the loader batch them: DataLoader(dataset, batch_size=64)",
        )
    if task.forward is not None and not getattr(model, "adapted", False):
        model = Adapted(model, task.forward, batch, images[-1])
    with _evaluated(model):
        logits = check_logits(_answers(model, images, task), len(images), type(_inner(model)).__name__, task)
        if len(images) > 1:
            _check_alone(model, images, logits, task)
    if labelled:
        check_labels(logits, labels, task)
        _check_functions(logits, labels, task)
    return model, images[0]


def _inner(model: nn.Module) -> nn.Module:
    return model.model if isinstance(model, Adapted) else model


def _refuse_kinds(model: nn.Module) -> None:
    """Refuse models that no engine can look into. Raises InvalidParameter, UnsupportedModel."""
    if not isinstance(model, nn.Module):
        raise InvalidParameter(
            Setting("model"), f" is a {type(model).__name__}; it must be a torch.nn.Module (a function fits into one's forward)"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModel(
            f"{getattr(model, 'original_name', type(model).__name__)} is scripted (torch.jit), so that its operations cannot "
            "be seen; pass the torch.nn.Module that it was made of"
        )


def _answers(model: nn.Module, images: Tensor, task: Task) -> Any:
    """What the model returns. Raises UnsupportedModel where it fails."""
    try:
        return model(images.clone())
    except TextguardError:
        raise
    except Exception as error:
        raise UnsupportedModel(_failure(_inner(model), images, task, error)) from error


def _failure(model: nn.Module, images: Tensor, task: Task, error: Exception) -> str:
    name, found = type(model).__name__, f"images are {_kind(images)}"
    kinds = [tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    if task.forward is not None:
        return f"forward= fails on the first batch ({_reason(error)})"
    if kinds and images.dtype != kinds[0] and (images.is_floating_point() or images.dtype == torch.uint8):
        wanted = str(kinds[0]).removeprefix("torch.")
        scale = " / 255" if images.dtype == torch.uint8 else ""
        return (
            f"{found}, the weights of {name} {wanted}, and it does not run ({_reason(error)}); convert them in the data set, "
            f"image.to(torch.{wanted}){scale}, or here: forward=lambda model, batch: model(batch[0].to(torch.{wanted}){scale})"
        )
    return f"{name} does not run on the first batch, whose {found} ({_reason(error)})"


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def check_logits(logits: Any, count: int, name: str, task: Task = CLASSES) -> Tensor:
    """Logits of `count` images, as the task needs them. name: the model's. Raises UnsupportedModel, which names the cure."""
    if not isinstance(logits, Tensor):
        raise UnsupportedModel(f"{name} returns a {type(logits).__name__}, not a tensor of logits; {_cure_of(logits)}")
    shape, found = list(logits.shape), f"{name} returns {_kind(logits)} for {count} images"
    ready = task.problem is CLASSES.problem
    if not logits.is_floating_point():
        raise UnsupportedModel(f"{found}; floating-point logits are needed, before argmax or rounding")
    if ready and logits.ndim >= 3:
        if all(size == 1 for size in shape[2:]):
            raise UnsupportedModel(f"{found}; flatten them: forward=lambda model, batch: model(batch[0]).flatten(1)")
        what = (
            "segmentation, with classes for each pixel, is not supported" if logits.ndim == 4 else "one row per image is needed"
        )
        raise UnsupportedModel(
            f"{found}; {what}, only classes of whole images: [{count}, C] (or say loss=, correct= and predicted=)"
        )
    if logits.ndim == 0 or shape[0] != count:
        raise UnsupportedModel(f"{found}; one row per image is needed (squeeze() and means over the batch lose it)")
    if ready and (logits.ndim == 1 or shape[1] == 1):
        raise UnsupportedModel(f'{found}, one logit each; at least two are needed, or task="binary"')
    return logits


def _cure_of(returned: Any) -> str:
    """What to do where a model returns no tensor, or that there is nothing to be done."""
    items = returned if isinstance(returned, (tuple, list)) else [returned]
    if any(isinstance(item, Mapping) and "boxes" in item for item in items):
        return "detection, with boxes for each image, is not supported, only classes of whole images"
    if isinstance(returned, Mapping):
        if getattr(returned.get("out"), "ndim", 0) == 4:
            return "segmentation, with classes for each pixel, is not supported, only classes of whole images"
        names = [name for name in returned if name not in ("loss", "aux")]
        named = "logits" if "logits" in returned else _first(names)
        if hasattr(returned, "logits"):
            return "take its logits: forward=lambda model, batch: model(batch[0]).logits, or model(**batch).logits"
        return f"take its logits: forward=lambda model, batch: model(batch[0])[{named!r}]"
    if isinstance(returned, (tuple, list)):
        return "take its logits: forward=lambda model, batch: model(batch[0])[0]"
    return "take its logits: forward=lambda model, batch: model(batch[0]).logits"


def _check_alone(model: nn.Module, images: Tensor, logits: Tensor, task: Task) -> None:
    """Refuse a model that a batch of one image breaks, because engines run such ones. Raises UnsupportedModel."""
    name = type(_inner(model)).__name__
    try:
        alone = model(images[:1].clone())
    except Exception as error:
        raise UnsupportedModel(
            f"{name} runs on {len(images)} images and not on one ({_reason(error)}); "
            "x.squeeze() drops a batch of one, x.flatten(1) or x.squeeze(-1) does not"
        ) from error
    if isinstance(alone, Tensor) and alone.shape != (1, *logits.shape[1:]):
        raise UnsupportedModel(
            f"{name} returns {_kind(logits)} for {len(images)} images, {_kind(alone)} for one; "
            "x.squeeze() drops a batch of one, x.flatten(1) or x.squeeze(-1) does not"
        )


def check_labels(logits: Tensor, labels: Tensor, task: Task = CLASSES) -> None:
    """Refuse labels that do not fit the logits. Raises InvalidParameter, which names the cure."""
    problem = task.problem(logits, labels)
    if problem:
        raise InvalidParameter(LOADER, f" does not fit the model: {problem}")


def _check_functions(logits: Tensor, labels: Tensor, task: Task) -> None:
    """Refuse a task's functions that do not give one result per image. Raises InvalidParameter."""
    count = len(logits)
    for name, arguments in {"loss": (logits, labels), "correct": (logits, labels), "predicted": (logits,)}.items():
        found = _called(name, getattr(task, name), *arguments)
        needed = {"loss": "a loss", "correct": "True or False", "predicted": "a prediction"}[name]
        cure = {"loss": "reduction='none'", "correct": "logits.argmax(1) == labels", "predicted": "logits.argmax(1)"}[name]
        if not isinstance(found, Tensor) or found.ndim == 0 or len(found) != count or (name != "predicted" and found.ndim > 1):
            what = f"{_kind(found)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise InvalidParameter(
                Setting(name), f" gives {what} for {count} images; {needed} for each is needed, [{count}], such as by {cure}"
            )
        if (name == "loss" and not found.is_floating_point()) or (name == "correct" and found.dtype != torch.bool):
            raise InvalidParameter(Setting(name), f" gives {_kind(found)}; it must be {'float' if name == 'loss' else 'bool'}")
    certain = task.certainty(logits)
    if len(certain) != count:
        raise InvalidParameter(Setting("certainty"), f" gives {_kind(certain)} for {count} images; one for each is needed")
