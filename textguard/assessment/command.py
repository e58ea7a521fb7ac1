"""The command `textguard`: assess a network, gate a change, report, advise. `textguard --help` says how.

Exit codes: 0 where all is well, 1 where the gate finds anything worse, 2 for whatever is no verdict, 130 after an interruption.
"""

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from textguard.assessment.assessing import assess
from textguard.assessment.comparing import gate, tolerances_from
from textguard.assessment.given import IMAGENET_MEAN, IMAGENET_STD, build_loader, build_model, named, told
from textguard.assessment.result import Assessment
from textguard.assessment.storage import is_saved
from textguard.environment import check_threads, run_command
from textguard.errors import InvalidParameter, Setting, TextguardError, printable
from textguard.faults.campaign import CampaignSettings
from textguard.faults.damage import FaultModel
from textguard.runtime import pick_device

PARTIAL = ".partial"  # in the folder of an assessment that is not finished: what it has done so far
PYPROJECT = Path("pyproject.toml")
EXAMPLE = """
example, in the folder of your own package:
  textguard assess mypkg.net:build --weights net.safetensors --data mypkg.data:test_loader --out resilience
  textguard report resilience
  textguard advise resilience --target-sdc 0.1%
  textguard gate ../base/resilience resilience

mypkg.net:build makes the network when called (a class does, too), mypkg.data:test_loader is or makes a DataLoader of
(images, labels). Each command has a --help of its own. Exit codes: 0 well, 1 worse, 2 error.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidParameter(f"{message}; '{self.prog} --help' says what there is")


def main() -> int:
    """Run the command line. Returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run_command(run, 2)


def run(arguments: Sequence[str]) -> int:
    """Run a command with its arguments. Returns the exit code."""
    try:
        options = _parser().parse_args(arguments)
        check_threads()
        return options.work(options)
    except TextguardError as error:
        return _complain(f"{type(error).__name__}: {error.told(_option)}")
    except OSError as error:
        if error.filename is None:
            raise
        return _complain(f"InvalidArtifact: {error.filename}: {error.strerror}; make it readable, or name another one")
    except KeyboardInterrupt:
        again = "; run it again to go on from there" if arguments[:1] == ["assess"] else ""
        print(f"textguard {' '.join(arguments[:1])}: interrupted{again}", file=sys.stderr)
        return 130
    except Exception as error:  # an exception that nobody caught would end with 1, which says that something is worse
        return _complain(f"{told(error)}; no result: if it is not the network's own, please report it")


def _complain(line: str) -> int:
    print(" ".join(line.split()), file=sys.stderr)
    return 2


def _option(setting: Setting) -> str:
    """Where the user of the command line sets an argument of the library."""
    names = {"number_format": "format", "injections_per_layer": "injections", "shard_dir": "out", "folder": "out"}
    name = names.get(setting, setting)
    return f"option --{name.replace('fault_model.', '').replace('_', '-')}"


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="textguard",
        description="What bit flips in hardware do to your image classifier.",
        epilog=EXAMPLE,
        formatter_class=plain,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)
    for add in (_add_assess, _add_gate, _add_report, _add_advise):
        add(commands)
    return parser


def _command(commands: Any, name: str, work: Callable[[argparse.Namespace], int], **texts: str) -> argparse.ArgumentParser:
    """The parser of a command that `work` carries out."""
    parser = commands.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **texts)
    parser.set_defaults(work=work)
    return parser


def _add_assess(commands: Any) -> None:
    parser = _command(
        commands,
        "assess",
        help="inject faults into every layer of a network, and save what they did",
        description="Inject faults into every layer of a network, print a table, and save all of it in a folder.\n"
        "An interrupted assessment goes on when the same command is given again.",
        epilog="example:\n  textguard assess torchvision.models:resnet18 --weights resnet18.safetensors \\\n"
        "      --data folder:photos/test --resize 256 --plan guided --injections 1024 --out resilience",
        work=_assess,
    )
    parser.add_argument("network", metavar="MODULE:NAME", help="a torch.nn.Module, or what makes one when called")
    given = parser.add_argument_group("network and data")
    given.add_argument(
        "--data",
        required=True,
        metavar="WHAT",
        help="MODULE:NAME of a DataLoader or data set, or of what makes one; or folder:PATH, with a folder for each class",
    )
    given.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder to save the assessment in")
    given.add_argument("--force", action="store_true", help="replace the assessment that DIR holds")
    given.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="a state_dict: .safetensors, or .pt or .pth without code in it; by default the network has its weights",
    )
    given.add_argument(
        "--arguments",
        type=_json_object,
        default={},
        metavar="JSON",
        help="""what the network is made with: '{"num_classes": 10}'""",
    )
    given.add_argument(
        "--batch", type=int, default=64, metavar="N", help="images per batch of a data set [64]; a DataLoader has its own"
    )
    given.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read a data set [0]")
    meaning = parser.add_argument_group(
        "batches and logits",
        "For batches that are not (images, labels), or outputs that are no logits of classes; MODULE:NAME each.",
    )
    meaning.add_argument(
        "--task", default="classes", metavar="NAME", help="classes, binary, multilabel, probabilities [classes]"
    )
    meaning.add_argument("--forward", metavar="MODULE:NAME", help="from the network and a batch to logits")
    meaning.add_argument("--labels", metavar="MODULE:NAME", help="from a batch to labels")
    meaning.add_argument("--correct", metavar="MODULE:NAME", help="from logits and labels to which images are right")
    meaning.add_argument("--loss", metavar="MODULE:NAME", help="from logits and labels to the loss of each image")
    images = parser.add_argument_group("images in folders", "Classes are numbered in the order of their folders' names.")
    images.add_argument("--size", type=int, default=224, metavar="S", help="images become S x S pixels [224]")
    images.add_argument("--resize", type=int, metavar="R", help="their shorter side becomes R before the centre is cropped [S]")
    images.add_argument(
        "--mean",
        type=_numbers,
        metavar="R,G,B",
        help="of the channels, for values from 0 to 1; one number makes images grey [ImageNet's]",
    )
    images.add_argument("--std", type=_numbers, metavar="R,G,B", help="the same [ImageNet's]")
    faults = parser.add_argument_group("faults")
    faults.add_argument(
        "--plan",
        default="uniform",
        metavar="PLAN",
        help="uniform, proportional, neyman, guided (the most precise); or a saved assessment's folder, to replay it [uniform]",
    )
    faults.add_argument("--injections", type=int, metavar="N", help="into each layer [1000]")
    faults.add_argument("--seed", type=int, metavar="N", help="of the draw [0]")
    faults.add_argument("--images", metavar="HOW", help="how images are drawn: uniform, importance, shared [uniform]")
    faults.add_argument(
        "--stop-at", metavar="HALF", help="stop a layer where its DeltaLoss is known to +-HALF, as 20%% [never]"
    )
    faults.add_argument("--pilot", type=int, metavar="N", help="injections before the rest is planned [128]")
    faults.add_argument(
        "--enumerate-up-to",
        type=int,
        metavar="N",
        help="try all faults of a last layer that has no more; of one with a closed form for any N but 0 [0]",
    )
    faults.add_argument("--target", metavar="WHAT", help="what faults hit: neuron, weight, metadata [neuron]")
    faults.add_argument("--operation", metavar="HOW", help="what they do to a bit: flip, stuck_at_0, stuck_at_1 [flip]")
    faults.add_argument("--bits", type=int, metavar="N", help="different bits of a value that a fault damages [1]")
    faults.add_argument("--values", type=int, metavar="N", help="different values of a layer that a fault damages [1]")
    faults.add_argument(
        "--pattern", metavar="WHAT", help="a fault's shape: value, adjacent (bits), channel, row, column, block [value]"
    )
    faults.add_argument("--block", type=_block, metavar="RxC", help="channels x places of pattern block [8x8]")
    faults.add_argument("--damage", metavar="HOW", help="of a region: equal bits in all its values, or random ones [equal]")
    faults.add_argument("--format", metavar="FORMAT", help="how values are stored: fp32, fp16, bf16, int(8), ... [fp32]")
    faults.add_argument("--kinds", type=_names, metavar="A,B", help="operations to inject into [Conv1d,Conv2d,Conv3d,Linear]")
    faults.add_argument("--detector", metavar="WHAT", help="the range detector: profiled, fixed:X, off [profiled]")
    faults.add_argument("--mitigation", default="none", metavar="WHAT", help="none, ranger, clip_to_zero, learned [none]")
    faults.add_argument("--engine", metavar="NAME", help="replay, whole, pytorchfi [replay]")
    faults.add_argument("--noise", metavar="WHAT", help="of a network whose answers vary: refuse, or report how much [refuse]")
    shown = parser.add_argument_group("results")
    shown.add_argument("--confidence", type=float, metavar="P", help="of intervals [0.99]")
    shown.add_argument(
        "--fit-per-megabit",
        type=float,
        metavar="RATE",
        help="raw failures of 10^6 bits in 10^9 hours; gives FIT (20.49: SRAM in 16 nm, Li et al., SC 2017)",
    )
    shown.add_argument("--batch-size", type=int, metavar="N", help="faults per forward pass; changes no result [256]")
    shown.add_argument("--image-batch", type=int, metavar="N", help="images per golden run [64]")


def _add_gate(commands: Any) -> None:
    parser = _command(
        commands,
        "gate",
        help="fail where a saved assessment is worse than another one",
        description="Compare two saved assessments number by number. Anything that is worse by more than its tolerance, and\n"
        "significantly so (one-sided, Holm's correction), ends with exit code 1. Faults of one plan are compared in pairs:\n"
        "assess both with the same seed, or the new one with --plan OLD.",
        epilog="example:\n  textguard gate base/resilience resilience --sdc 10% --delta-loss 10% --top1 1\n\n"
        "The same in pyproject.toml, where options come first:\n  [tool.textguard.gate]\n  top1_points = 1.0\n"
        "  delta_loss_percent = 10\n  sdc_percent = 10\n  significance = 0.01",
        work=_gate,
    )
    parser.add_argument("old", type=Path, metavar="OLD", help="folder of a saved assessment")
    parser.add_argument("new", type=Path, metavar="NEW", help="the same, to be judged")
    parser.add_argument("--top1", type=float, metavar="POINTS", help="accuracy may fall by so many percentage points [1]")
    parser.add_argument("--delta-loss", type=_percent, metavar="PERCENT", help="DeltaLoss may grow by so much [10%%]")
    parser.add_argument("--sdc", type=_percent, metavar="PERCENT", help="SDC and mismatch may grow by so much [10%%]")
    parser.add_argument("--significance", type=float, metavar="ALPHA", help="chance of a false alarm [0.01]")
    parser.add_argument(
        "--config", type=Path, default=PYPROJECT, metavar="FILE", help="with [tool.textguard.gate] [pyproject.toml]"
    )


def _add_report(commands: Any) -> None:
    parser = _command(
        commands,
        "report",
        help="a page with the figures and tables of a saved assessment, or of two",
        description="Write one HTML file, which needs nothing else, on a saved assessment; with OLD, beside another one.",
        epilog="example:\n  textguard report resilience ../base/resilience",
        work=_report,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a saved assessment")
    parser.add_argument("old", type=Path, nargs="?", metavar="OLD", help="another one to stand beside it")
    parser.add_argument("--file", type=Path, metavar="FILE", help="where to write the page [DIR/report.html]")
    parser.add_argument("--layer", metavar="NAME", help="the layer whose channels are drawn [by its share of all SDC]")


def _add_advise(commands: Any) -> None:
    parser = _command(
        commands,
        "advise",
        help="which layers and feature maps to protect for a wanted SDC",
        description="Say which layers, then which feature maps, to protect for a wanted SDC probability, and what that costs.",
        epilog="example:\n  textguard advise resilience --target-sdc 0.1%",
        work=_advise,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a saved assessment")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--target-sdc", type=_share, metavar="SDC", help="the SDC probability to reach: 0.001 or 0.1%%")
    target.add_argument("--target-fit", type=float, metavar="FIT", help="the failures in 10^9 hours to reach")
    target.add_argument("--cut", type=_share, metavar="SHARE", help="the share of SDC to be rid of: 0.9 or 90%%")
    parser.add_argument(
        "--order", choices=("share", "cost"), default="share", help="by the share of SDC, or by that for its cost [share]"
    )
    parser.add_argument("--maps", type=int, default=10, metavar="N", help="list the first N feature maps, too [10]")


def _assess(options: argparse.Namespace) -> int:
    for name, least in (("batch", 1), ("workers", 0)):
        if getattr(options, name) < least:
            raise InvalidParameter(Setting(name), f" is {getattr(options, name)}; at least {least} is needed")
    if is_saved(options.out) and not options.force:
        raise InvalidParameter(f"{options.out} holds an assessment; say --force to replace it, or name another --out")
    picture = {"size": options.size, "resize": options.resize or options.size}
    picture |= {"mean": options.mean or IMAGENET_MEAN, "std": options.std or IMAGENET_STD}
    plan = options.plan
    if "/" in plan or is_saved(Path(plan)):
        plan = Assessment.load(plan)
    fault = {
        name: getattr(options, name) for name in FaultModel.__dataclass_fields__ if getattr(options, name, None) is not None
    }
    names = {
        **{name: name for name in ("seed", "images", "stop_at", "pilot", "enumerate_up_to", "kinds", "detector", "engine")},
        **{name: name for name in ("confidence", "batch_size", "image_batch", "noise")},
        **{"injections": "injections_per_layer", "format": "number_format"},
    }
    chosen = {name: getattr(options, option) for option, name in names.items() if getattr(options, option) is not None}
    if fault:
        chosen["fault_model"] = FaultModel(**fault)
    CampaignSettings(**chosen)  # or it says what is wrong with them, before anything is loaded
    functions = {name: getattr(options, name) for name in ("forward", "labels", "correct", "loss")}
    chosen |= {name: named(spec, f"--{name}") for name, spec in functions.items() if spec is not None}
    loader = build_loader(options.data, options.batch, options.workers, picture)
    model = build_model(options.network, options.arguments, options.weights, pick_device())
    partial = options.out / PARTIAL
    if options.force:
        shutil.rmtree(partial, ignore_errors=True)
    found = assess(
        model,
        loader,
        plan=plan,
        task=options.task,
        mitigation=options.mitigation,
        fit_per_megabit=options.fit_per_megabit,
        shard_dir=partial,
        **chosen,
    )
    found.save(options.out, overwrite=options.force)
    shutil.rmtree(partial, ignore_errors=True)
    columns = ["kind", "masked", "detected", "nonfinite", "mismatch", "mismatch_low", "mismatch_high"]
    print(found.table.drop(columns=columns).round(6).to_string(index=False))
    print(f"saved in {options.out}")
    return 0


def _gate(options: argparse.Namespace) -> int:
    if options.config != PYPROJECT and not options.config.is_file():
        raise InvalidParameter(f"--config {options.config} is no file; leave it out, or name one with [tool.textguard.gate]")
    given = {"top1_points": options.top1, "delta_loss_percent": options.delta_loss, "sdc_percent": options.sdc}
    tolerances = tolerances_from(given | {"significance": options.significance}, options.config)
    old, new = (Assessment.load(folder) for folder in (options.old, options.new))
    text, worse = gate(old, new, tolerances, (_called(options.old), _called(options.new)))
    print(text, end="")
    return 1 if worse else 0


def _report(options: argparse.Namespace) -> int:
    found, other = Assessment.load(options.folder), Assessment.load(options.old) if options.old else None
    from textguard.assessment.page import write_page  # with what draws figures

    file = options.file or options.folder / "report.html"
    names = _called(options.folder), _called(options.old) if other else ""
    write_page(found, file, other=other, names=names, layer=options.layer)
    print(f"wrote {file}")
    return 0


def _advise(options: argparse.Namespace) -> int:
    found = Assessment.load(options.folder)
    from textguard.assessment.advice import advise

    targets = {name: getattr(options, name) for name in ("cut", "target_sdc", "target_fit")}
    advice = advise(found, order=options.order, **{name: value for name, value in targets.items() if value is not None})
    print(advice.sentence)
    for table in (advice.table, advice.channels.head(options.maps)):
        if len(table):
            print(f"\n{table.to_string(index=False, float_format='{:.4g}'.format)}")
    return 0


def _called(folder: Path) -> str:
    """What tables and pages call an assessment."""
    return printable(str(folder), 60)


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{printable(repr(text), 60)} is no JSON object, as '{{\"num_classes\": 10}}'")
    return found


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _block(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split("x")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{printable(repr(text), 60)} is no size, as 8x8") from None


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{printable(repr(text), 60)} is no list of numbers, as 0.5,0.5,0.5") from None


def _percent(text: str) -> float:
    """A percentage, with or without its sign."""
    try:
        return float(text.removesuffix("%"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{printable(repr(text), 60)} is no percentage, as 10%") from None


def _share(text: str) -> float:
    """A share, or a percentage with its sign."""
    number = _percent(text) / (100 if text.endswith("%") else 1)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{printable(repr(text), 60)} is no share above 0 and below 1, as 0.001 or 0.1%")
    return number


if __name__ == "__main__":
    sys.exit(main())
