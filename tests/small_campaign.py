"""A campaign on the small residual network, which several tests change, run and interrupt."""

import pandas as pd

from textguard.faults.damage import SINGLE_FLIP, FaultModel
from textguard.faults.engines import make_engine
from textguard.faults.execution import RECORD_COLUMNS, run_campaign
from textguard.faults.formats import FP32
from textguard.faults.plans import PLAN_COLUMNS, draw_plan
from textguard.faults.profiling import image_chances, largest_outputs, profile_ranges
from textguard.faults.sampling import Design, run_design

# What must agree exactly; golden values and losses may differ by roundings, for engines and batch sizes add up in other orders.
EXACT = [*PLAN_COLUMNS, "detected", "mismatch"]
CLOSE = {"rtol": 1e-3, "atol": 1e-5}
TARGETS = {"bits": FaultModel(bits=2), "values": FaultModel(values=2), "both": FaultModel(bits=3, values=2)}


class SmallCampaign:
    """A campaign on the small residual network, and what can be changed about it."""

    def __init__(self, model, loader, **changes):
        self.model, self.loader = model, loader
        self.name, self.batch_size, self.image_batch = "replay", 16, 3
        self.fault_model, self.number_format = SINGLE_FLIP, FP32
        # A little more than was profiled: at just the largest logit, a detected fault would tie with it.
        self.seed, self.per_layer, self.shard_dir, self.scale = 4, 20, None, 1.01
        self.images, self.design = "uniform", Design("neyman", 200, 64, "never", 0.99, 4)
        for name, value in changes.items():
            assert hasattr(self, name)
            setattr(self, name, value)
        self.profiled = largest_outputs(profile_ranges(model, loader))
        self.limits = {layer: limit * self.scale for layer, limit in self.profiled.items()}
        self.engine = make_engine(
            self.name,
            model,
            loader.dataset[0][0],
            self.batch_size,
            number_format=self.number_format,
            profiled=self.profiled,
            target=self.fault_model.target,
        )
        self.chances = image_chances(self.engine, loader, self.images)
        self.plan = draw_plan(self.engine.sites, self.chances, self.per_layer, self.seed, self.fault_model, self.number_format)
        self.neurons = {site.layer: site.neurons for site in self.engine.sites}

    def run(self, plan=None) -> pd.DataFrame:
        return run_campaign(
            self.engine,
            self.loader,
            self.plan if plan is None else plan,
            self.limits,
            image_batch=self.image_batch,
            fault_model=self.fault_model,
            shard_dir=self.shard_dir,
        )

    def run_design(self) -> pd.DataFrame:
        return run_design(
            self.engine,
            self.engine.sites,
            self.loader,
            self.chances,
            self.limits,
            self.design,
            image_batch=self.image_batch,
            fault_model=self.fault_model,
            shard_dir=self.shard_dir,
        )


def count_runs(engine, fail_at=None) -> list[int]:
    """The number of faults in each of an engine's runs from now on; the run with number `fail_at` is interrupted."""
    runs, run = [], engine.run

    def count_and_run(images, faults):
        if len(runs) == fail_at:
            raise KeyboardInterrupt
        runs.append(len(faults.position))
        return run(images, faults)

    engine.run = count_and_run
    return runs


def assert_same_records(a: pd.DataFrame, b: pd.DataFrame):
    assert list(a.columns) == list(b.columns) == RECORD_COLUMNS
    pd.testing.assert_frame_equal(a[EXACT], b[EXACT])
    inexact = [column for column in RECORD_COLUMNS if column not in (*EXACT, "masked")]
    pd.testing.assert_frame_equal(a[inexact], b[inexact], **CLOSE)
    for records in (a, b):
        hidden = records[records["masked"]]
        assert (hidden["faulty_loss"] == hidden["golden_loss"]).all()
        assert not hidden["mismatch"].any()
