"""What stage `evaluate` measures of a classifier without faults."""

from textguard.schema.base import Measured, Name, Stored, Whole, field


class Evaluation(Stored):
    """One classifier without faults, on the test images."""

    top1: Measured = field("accuracy", "share")
    loss: Measured = field("cross entropy, mean over images", "nats")
    top2diff: Measured = field("probability of the first class minus that of the second, mean over images", "share")
    parameters: Whole = field("weights and biases, trained or not", "count")
    multiply_adds: Whole = field("multiply-adds of an inference", "per image")
    scale: float = field("what a text-guided classifier multiplies its cosines by; 1 for a baseline", gt=0)
    weights: Name = field("fingerprint of all parameters and buffers, whatever file they came from")
    seed: Whole = field("of the training")
    device: Name = field("the device, its threads, and torch's version")
