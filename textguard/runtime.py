"""The machine: devices, threads, determinism, progress. Nothing here may change a result or a hash.

TEXTGUARD_DEVICE        cpu, cuda, cuda:1, mps; default: cuda where there is one (each process its own), else cpu
TEXTGUARD_PROCESSES     processes that share training, evaluation and campaigns; default 1 (see stages/__main__.py)
TEXTGUARD_WORKERS       processes that read images; default: one per core but one, 0 for small images that lie in memory
TEXTGUARD_CHECKPOINT    seconds between two checkpoints within an epoch; default 600
TEXTGUARD_CHANNELS_LAST 1 trains with another memory layout, which is faster for convolutions on many processors; default 0
TEXTGUARD_COMPILE       1 trains with torch.compile; default 0
TEXTGUARD_PROGRESS      seconds between two progress lines when there is no terminal; default 10
"""

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import torch
from tqdm import tqdm

from textguard.environment import environment_number, process_group, progress_interval
from textguard.errors import InvalidParameter

_OPERATORS = ("nms", "qnms")


def import_torchvision() -> None:
    """Import torchvision: beside any build of torch, and without torch's compiler.

    PyPI's torchvision links CUDA. Beside a CPU build of torch its compiled library does not load, and the import stops at two
    operators that it only wants to annotate. Declared without an implementation they are enough: what textguard uses of
    torchvision is Python. Where the library loads, it brings the operators and nothing is declared.

    The compiler takes as long to import as torch itself, in every stage, and torchvision wants two functions of it: one for
    detection models that run on GPUs, which a stand-in fetches when it is called, and one that keeps the compiler away from
    a class of annotated images, which nothing here compiles.
    """
    spec = importlib.util.find_spec("torchvision")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for library in Path(folder).glob("_C*.so"):
            try:
                torch.ops.load_library(library)
            except OSError:
                continue
    for name in _OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    stand_ins = {name: ModuleType(name) for name in ("torch._dynamo", "torch._dynamo.utils") if name not in sys.modules}
    for module in stand_ins.values():
        module.is_compile_supported, module.disable = _is_compile_supported, _not_disabled
    sys.modules.update(stand_ins)
    try:
        importlib.import_module("torchvision.transforms.v2")
    finally:
        for name in stand_ins:
            del sys.modules[name]


def _not_disabled(function: Callable, *_: object, **__: object) -> Callable:
    return function


def _is_compile_supported(device_type: str) -> bool:
    from torch._dynamo.utils import is_compile_supported

    return is_compile_supported(device_type)


def pick_device() -> torch.device:
    """The device that TEXTGUARD_DEVICE names, else CUDA where there is one, else the CPU. Raises InvalidParameter."""
    local = f"cuda:{environment_number('LOCAL_RANK', 0, 1023)}"
    name = os.environ.get("TEXTGUARD_DEVICE", local if torch.cuda.is_available() else "cpu")
    refused = f"TEXTGUARD_DEVICE={name[:50]!r}"
    allowed = "allowed: cpu, or a device that torch sees (cuda, cuda:1, mps, xpu)"
    # Other names of torch's are no devices that compute, or need packages of their own, and some crash it.
    if not re.fullmatch(r"cpu|mps|(cuda|xpu)(:[0-9]{1,3})?", name):
        raise InvalidParameter(f"{refused}: no such device; {allowed}")
    try:
        device = torch.device(local if name == "cuda" else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidParameter(f"{refused}: {reason}; {allowed}") from error
    return device


def join_processes(device: torch.device | None = None) -> tuple[int, int]:
    """This process's number and how many there are, as `torchrun` says in the environment; they join one group.

    device: where they exchange tensors: by NCCL on CUDA, else by gloo. Raises InvalidParameter for half an environment.
    """
    rank, count = process_group()
    if count > 1 and not torch.distributed.is_initialized():
        on_cuda = device is not None and device.type == "cuda"
        if on_cuda:
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if on_cuda else "gloo")
    return rank, count


def share_work(shard_dir: object) -> tuple[int, int]:
    """As `join_processes`, of processes that share their results in a folder. Raises InvalidParameter without one."""
    rank, count = join_processes()
    if count > 1 and not shard_dir:
        raise InvalidParameter("several processes need a shard_dir to share their results")
    return rank, count


def loading_processes() -> int:
    """How many processes read images: TEXTGUARD_WORKERS, else one per core but one, shared with this machine's other ranks.

    Raises InvalidParameter.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = environment_number("LOCAL_WORLD_SIZE", 1, 65_536, 1)
    return environment_number("TEXTGUARD_WORKERS", max(0, cores // ranks - 1), 1024)


def wait_for_all() -> None:
    """Return when every process of the group has come here."""
    torch.distributed.monitored_barrier(timeout=timedelta(days=30))


def describe_device(device: torch.device) -> str:
    """The device's name as reports show it, with the versions that a number depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def make_deterministic(seed: int) -> None:
    """Seed torch's global generator and ask for deterministic kernels; models draw their initial weights from it."""
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def progress(*, total: int, label: str, unit: str, shown: bool = True) -> tqdm:
    """A progress bar with rate and ETA on a terminal, one line every few seconds elsewhere. Call its update(n).

    Raises InvalidParameter for a bad TEXTGUARD_PROGRESS.
    """
    options = {"total": total, "desc": label, "unit": unit, "disable": not shown}
    if sys.stderr.isatty():
        return tqdm(**options)
    seconds = progress_interval()
    return tqdm(**options, mininterval=seconds, maxinterval=seconds, ascii=True, ncols=100)


def announce(line: str) -> None:
    """Say something on stderr, at once. Raises InvalidParameter for a bad TEXTGUARD_PROGRESS, before anything is said."""
    progress_interval()
    print(line, file=sys.stderr, flush=True)
