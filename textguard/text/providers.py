"""What a text variant holds where params.yaml says nothing else: providers.yaml, by provider.

This module only reads, and imports no torch, because params.py uses it.
"""

import copy
from pathlib import Path
from typing import Any

import yaml

from textguard.errors import UnknownName

LIBRARY = Path(__file__).with_name("providers.yaml")
SHARED, LANGUAGE_MODEL = "every_provider", "language_model"
FEATURES = "features"  # the provider of vectors that no encoder needs to see


def with_defaults(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """A text variant's fields, unchecked, with its provider's defaults for those that it leaves out.

    Raises UnknownName for another provider than those of providers.yaml; `where` says where it was named.
    """
    library = yaml.safe_load(LIBRARY.read_text(encoding="utf-8"))
    defaults, model = library.pop(SHARED), library.pop(LANGUAGE_MODEL)
    provider = fields.get("provider")
    if isinstance(provider, str):
        if provider not in library:
            raise UnknownName("provider", provider, library, where)
        defaults |= library[provider]
    found = _merged(defaults, fields)
    return found | ({"model": model | found["model"]} if isinstance(found["model"], dict) else {})


def _merged(defaults: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Fields over defaults, and so on in mappings within."""
    found = copy.deepcopy(defaults)
    for name, value in fields.items():
        nested = isinstance(value, dict) and isinstance(found.get(name), dict)
        found[name] = _merged(found[name], value) if nested else value
    return found
