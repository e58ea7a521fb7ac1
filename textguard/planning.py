"""What a run of the grid will take: images, injections, disk and hours, from measured speeds. Nothing here runs anything."""

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

    def hours(self, speeds: Speeds) -> dict[str, float]:
        """Device-hours per stage.

        `ranges` goes through the training images twice; `evaluate`, and `inject` to find out which images are eligible, once
        through the test images. Injections that a compared detector repeats are counted, layers that are enumerated are not.
        """
        passes = {"ranges": 2 * self.train_images, "evaluate": self.test_images, "inject": self.test_images}
        seconds = {"train": self.trained_images / speeds.training}
        seconds |= {stage: images / speeds.inference for stage, images in passes.items()}
        seconds["inject"] += self.injections * (1 + self.detectors * RERUN_SHARE) / speeds.injections
        return {stage: value / 3600 for stage, value in seconds.items()}
