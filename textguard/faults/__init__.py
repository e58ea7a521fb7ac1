"""Fault injection for any PyTorch classifier; it knows nothing of text, pipelines or reports.

    from textguard.faults import assess

`assess` goes from a model and a DataLoader to the resilience of each layer. What it is made of is exported too.
"""

import importlib

# Imported when they are asked for: the report reads statistics, and needs no torch for it.
_EXPORTS = {
    "assess": "assessment",
    "Design": "sampling",
    "draw_plan": "plans",
    "eligible_images": "campaign",
    "enumerate_layer": "exact",
    "FaultModel": "damage",
    "image_chances": "campaign",
    "make_engine": "engines",
    "parse_format": "formats",
    "profile_activations": "campaign",
    "profile_ranges": "campaign",
    "protect": "mitigations",
    "run_campaign": "campaign",
    "run_design": "sampling",
    "summarise": "summary",
}


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it exports {', '.join(_EXPORTS)}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_EXPORTS)
