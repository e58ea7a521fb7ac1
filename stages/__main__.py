"""Run one stage: python stages NAME [KEY], in the folder of a grid's params.yaml.

TEXTGUARD_PROCESSES=N in the environment shares training, evaluation and campaigns among N processes of this machine; for
several machines start `torchrun ... stages/__main__.py NAME KEY` on each, in the same shared folder. Neither changes a hash.
Whatever goes wrong for a reason that a user can mend is shown as one line, with exit code 1; 130 after an interruption.
"""

import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

STARTED = time.perf_counter()

# The checkout that holds this file comes first, so that `dvc exp run` in a temporary copy runs the copy's code.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

# OpenMP's threads spin for milliseconds while they wait. Beside any other busy process they spin away each other's time slices,
# and a stage can be ten times slower. A short spin before they sleep is as fast alone, and safe. Read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
# Figures are files: whatever windows matplotlib is told to open elsewhere. Read when matplotlib is loaded.
os.environ["MPLBACKEND"] = "agg"

from textguard.artifacts import cannot_write, went_on_from  # noqa: E402
from textguard.environment import check_threads, environment_number, process_group, run_command  # noqa: E402
from textguard.errors import InvalidParameter, Setting, TextguardError, printable  # noqa: E402
from textguard.params import Params, load_params, lookup  # noqa: E402

TIMELESS = ("plan", "estimate")  # they foretell and leave nothing
# On the device that TEXTGUARD_DEVICE names.
COMPUTING = ("embeddings", "train", "evaluate", "ranges", "inject", "hardware", "corruptions", "closeup")
SHARED = ("train", "evaluate", "inject")  # stages that several processes can work on
WORD = "_TEXTGUARD_WORD"  # in their environment: the file that the first of them makes which has something to say
# Stage -> what of the parameters its KEY names; None where it takes no key.
STAGES = {
    "check": None,
    "plan": None,
    "data": "datasets",
    "prompts": "class_texts",
    "responses": "class_texts",
    "estimate": "class_texts",
    "embeddings": "class_texts",
    "text_quality": "class_texts",
    "heads": "datasets",
    "recipes": None,
    "train": "runs",
    "evaluate": "runs",
    "ranges": "runs",
    "inject": "runs",
    "hardware": "runs",
    "corruptions": "corrupted",
    "closeup": "runs",
    "results": None,
    "effects": None,
    "tables": None,
    "figures": None,
    "report": None,
}

# Settings that params.yaml keeps elsewhere than in section `inject`, or under another name than the library's argument.
PLACES = {"number_format": "inject.format", "nonfinite": "statistics.nonfinite", "weight_flips": "closeup.weight_flips"}
OF_FAULTS = ("target", "operation", "bits", "values", "pattern", "block", "damage")
PLACES |= {f"fault_model.{name}": f"inject.faults.{name}" for name in OF_FAULTS}


def main(arguments: list[str]) -> int:
    """Run the stage that the arguments name. Returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        stage, *keys = arguments or [""]
        section = lookup(STAGES, "stage", stage, "the command line 'python stages NAME [KEY]'")
        if len(keys) != (section is not None):
            raise InvalidParameter(
                f"stage {stage!r} takes {'one key' if section else 'no key'}, not {printable(' '.join(keys), 100) or 'none'!r}"
            )
        check_threads()
        _, members = process_group()
        if members > 1 and stage not in SHARED:
            raise InvalidParameter(
                f"WORLD_SIZE={members} in the environment, and stage {stage!r} is one process's work; start it without torchrun"
            )
        params = load_params()
        for key in keys:
            lookup(getattr(params, section), "key", key, "the command line; params.yaml names them")
        processes = environment_number("TEXTGUARD_PROCESSES", 1, 1024, 1)
        if stage in SHARED and members == 1 and processes > 1:
            return _share(processes, arguments)
        _load(stage).main(params, *keys)
        if stage not in TIMELESS and _is_first():
            _keep_time(params, stage, keys, members)
    except TextguardError as error:
        return _complain(f"{type(error).__name__}: {error.told(_place)}")
    except OSError as error:
        if error.filename is None:
            raise
        error = cannot_write(Path(error.filename), error)
        return _complain(f"{type(error).__name__}: {error}")
    except (MemoryError, RuntimeError) as error:
        # torch has a class of its own for GPUs, and for CPUs only these words.
        said = f"{type(error).__name__} {error}"
        if "InvalidCxxCompiler" in said:
            needed = "a C++ compiler, and none works here; install g++, or unset it"
            return _complain(f"InvalidParameter: TEXTGUARD_COMPILE=1 in the environment needs {needed}")
        if not isinstance(error, MemoryError) and "OutOfMemoryError" not in said and "can't allocate memory" not in said:
            _speak_alone()
            raise
        reason = str(error).partition("\n")[0] or "none left"
        return _complain(f"OutOfMemory: {reason}; lower the batch sizes in params.yaml, or free memory")
    except KeyboardInterrupt:
        if _is_first():
            again = "" if stage == "plan" else "; run it again to go on from the last checkpoint"
            print(f"{' '.join(arguments)}: interrupted{again}", file=sys.stderr)
        return 130
    return 0


def _load(stage: str) -> ModuleType:
    """Import the stage and all that it uses.

    None of that is ever garbage. Looking through it for some, during the import and once more at the end of the process, would
    take longer than the smallest stages.
    """
    gc.disable()
    try:
        return importlib.import_module(f"stages.{stage}")
    finally:
        gc.freeze()
        gc.enable()


def _keep_time(params: Params, stage: str, keys: list[str], processes: int) -> None:
    """Print how long the stage took, and put it into metrics/run.json. What is not kept spoils no result."""
    seconds = round(time.perf_counter() - STARTED, 2)
    from textguard.timing import keep  # not before: partial results are those of the modules that were loaded when they began

    device = "cpu"
    if stage in COMPUTING:
        from textguard.runtime import describe_device, pick_device

        device = describe_device(pick_device())
    resumed = bool(went_on_from)
    entry = {"seconds": seconds, "device": device, "processes": processes, "resumed": resumed}
    known = {"@".join(filter(None, [name, key])) for name in STAGES for key in _keys(params, name)}
    try:
        keep("@".join([stage, *keys]), entry, known)
    except TextguardError as error:
        print(f"{type(error).__name__}: {error.told(_place)}; the stage has ended well without it", file=sys.stderr)
    print(f"{' '.join([stage, *keys])}: {seconds:.1f} s on {device}{', resumed' if resumed else ''}", flush=True)


def _keys(params: Params, stage: str) -> list[str]:
    """The keys that DVC starts the stage with; an empty one where it takes none."""
    section = STAGES[stage]
    return params.looked_at if stage == "closeup" else [""] if section is None else list(getattr(params, section))


def _complain(line: str) -> int:
    _speak_alone()
    print(line, file=sys.stderr)
    return 1


def _place(setting: Setting) -> str:
    """Where a user sets an argument of the library."""
    return f"params.yaml {PLACES.get(setting, f'inject.{setting}')}"


def _speak_alone() -> None:
    """What ends one process mostly ends all: the first that comes here goes on and says so, the others wait to be stopped."""
    if WORD in os.environ:
        try:
            os.close(os.open(os.environ[WORD], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            time.sleep(60)
    elif not _is_first():  # started by torchrun
        time.sleep(3)


def _is_first() -> bool:
    try:
        return process_group()[0] == 0
    except InvalidParameter:
        return True


def _share(processes: int, arguments: list[str]) -> int:
    """Run the stage in several processes of this machine. Returns the exit code of the first that fails, else 0.

    As torchrun does, but without its report on how a process ended, which would hide the one line that says why.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    group |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    folder = tempfile.TemporaryDirectory()
    group[WORD] = str(Path(folder.name) / "taken")
    members = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env=threads | os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]
    try:
        while True:
            codes = [member.poll() for member in members]
            if any(codes) or None not in codes:
                return next((code for code in codes if code), 0)
            time.sleep(0.05)
    except KeyboardInterrupt:
        for member in members:
            member.terminate()
        return members[0].wait()
    finally:
        for member in members:
            member.kill()
            member.wait()
        folder.cleanup()


if __name__ == "__main__":  # not in processes that read images, where the system starts them afresh
    sys.exit(run_command(main, 1))
