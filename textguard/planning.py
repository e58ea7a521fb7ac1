"""What a run of the grid will take: images, injections, disk and time, from measured speeds. Nothing here runs anything."""

from collections.abc import Mapping
from dataclasses import dataclass

# As the demo's campaigns left them in compressed Parquet: a row of plan.parquet and injections.parquet together; of
# detectors.parquet, at most one per injection and detector, in practice one in eight; of predictions.parquet.
BYTES_PER_INJECTION, BYTES_PER_RERUN, RERUN_SHARE, BYTES_PER_PREDICTION = 23, 16, 0.13, 17


@dataclass(frozen=True)
class Speeds:
    """Of one network on one device: images trained on and classified per second, and injections per second."""

    training: float
    inference: float
    injections: float


@dataclass(frozen=True)
class Workload:
    """What one run does.

    train_images, test_images: of the splits. trained_images: images that training sees, all epochs together; 0 where the
    weights come from elsewhere. sites: layers that are sampled. parameters: of the model. detectors: that are compared.
    """

    train_images: int
    test_images: int
    trained_images: int
    sites: int
    injections_per_layer: int
    parameters: int
    detectors: int

    @property
    def injections(self) -> int:
        """Injections of the campaign, at most: with `stop_at` a layer can be done earlier."""
        return self.sites * self.injections_per_layer

    @property
    def disk_bytes(self) -> int:
        """Of the model in fp32 and of the records."""
        per_injection = BYTES_PER_INJECTION + self.detectors * RERUN_SHARE * BYTES_PER_RERUN
        return round(4 * self.parameters + per_injection * self.injections + BYTES_PER_PREDICTION * self.test_images)

    def seconds(self, speeds: Speeds) -> dict[str, float]:
        """Seconds of one device, per stage.

        `ranges` goes through the training images twice; `evaluate`, and `inject` to find out which images are eligible, once
        through the test images. Injections that a compared detector repeats are counted, layers that are enumerated are not.
        """
        passes = {"ranges": 2 * self.train_images, "evaluate": self.test_images, "inject": self.test_images}
        seconds = {"train": self.trained_images / speeds.training}
        seconds |= {stage: images / speeds.inference for stage, images in passes.items()}
        seconds["inject"] += self.injections * (1 + self.detectors * RERUN_SHARE) / speeds.injections
        return seconds


DURATIONS = {"years": 365.25 * 86_400, "days": 86_400, "h": 3600, "min": 60, "s": 1}
SIZES = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}


def duration(seconds: float) -> str:
    """A time as a person says it: "40 min", "2.5 h", "180 years"; two digits, in the largest unit that it holds twice."""
    return _rounded(seconds, DURATIONS, 2)


def disk_size(size: float) -> str:
    """A number of bytes as a person says it: "46 MB"; two digits, in the largest unit that it holds once."""
    return _rounded(size, SIZES, 1)


def _rounded(value: float, units: Mapping[str, float], least: float) -> str:
    """The value to two digits, in the largest of the units of which it holds at least `least`, or in the smallest one."""
    unit = next((name for name, size in units.items() if value >= least * size), list(units)[-1])
    digits = float(f"{value / units[unit]:.2g}")
    return f"{digits:,.0f} {unit}" if digits >= 10 else f"{digits:g} {unit}"
