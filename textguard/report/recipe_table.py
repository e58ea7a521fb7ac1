"""How the classifiers of a grid were trained, as a table."""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from textguard.report.rendering import Table

Fields = Mapping[str, Any]
# Field -> the field and its values under which it is used.
USED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "momentum": ("optimizer", ("sgd",)),
    "betas": ("optimizer", ("adamw",)),
    "eps": ("optimizer", ("adamw",)),
    "step_epochs": ("schedule", ("step", "exponential")),
    "gamma": ("schedule", ("step", "exponential")),
    "min_learning_rate": ("schedule", ("cosine",)),
    "ema_decay": ("ema", (True,)),
    "ema_steps": ("ema", (True,)),
    "crop_scale": ("crop", ("random_resized",)),
    "crop_padding": ("crop", ("padded",)),
}
ZERO_IS_OFF = ("label_smoothing", "mixup", "cutmix", "clip_norm", "drop_path", "flip", "random_erasing", "warmup_epochs")
OFF = {**dict.fromkeys(ZERO_IS_OFF, 0), "repeated_augmentation": 1}


def recipe_table(recipes: Mapping[str, Fields], library: Mapping[str, Fields]) -> Table:
    """recipes: backbone -> all fields. library: the same before params.yaml overrides some."""
    alike: dict[str, list[str]] = {}  # backbones by their fields
    for backbone, fields in recipes.items():
        alike.setdefault(repr({name: fields[name] for name in fields if name != "network"}), []).append(backbone)
    columns = {", ".join(backbones): backbones[0] for backbones in alike.values()}
    names = dict.fromkeys(name for fields in recipes.values() for name in fields if name != "network")
    rows = [[name, *(_show_setting(name, recipes[key], library.get(key, {})) for key in columns.values())] for name in names]
    caption = (
        "How the classifiers were trained: one column per recipe in use. In brackets, what stands in the library's recipe and "
        "params.yaml overrides. -: without effect in this recipe."
    )
    return Table("recipes", caption, ["Field", *columns], rows)


def treatment_table(treatments: Mapping[str, Fields]) -> Table:
    """treatments: variant, as it is called -> the fields in which it differs from the baseline."""
    caption = (
        "Variants that differ from the baseline in their head or training, by the fields of textguard/vision/treatments.yaml."
    )
    rows = [
        [
            variant,
            ", ".join(f"{name}: {'the encoder’s' if value is None else _setting('', value)}" for name, value in fields.items()),
        ]
        for variant, fields in treatments.items()
    ]
    return Table("treatments", caption, ["Variant", "What differs"], rows)


def _show_setting(name: str, fields: Fields, library: Fields) -> str | None:
    """A field's value, beside that of the library where it is another; None where the field is absent or without effect."""
    condition, values = USED.get(name, (name, (fields.get(name),)))
    if name not in fields or fields.get(condition, values[0]) not in values:
        return None
    shown = _setting(name, fields[name])
    before = _setting(name, library[name]) if name in library else shown
    return shown if shown == before else f"{shown} (library: {before})"


def _setting(name: str, value: Any) -> str:
    if value is None:
        return "as weight_decay" if name.endswith("_weight_decay") else "the network's own"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name in OFF and value == OFF[name]:
        return "off"
    if isinstance(value, float):
        return f"{Decimal(str(value)):f}"  # 0.00004, not 4e-05
    return ", ".join(_setting("", part) for part in value) if isinstance(value, list | tuple) else str(value)
