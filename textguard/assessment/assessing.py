"""One call from a classifier and its data to the resilience of each layer, with intervals."""

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from textguard.artifacts import weights_mark
from textguard.assessment.result import Assessment
from textguard.errors import InvalidParameter, Setting, printable
from textguard.faults.campaign import Campaign, CampaignSettings
from textguard.faults.checks import folder_path, texts
from textguard.faults.damage import FaultModel
from textguard.faults.execution import run_campaign
from textguard.faults.inputs import batches, prepare
from textguard.faults.mitigations import protect
from textguard.faults.plans import PLAN_COLUMNS, bits_at
from textguard.faults.profiling import activation_bounds, largest_outputs, profile_ranges
from textguard.faults.task import CLASSES, Task, make_task
from textguard.runtime import announce

USUAL = CampaignSettings()
# What a saved assessment says of its faults. Another one that replays them takes it over.
OF_THE_PLAN = (
    *("plan", "seed", "images", "injections_per_layer", "pilot", "stop_at", "enumerate_up_to"),
    *("fault_model", "number_format", "kinds"),
)
HEAVIEST = 2.5  # weights that images drawn by importance do not reach; guided plans have larger ones


def assess(
    model: nn.Module,
    loader: DataLoader,
    *,
    injections_per_layer: int = USUAL.injections_per_layer,
    seed: int = USUAL.seed,
    plan: str | pd.DataFrame | Assessment = USUAL.plan,
    images: str = USUAL.images,
    pilot: int = USUAL.pilot,
    stop_at: str = USUAL.stop_at,
    confidence: float = USUAL.confidence,
    enumerate_up_to: int = USUAL.enumerate_up_to,
    detector: str = USUAL.detector,
    number_format: str = USUAL.number_format,
    fault_model: FaultModel = USUAL.fault_model,
    kinds: Sequence[str] = USUAL.kinds,
    engine: str = USUAL.engine,
    batch_size: int = USUAL.batch_size,
    image_batch: int = USUAL.image_batch,
    noise: str = USUAL.noise,
    mitigation: str = "none",
    profile: DataLoader | None = None,
    classes: Sequence[str] | None = None,
    fit_per_megabit: float | None = None,
    task: str | Task = CLASSES.name,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    labels: Callable[[Any], Tensor] | None = None,
    correct: Callable[[Tensor, Tensor], Tensor] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    shard_dir: str | os.PathLike[str] | None = None,
) -> Assessment:
    """Inject faults into every layer of a classifier and measure what they do to its predictions.

    Before it starts, it says on stderr how many sites there are, what is skipped and why, how many images are eligible, the
    accuracy, and which engine runs.

    Parameters
    ----------
    model : torch.nn.Module
        From images [B, ...] to logits [B, C], on the device to use.
    loader : DataLoader
        Gives the images to inject on and their labels, from a map-style data set. Its order does not matter.
    plan : str, pandas.DataFrame or Assessment
        How faults are drawn; see `CampaignSettings`. Or which they are: those of another assessment, or rows like its `plan`,
        are replayed. What decided on the faults there then holds here too, and no other value of it can be given. Of rows
        alone, `fault_model`, `number_format` and `kinds` have to be given as they were. A replayed fault may hit an image that
        this model gets wrong; how many do is said.
    injections_per_layer, seed, images, pilot, stop_at, confidence, enumerate_up_to, detector, number_format, fault_model, \
kinds, engine, batch_size, image_batch, noise
        See `CampaignSettings`, which has the same defaults.
    mitigation : {"none", "ranger", "clip_to_zero", "learned"}, default "none"
        What keeps activations in their fault-free ranges; see `protect`.
    profile : DataLoader, optional
        Gives the images from which the layers' ranges are taken, and thresholds are learned; by default those of `loader`.
    classes : sequence of str, optional
        The names of the classes, by label; by default those that the data set has as `classes`, else their numbers.
    fit_per_megabit : float, optional
        Raw failures of 10^6 bits in 10^9 hours, which gives the table a column `fit`. For SRAM in 16 nm, 20.49 was extrapolated
        by Li et al. [2]_.
    task : {"classes", "binary", "multilabel", "probabilities"} or Task, default "classes"
        What logits mean; see `Task`. An answer that is no single class is saved as label 0, and prediction 0 where it is right,
        1 where it is not.
    forward, labels, correct, loss : callable, optional
        From the model and a batch to logits; from a batch to labels; from logits and labels to whether each is right, and to
        what each costs; see `make_task`. For transformers: `forward=lambda model, batch:
        model(**batch).logits, labels=lambda batch: batch["labels"]`. Layers keep the names that they have in `model`.
    shard_dir : str or path-like, optional
        A folder in which an interrupted assessment goes on.

    Returns
    -------
    Assessment
        What was found: `table` has one row per layer, in order of execution, and one for all.

    Raises
    ------
    TextguardError
        A setting is unknown, out of range, or does not fit the model or the data.

    References
    ----------
    .. [1] Mahmoud et al., GoldenEye: A Platform for Evaluating Emerging Numerical Data Formats in DNN Accelerators, DSN 2022.
    .. [2] Li et al., Understanding Error Propagation in Deep Learning Neural Network (DNN) Accelerators and Applications, SC
       2017.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.assessment import assess
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    >>> images = torch.rand(6, 1, 4, 4)
    >>> loader = DataLoader(TensorDataset(images, model(images).argmax(dim=1)), batch_size=3)
    >>> found = assess(model, loader, injections_per_layer=20, enumerate_up_to=1)
    >>> print(found.table[["layer", "kind", "neurons", "method", "injections"]])
         layer    kind  neurons   method  injections
    0        0  Conv2d        8  sampled          20
    1        3  Linear        3    exact         576
    2  overall               11    mixed         596
    >>> found.eligible, found.engine, [name for name, reason in found.skipped]
    (6, 'replay', ['Activation'])
    >>> again = assess(model, loader, plan=found)
    >>> again.records.equals(found.records)
    True
    """
    options: dict[str, Any] = {
        "injections_per_layer": injections_per_layer,
        "seed": seed,
        "images": images,
        "pilot": pilot,
        "stop_at": stop_at,
        "enumerate_up_to": enumerate_up_to,
        "number_format": number_format,
        "fault_model": fault_model,
        "kinds": kinds,
    }
    given = None
    if isinstance(plan, Assessment):
        given = _checked_plan(plan.plan)
        options |= _settings_of(plan, options)
    elif isinstance(plan, pd.DataFrame):
        given = _checked_plan(plan)
        options |= _told_by(given)
    else:
        options["plan"] = plan
    settings = CampaignSettings(
        confidence=confidence,
        detector=detector,
        engine=engine,
        batch_size=batch_size,
        image_batch=image_batch,
        noise=noise,
        **options,
    )
    raw_rate, shards = _rate(fit_per_megabit), folder_path(Setting("shard_dir"), shard_dir)
    task = make_task(task, forward=forward, labels=labels, correct=correct, loss=loss)
    if isinstance(plan, Assessment) and (meant := plan.settings.get("task", {})) != task.as_json():
        raise InvalidParameter(
            Setting("task"),
            f" and its functions are {_told(task.as_json())}, and the plan was drawn for {_told(meant)}; give the same ones",
        )
    profiled = largest_outputs(profile_ranges(model, profile or loader, settings.kinds, task))
    injected = model
    if mitigation != "none":
        bounds = activation_bounds(model, profile or loader, mitigation, task)
        injected = protect(*prepare(model, loader, task), bounds, mitigation)
    campaign = Campaign(injected, loader, settings, profiled, task)
    predictions, count = _predict(campaign)
    names = _class_names(classes, loader, count)
    sites, skipped = list(campaign.engine.sites), [tuple(entry) for entry in campaign.engine.skipped]
    if given is not None:
        planned = set(given["layer"])
        campaign.enumerated = [site for site in campaign.enumerated if site.layer not in planned]
        left_out = [site for site in campaign.sampled if site.layer not in planned]
        sites = [site for site in sites if site not in left_out]
        skipped += [(site.layer, "the plan that is replayed has no fault for it") for site in left_out]
    found = Assessment(
        settings=_as_json(settings)
        | {"mitigation": mitigation, "fit_per_megabit": raw_rate}
        | ({} if given is None else {"replayed": _digest(given)})
        | ({"task": task.as_json()} if task.as_json() else {}),
        sites=tuple(sites),
        skipped=tuple(skipped),
        modules=sum(any(True for _ in module.parameters(recurse=False)) for module in model.modules()),
        engine=campaign.engine.name,
        reason=campaign.engine.reason,
        records=pd.DataFrame(),
        totals=(),
        predictions=predictions,
        classes=names,
        weights=weights_mark(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        site_bits={site.layer: bits_at(site, settings.fault_model, settings.stored_as) for site in sites},
        ranges={site.layer: float((campaign.known | profiled)[site.layer]) for site in sites},
        limits={site.layer: float(campaign.limits[settings.detector][site.layer]) for site in sites},
    )
    announce(found.facts)
    if given is None:
        records, _ = campaign.sample_layers(shards, "assess")
    else:
        records = _replay(campaign, given, predictions, shards)
    totals = campaign.enumerate_layers(label="assess, enumerate")[settings.detector]
    return replace(found, records=records, totals=tuple(totals))


def _as_json(settings: CampaignSettings) -> dict[str, Any]:
    """The settings that decide on results, or on how they are shown."""
    kept = {name: value for name, value in asdict(settings).items() if name not in ("compare_detectors", "batch_size")}
    return kept | {"kinds": list(settings.kinds), "fault_model": settings.fault_model.as_json()}


def _settings_of(saved: Assessment, given: dict[str, Any]) -> dict[str, Any]:
    """What decided on the faults of a saved assessment. Raises InvalidParameter where another value of it was given."""
    found = {name: saved.settings[name] for name in OF_THE_PLAN} | {"fault_model": saved.fault_model}
    for name, value in given.items():
        usual = getattr(USUAL, name)
        if _plain(value) not in (_plain(usual), _plain(found[name])):
            raise InvalidParameter(
                Setting(name), f" is {value!s:.60}, and the plan was drawn with {found[name]!s:.60}; leave one of the two out"
            )
    return found


def _told(task: dict[str, str]) -> str:
    """A task as its settings have it, in words."""
    return ", ".join(f"{name}={value}" for name, value in task.items()) or "those of ordinary classes"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _checked_plan(plan: pd.DataFrame) -> pd.DataFrame:
    """The columns of a plan, numbers as numbers. Raises InvalidParameter."""
    setting = Setting("plan")
    if missing := [name for name in PLAN_COLUMNS if name not in plan]:
        raise InvalidParameter(setting, f" lacks the columns {', '.join(missing)}; take those of an assessment's plan")
    for name in PLAN_COLUMNS[1:]:
        if plan[name].dtype.kind not in ("iu" if name != "weight" else "iuf"):
            raise InvalidParameter(setting, f" has a column {name} of {plan[name].dtype}; it must hold numbers")
    if not len(plan):
        raise InvalidParameter(setting, " has no fault; take that of an assessment with sampled layers")
    return plan[PLAN_COLUMNS].reset_index(drop=True)


def _told_by(plan: pd.DataFrame) -> dict[str, Any]:
    """How faults were drawn that come without an assessment's settings. Raises InvalidParameter where nothing tells."""
    if plan["weight"].max() > HEAVIEST:
        raise InvalidParameter(
            Setting("plan"),
            f" has weights up to {plan['weight'].max():.3g}, as guided plans do, and rows alone do not say so; "
            "give the whole assessment: plan=Assessment.load(folder)",
        )
    # Where a plan is by bit, each bit has injections, and their numbers tell it; see draw_plan.
    bits = int(plan["bit"].max()) + 1
    by_bit = bits > 1 and bool((plan["index"] % bits == plan["bit"]).all())
    images = plan.groupby("index")["image"]
    shared = plan["layer"].nunique() > 1 and bool((images.nunique() == 1).all())
    most = int(plan.groupby("layer")["index"].nunique().max())
    drawn = "shared" if shared else "importance" if plan["weight"].nunique() > 1 else "uniform"
    return {"plan": "proportional" if by_bit else "uniform", "images": drawn, "injections_per_layer": most}


def _replay(campaign: Campaign, plan: pd.DataFrame, predictions: pd.DataFrame, shard_dir: Any) -> pd.DataFrame:
    """The records of a plan's faults, by layer and index."""
    order = {site.layer: site.position for site in campaign.engine.sites}
    plan = plan.sort_values(["layer", "index"], key=lambda column: column.map(order) if column.name == "layer" else column)
    eligible = predictions.loc[predictions["eligible"], "image"]
    hits = plan[plan["image"].isin(predictions["image"])].drop_duplicates(["layer", "index"])
    if elsewhere := int((~hits["image"].isin(eligible)).sum()):
        announce(f"assess: {elsewhere:,} of {len(hits):,} replayed faults hit images that this model does not get right")
    settings = campaign.settings
    return run_campaign(
        campaign.engine,
        campaign.loader,
        plan.reset_index(drop=True),
        campaign.limits[settings.detector],
        image_batch=settings.image_batch,
        fault_model=settings.fault_model,
        shard_dir=shard_dir / "replay" if shard_dir else None,
        label="assess",
        task=campaign.task,
    )


def _digest(plan: pd.DataFrame) -> str:
    return hashlib.sha256(pd.util.hash_pandas_object(plan, index=False).to_numpy().tobytes()).hexdigest()[:16]


def _predict(campaign: Campaign) -> tuple[pd.DataFrame, int]:
    """The fault-free classifier on each image, and how many classes it has."""
    chances, columns, count, task = campaign.chances, defaultdict(list), 2, campaign.task
    for part, pictures, labels in batches(campaign.loader, campaign.engine.device, task=task):
        logits = campaign.engine.observe(pictures)
        correct, prediction = task.correct(logits, labels), task.predicted(logits).long()
        whole = task.name == "binary" or not labels.is_floating_point()
        if prediction.ndim == 1 and labels.numel() == len(labels) and whole:
            label = labels.reshape(len(labels)).long()
            count = max(count, logits.shape[1] if logits.ndim == 2 else 2)
            columns["label"].append(label)
            columns["prediction"].append(torch.where(correct, label, prediction))  # to be among the best five is right too
        else:
            columns["label"].append(torch.zeros_like(correct, dtype=torch.int64))
            columns["prediction"].append((~correct).long())
        columns["image"].append(torch.as_tensor(part))
        columns["correct"].append(correct)
        columns["eligible"].append(torch.as_tensor(chances[list(part)] > 0))
        columns["loss"].append(task.precise_loss(logits, labels))
        columns["top2diff"].append(task.certainty(logits.double()))
    table = pd.DataFrame({name: torch.cat([part.cpu() for part in parts]).numpy() for name, parts in columns.items()})
    return table[["image", "label", "prediction", "correct", "eligible", "loss", "top2diff"]], count


def _class_names(classes: Sequence[str] | None, loader: DataLoader, count: int) -> tuple[str, ...]:
    """The names of `count` classes. Raises InvalidParameter."""
    if classes is not None:
        named = texts(Setting("classes"), list(classes) if isinstance(classes, tuple) else classes)
        if len(named) != count:
            raise InvalidParameter(Setting("classes"), f" has {len(named)} names, and the model {count} classes")
        return tuple(named)
    known = getattr(loader.dataset, "classes", None)  # as torchvision's data sets have them
    usable = isinstance(known, list | tuple) and len(known) == count and all(isinstance(name, str) and name for name in known)
    return tuple(printable(name) for name in known) if usable else tuple(map(str, range(count)))


def _rate(fit_per_megabit: object) -> float | None:
    if fit_per_megabit is None:
        return None
    numbers = isinstance(fit_per_megabit, int | float | np.number) and not isinstance(fit_per_megabit, bool)
    if not numbers or not 0 < fit_per_megabit < math.inf:
        raise InvalidParameter(Setting("fit_per_megabit"), f" is {fit_per_megabit!r:.60}; it must be a number above 0")
    return float(fit_per_megabit)
