"""Set one classifier against the faults of section `hardware`: with a shape, in weights, for good, at a bit error rate."""

from pathlib import Path

import pandas as pd

from textguard.artifacts import write_parquet
from textguard.params import Params
from textguard.schema.base import write
from textguard.schema.hardware import Hardware

RECORDS, FOUND = Path("metrics") / "records", Path("metrics") / "hardware"


def main(params: Params, key: str) -> None:
    hardware = params.hardware
    found, records = {"images": 0, "models": [], "mitigations": [], "curves": []}, pd.DataFrame({"faults": []})
    if hardware.models or hardware.mitigations or (hardware.rates and hardware.protections):
        from stages.under_faults import look  # not before: most grids ask for nothing here, and torch takes seconds

        found, records = look(params, key)
    write_parquet(RECORDS / key / "hardware.parquet", records)
    write(FOUND / f"{key}.json", Hardware, {"confidence": params.statistics.confidence, **found})
