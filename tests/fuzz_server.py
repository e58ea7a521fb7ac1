"""Runs stages in forks of one process that has imported everything, so that a run takes a tenth of a second and not five.

A fork can be killed, may use so much memory and no more, and is watched: what it writes outside its folder, and which programs
it starts. One request per line on stdin, one reply per line on stdout; see `Request` and `Reply`.
"""

import gc
import json
import os
import pkgutil
import resource
import signal
import socket
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
# Imported by some stage while it runs. No code of these may run in this process: a thread of it would be missing in the forks.
HEAVY = (
    "dvclive",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_svg",
    "openai",
    "pandas",
    "pyarrow.parquet",
    "scipy.stats",
)
HEAVY += ("sentence_transformers", "sklearn.datasets", "sklearn.model_selection", "timm", "py3langid", "ftfy", "inflect")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit event -> which of its arguments are paths that change.
CHANGES = {
    "os.remove": (0,),
    "os.rename": (0, 1),
    "os.mkdir": (0,),
    "os.rmdir": (0,),
    "os.truncate": (0,),
    "shutil.rmtree": (0,),
}
CHANGES |= {"os.link": (1,), "os.symlink": (1,), "os.chmod": (0,), "os.chown": (0,), "os.utime": (0,)}
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
GRACE = 0.005  # seconds between two looks at a fork
OUTPUT = 20_000  # letters of stdout and of stderr that a reply holds at most


@dataclass(frozen=True)
class Request:
    """What to run: `python stages ARGUMENTS`, or `python -m MODULE ARGUMENTS`, in `folder`.

    scratch: for temporary files, the only other place that may be written to. seconds, bytes: what it may take, beside the
    memory that the process has before it begins.
    """

    arguments: list[str]
    folder: str
    scratch: str
    variables: dict[str, str] = field(default_factory=dict)
    module: str = "stages.__main__"
    seconds: float = 20.0
    bytes: int = 2 << 30


@dataclass(frozen=True)
class Reply:
    """How it ended. code: None where it was killed for its time, negative after a signal.

    error: type of an exception that nobody caught; place: the innermost function of this project that it came through.
    outside: writes outside the folder, and programs.
    """

    code: int | None
    stdout: str
    stderr: str
    seconds: float
    error: str = ""
    place: str = ""
    outside: tuple[str, ...] = ()


def serve() -> None:
    """Answer requests until stdin ends."""
    _import_everything()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    gc.freeze()
    print("{}", file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(asdict(_run(Request(**json.loads(line))))), file=replies, flush=True)


def _import_everything() -> None:
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(REPOSITORY))
    from textguard.runtime import import_torchvision

    import_torchvision()
    for name in HEAVY:
        import_module(name)
    import stages
    import textguard

    for package in (textguard, stages):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            import_module(module.name)


def _run(request: Request) -> Reply:
    scratch = Path(request.scratch)
    start = time.monotonic()
    child = os.fork()
    if not child:
        _become(request)  # never returns
    code = None
    while time.monotonic() - start < request.seconds:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(GRACE)
    seconds = time.monotonic() - start
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and whatever it started
    if code is None:
        os.waitpid(child, 0)
    told = scratch / "outcome.json"
    outcome = json.loads(told.read_text(encoding="utf-8")) if told.exists() else {}
    told.unlink(missing_ok=True)
    stdout, stderr = ((scratch / name).read_text(encoding="utf-8", errors="backslashreplace") for name in ("stdout", "stderr"))
    return Reply(code, stdout[-OUTPUT:], stderr[-OUTPUT:], seconds, **outcome)


def _become(request: Request) -> None:
    """Be the process that was asked for, to its end."""
    code, outcome = 1, {}
    watch = Watch([request.folder, request.scratch])
    try:
        os.setsid()
        scratch = Path(request.scratch)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(scratch / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request.folder)
        os.environ.update(request.variables, TMPDIR=request.scratch)
        tempfile.tempdir = None  # found before
        signal.signal(signal.SIGINT, signal.default_int_handler)
        taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + request.bytes,) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request.bytes,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.argv = ["stages", *request.arguments]
        run = import_module(request.module).main
        sys.addaudithook(watch)
        try:
            code = run(request.arguments)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException as error:
            watch.on = False
            traceback.print_exc()
            outcome = {"error": type(error).__name__, "place": _place(error)}
    finally:
        watch.on = False
        sys.stdout.flush()
        sys.stderr.flush()
        outcome["outside"] = watch.seen
        Path(request.scratch, "outcome.json").write_text(json.dumps(outcome), encoding="utf-8")
        os._exit(code)


def main(arguments: list[str]) -> int:
    """What tests run in place of a stage: lines of Python."""
    exec("\n".join(arguments))
    return 0


def _place(error: BaseException) -> str:
    """FILE:FUNCTION of the innermost frame in this project's own code."""
    ours = [f"{REPOSITORY}/textguard/", f"{REPOSITORY}/stages/"]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(tuple(ours))]
    return f"{Path(frames[-1].filename).relative_to(REPOSITORY)}:{frames[-1].name}" if frames else ""


class Watch:
    """An audit hook: notes writes outside of some folders and programs that are started; refuses all but loopback's network."""

    def __init__(self, folders: list[str]) -> None:
        self.folders = [os.path.realpath(folder) for folder in folders] + ["/dev", "/proc/self"]
        self.seen: list[str] = []
        self.on = True

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = arguments
            changes = (flags or 0) & WRITING or set(mode or "") & set("wax+")
            paths = [path] if changes else []
        else:
            paths = [arguments[index] for index in CHANGES.get(event, ())]
        for path in paths:
            self._look_at(event, path)
        if event in PROGRAMS:
            self._note(f"{event} {arguments[0]} {arguments[1] if len(arguments) > 1 else ''}")
        if event == "socket.connect" and isinstance(arguments[0], socket.socket) and arguments[0].family != socket.AF_UNIX:
            host = str(arguments[1][0])
            if not host.startswith(("127.", "::1", "localhost")):
                raise ConnectionRefusedError(f"no network here: {host}")
        if event == "socket.getaddrinfo" and str(arguments[0]) not in ("127.0.0.1", "localhost", "::1"):
            raise socket.gaierror("no network here")

    def _look_at(self, event: str, path: Any) -> None:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str | os.PathLike):
            return
        # A name relative to an open folder, as shutil.rmtree has them, is below one that was looked at before.
        where = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(path))), os.path.basename(path))
        if not any(where == folder or where.startswith(f"{folder}/") for folder in self.folders):
            self._note(f"{event} {where}")

    def _note(self, seen: str) -> None:
        if len(self.seen) < 10:
            self.seen.append(seen[:300])


if __name__ == "__main__":
    serve()
