"""What an assessment that was saved says of itself, beside its records and predictions."""

from collections import Counter
from typing import Annotated, Any

from pydantic import Field, model_validator

from textguard.schema.base import Measured, Name, Number, Stored, Whole, field
from textguard.schema.campaign import EnumeratedLayer

PREDICTIONS = ["image", "label", "prediction", "correct", "eligible", "loss", "top2diff"]


class AssessedSite(Stored):
    """An operation into which faults were injected."""

    layer: Name = field("its name in the network")
    kind: Name = field("the operation: Conv2d, Linear, MatMul, ...")
    position: Whole = field("its place among all operations that take faults, in order of execution")
    shape: list[Annotated[Whole, Field(ge=1)]] = field("of one image's share of its output")
    weights: Whole = field("how many weights it has", "count")
    bits: Annotated[Whole, Field(ge=1, le=64)] = field("of a value that faults hit")
    dimension: Whole = field("the output's dimension that grows with the batch", default=0)
    outer: Whole = field("in how many parts of that dimension each image has a share", default=1)
    dtype: Name = field("how torch stores the output", default="float32")
    weight_dtype: Name = field("how torch stores the weights", default="float32")
    reads: str | None = field(
        "the name of the weights in the state dict; empty where they are computed; absent for LAYER.weight", default=None
    )


class Skipped(Stored):
    """What takes no faults."""

    name: Name = field("of the operation or module")
    reason: Name = field("why")


class StoredAssessment(Stored):
    """What `Assessment.save` writes beside `records.parquet` and `predictions.parquet`, which bear the same mark."""

    mark: Name = field("fingerprint of all that is in the three files")
    version: Name = field("of textguard")
    settings: dict[str, Any] = field("the arguments of `assess` that decide on results")
    sites: list[AssessedSite] = field("where faults were injected, in order of execution", min_length=1)
    skipped: list[Skipped] = field("what takes no faults")
    modules: Whole = field("modules with parameters of their own", "count")
    engine: Name = field("what ran: replay, whole or pytorchfi")
    reason: str = field("why the engine that was asked for did not run; empty where it did")
    exact: list[EnumeratedLayer] = field("the layers all of whose faults were tried")
    classes: list[Name] = field("the names of the classes, by label", min_length=1)
    weights: Name = field("fingerprint of all parameters and buffers")
    parameters: Whole = field("weights and biases, trained or not", "count")
    images: Whole = field("images without faults", "count", ge=1)
    eligible: Whole = field("images that are predicted right without faults", "count")
    top1: Measured = field("accuracy without faults", "share")
    ranges: dict[Name, Number] = field("by layer: the largest magnitude of its fault-free outputs")
    limits: dict[Name, Number] = field("by layer: the largest magnitude that the range detector lets pass; null where all pass")

    @model_validator(mode="after")
    def _parts_agree(self) -> "StoredAssessment":
        layers = [site.layer for site in self.sites]
        if twice := [name for name, count in Counter(layers).items() if count > 1]:
            raise ValueError(f"sites holds {twice[0]!r} twice")
        if unknown := [layer.layer for layer in self.exact if layer.layer not in layers]:
            raise ValueError(f"exact has the layer {unknown[0]!r}, which sites lacks")
        for name in ("ranges", "limits"):
            if list(getattr(self, name)) != layers:
                raise ValueError(f"{name} has other layers than sites")
        return self
