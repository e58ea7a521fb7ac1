"""What a text variant holds where params.yaml says nothing else: providers.yaml, by provider; and which addresses it may name.

This module only reads, and imports no torch, because params.py uses it.
"""

import copy
import re
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


def check_base_url(url: str) -> str:
    """The address of a language model's server, below which its endpoints lie. Raises ValueError, which does not repeat it."""
    if not re.match("https?://", url):
        problem = "it must begin with https:// or http://"
    elif "@" in url:
        problem = "it holds a name or password, which would get into files; set OPENAI_API_KEY in the environment"
    elif re.search(r"[?#]", url):
        problem = (
            "it must end before '?' and '#', behind which keys would get into files; a server that wants ?api-version= has "
            "another address without, as Azure's https://NAME.openai.azure.com/openai/v1"
        )
    elif re.search(r"[^!-~]", url) or not re.fullmatch(r"https?://(\[[0-9a-fA-F:.]+\]|[^\[\]/:]+)(:[0-9]{1,5})?(/.*)?", url):
        problem = "it is no address, as https://HOST/v1 or http://HOST:PORT/v1"
    else:
        return url
    raise ValueError(problem)


def _merged(defaults: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Fields over defaults, and so on in mappings within."""
    found = copy.deepcopy(defaults)
    for name, value in fields.items():
        nested = isinstance(value, dict) and isinstance(found.get(name), dict)
        found[name] = _merged(found[name], value) if nested else value
    return found
