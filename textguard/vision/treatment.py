"""Treatments: what distinguishes a variant's head and training from the baseline's, as data, one field per factor.

treatments.yaml holds every field as a baseline has it; params.yaml says what differs. What the fields do to a network is in
treating.py and training.py, to its start in textguard.text.starts. This module only reads and checks, and imports no torch,
because params.py uses it.
"""

from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from textguard.vision.recipe import Decay

LIBRARY = Path(__file__).with_name("treatments.yaml")
STARTS = ("torch", "unit", "orthogonal", "one_hot")  # that need no text
FROM_TEXT = ("shuffled", "cosines")  # KIND:TEXT, made of a text's class embeddings
LARGEST_WIDTH = 65_536  # of a latent layer: several times that of any text encoder
ELSEWHERE = ("label", "start", "start_seed", "width", "recipe")  # in nothing, in the head's file, in the recipe
NOT_OF_A_TREATMENT = ("network", "recipe")  # what a backbone is, and which recipe it begins with


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Treatment:
    """What a variant's head is, and what is done in its training and to its weights afterwards.

    label: how tables and figures call it; None for its key. start, start_seed: the head's first weights, see
    textguard.text.starts.start_rows; `torch` leaves torch.nn.Linear's own. width: E of the latent layer; 0 for none; None for
    that of the encoder, or of the text it starts from. normalise: whether features are brought to length 1, and what the head
    says multiplied by a scale. scale, scale_start: that scale, trained or fixed at its start. frozen: whether the head keeps
    its first weights. logit_penalty: what the mean squared logit is multiplied by in the loss. latent_weight_decay: of the
    latent layer's weight; None for the recipe's. temperature, fold_scale: see textguard.vision.treating.after_training. recipe:
    fields of the backbone's recipe that differ.
    """

    label: Annotated[str, Field(pattern=r"^[^\n\r]+$", max_length=60)] | None
    start: Annotated[str, Field(pattern=r"^[^\n\r]+$", max_length=200)]
    start_seed: Annotated[int, Field(ge=0, lt=2**63)]
    width: Annotated[int, Field(ge=0, le=LARGEST_WIDTH)] | None
    normalise: bool
    scale: Literal["learned", "fixed"]
    scale_start: Annotated[float, Field(gt=0, le=1e6)]
    frozen: bool
    logit_penalty: Annotated[float, Field(ge=0, le=1e6)]
    latent_weight_decay: Decay | None
    temperature: Annotated[float, Field(ge=1e-6, le=1e6)]
    fold_scale: bool
    recipe: dict[str, Any]

    @property
    def latent(self) -> bool:
        """Whether there is a latent layer between the backbone and the head."""
        return self.width != 0

    @property
    def text(self) -> str | None:
        """The text variant whose class embeddings the head's start is made of; None where it needs none."""
        kind, _, text = self.start.partition(":")
        if self.start in STARTS:
            return None
        return text if text and kind in FROM_TEXT else self.start

    @property
    def differing(self) -> dict[str, Any]:
        """The fields that are not as a baseline has them; those of the recipe as recipe.FIELD."""
        found = {name: value for name, value in asdict(self).items() if name not in ("label", "recipe")}
        found = {name: value for name, value in found.items() if value != library_treatment()[name]}
        return found | {f"recipe.{name}": value for name, value in self.recipe.items()}

    @property
    def in_training(self) -> dict[str, Any]:
        """The fields that decide what a training comes to, beside the head's first weights and the recipe."""
        return {name: value for name, value in asdict(self).items() if name not in ELSEWHERE}

    @model_validator(mode="after")
    def _fields_fit(self) -> "Treatment":
        usual = library_treatment()
        if not self.latent:
            for name in ("start", "normalise", "frozen", "latent_weight_decay"):
                if getattr(self, name) != usual[name]:
                    raise ValueError(
                        f"{name} is {_shown(getattr(self, name))}, which needs a latent layer, and width is 0; set width to "
                        "its E, or to null for the encoder's"
                    )
        if not self.normalise:
            for name in ("scale", "scale_start", "fold_scale"):
                if getattr(self, name) != usual[name]:
                    raise ValueError(f"{name} is {_shown(getattr(self, name))}, and without normalise there is no scale")
        for name in NOT_OF_A_TREATMENT:
            if name in self.recipe:
                raise ValueError(f"recipe.{name} cannot differ between variants; a network of its own is a backbone of its own")
        return self


@cache
def library_treatment() -> dict[str, Any]:
    """All fields as a baseline has them, unchecked."""
    return yaml.safe_load(LIBRARY.read_text(encoding="utf-8"))


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
