"""Run a grid with several stages at a time: python -m textguard.jobs [JOBS], in the folder of its params.yaml.

First what all runs read, then every run's own stages, JOBS runs at a time, then `dvc repro` for the rest. DVC gives its lock
away while a stage's command runs, so that several `dvc repro` can share a checkout as long as none looks at the other's stages.
What fails here is tried again by the last `dvc repro`, whose word counts.

Each job has its share of the processors, as OMP_NUM_THREADS, unless that is set.
"""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

from textguard.environment import run_command
from textguard.errors import InvalidParameter, TextguardError
from textguard.params import load_params

MOST, DEFAULT = 64, 8  # jobs; of small networks, more want memory that they may not have
DVC = (sys.executable, "-m", "textguard.quick_dvc", "repro")
LOCKED, ATTEMPTS, WAIT_S = "Unable to acquire lock", 20, 3
HINTS = ("To track the changes", "\tgit add", "To enable auto staging", "\tdvc config", "Use `dvc push`", "Stage '")


def main(arguments: list[str]) -> int:
    """Run the grid. Returns the exit code."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        jobs = _jobs(arguments, processors)
        params = load_params()
    except TextguardError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    runs = params.runs
    if jobs == 1 or len(runs) == 1:
        return subprocess.run(DVC, check=False).returncode
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, processors // jobs)))
    # With what they read, all that runs share.
    shared = ["heads", "recipes", *(f"embeddings@{key}" for key in params.class_texts)]
    code = subprocess.run([*DVC, *shared], check=False).returncode
    if code:
        return code
    start, stop = time.monotonic(), threading.Event()
    try:
        with ThreadPoolExecutor(jobs) as pool:
            waiting = [pool.submit(_run, key, stop) for key in runs]
            for count, _ in enumerate(as_completed(waiting), 1):
                minutes = (time.monotonic() - start) / 60
                left = minutes / count * (len(runs) - count)
                print(f"jobs: {count} of {len(runs)} runs, {minutes:.1f} min, about {left:.1f} min left", flush=True)
    except KeyboardInterrupt:  # which the stages got too
        stop.set()
        return 130
    return subprocess.run(DVC, check=False).returncode


def _jobs(arguments: list[str], processors: int) -> int:
    given = arguments[0] if arguments else str(min(processors, DEFAULT))
    if len(arguments) > 1 or not given.isdecimal() or not 1 <= int(given) <= MOST:
        raise InvalidParameter(f"JOBS is {' '.join(arguments)[:50]!r}; it must be one number from 1 to {MOST}")
    return int(given)


def _run(key: str, stop: threading.Event) -> None:
    """A run's stages, again where another `dvc` held DVC's lock for longer than it waits; any other failure ends all."""
    for _ in range(ATTEMPTS):
        if stop.is_set():
            return
        code, locked = _repro(key)
        if not (code and locked):
            break
        time.sleep(WAIT_S)
    if code:
        stop.set()


def _repro(key: str) -> tuple[int, bool]:
    """Run `dvc repro` of a run's stages and pass its lines on. Returns the exit code, and whether it found DVC locked."""
    locked = False
    # Not a terminal: the progress bars of several stages would write over each other.
    with subprocess.Popen(
        # A pattern, since DVC reads its files anew for each stage that is named. It finds them in the order of dvc.yaml.
        [*DVC, "--single-item", "--glob", f"*@{key}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as job:
        for line in job.stdout or ():
            if LOCKED in line:
                locked = True
            elif line.strip() and not line.startswith(HINTS):
                print(line.rstrip(), flush=True)
    return job.returncode, locked


if __name__ == "__main__":
    sys.exit(run_command(main, 1))
