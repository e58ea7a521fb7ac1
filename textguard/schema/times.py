"""How long a grid's stages took, as `stages/__main__.py` keeps it: no result, and no stage's output."""

import math

from textguard.schema.base import Name, Stored, Whole, field

_SECONDS = (0.0, math.inf)


class StageTime(Stored):
    """The last run of a stage that ended well."""

    seconds: float = field("from the start of its process to its end", "s", within=_SECONDS)
    device: Name = field("the device that it computed on, and what its speed depends on; `cpu` for stages without a network")
    processes: Whole = field("processes that shared it (TEXTGUARD_PROCESSES, torchrun)", "count")
    resumed: bool = field("whether it went on from what an interrupted run had left: `seconds` are the last sitting's alone")


class RunTimes(Stored):
    """The times of one environment. A stage that ends in another one starts the file anew.

    DVC does not know the file: it changes with every run, and no hash may hang on it. Git has it.
    """

    versions: dict[Name, Name] = field("of Python, torch and torchvision")
    processors: Whole = field("of the machine, as Python counts them", "count")
    stages: dict[Name, StageTime] = field("by the stage's name in DVC: `results`, `train@RUN`; those that the grid still has")
