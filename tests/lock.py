"""Write the requirements*.lock files and the table in THIRD_PARTY.md: `make lock`. tests/test_lock.py checks them.

A lock holds the hash of every file of every release it names, for all platforms, so that pip takes nothing else. torch comes in
two builds, whose packages differ, so it has two locks; and the package that builds others is installed before them.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# Raised by hand: another release of torch rounds differently, and trains other models.
TORCH = {"torch": "2.13.0", "torchvision": "0.28.0"}
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
BUILD, CPU, CUDA, REST, DOCS = (
    "requirements-build.lock",
    "requirements-torch-cpu.lock",
    "requirements-torch.lock",
    "requirements.lock",
    "requirements-docs.lock",
)
PURPOSES = {
    BUILD: "what builds the packages that come as source, this project too",
    CPU: "torch's build for CPUs",
    CUDA: "torch's build on PyPI, and the CUDA packages that it needs on Linux",
    REST: "everything else that the project and its tests need",
    DOCS: "what `make docs` needs besides",
}
PAGE = REPOSITORY / "THIRD_PARTY.md"
FIRST, LAST = "<!-- packages: written by tests/lock.py -->\n", "<!-- end of packages -->\n"
# Where a package's metadata say nothing, what its licence file says.
FROM_FILE = {"pytorchfi": "NCSA"}


def parsed(text: str) -> dict[str, str]:
    """The entries of a lock, by name: "NAME==VERSION ; MARKER" and a line per hash."""
    entries = re.findall(r"^[A-Za-z0-9][^\n]*(?:\n    [^\n]*)*", text, flags=re.MULTILINE)
    return {entry.partition("==")[0]: entry for entry in entries}


def hashes(entry: str) -> set[str]:
    """The hashes of an entry, in hexadecimal digits."""
    return set(re.findall(r"--hash=sha256:([0-9a-f]{64})(?= |\n|$)", entry))


def pin(entry: str) -> str:
    """An entry's "NAME==VERSION"."""
    return re.split(r"[ ;\\]", entry, maxsplit=1)[0]


def split(entries: Mapping[str, str], cpu: Mapping[str, set[str]], docs: Mapping[str, str]) -> dict[str, str]:
    """The text of every lock. entries, docs: what pyproject.toml and its group resolve to; cpu: hashes of torch for CPUs."""
    of_cuda = {name for name in entries if re.match(r"nvidia-(?!ml-py)|cuda-|triton$", name)} | set(TORCH)
    chosen = {
        BUILD: [entries["setuptools"]],
        # PyPI's torchvision also works with torch's build for CPUs, and is what pip finds where only torch's is to be had.
        CPU: [
            _entry(f"torch=={TORCH['torch']}+cpu", cpu["torch"]),
            _entry(f"torchvision=={TORCH['torchvision']}", cpu["torchvision"] | hashes(entries["torchvision"])),
        ],
        CUDA: [entries[name] for name in entries if name in of_cuda],
        REST: [entries[name] for name in entries if name not in {"setuptools", *of_cuda}],
        DOCS: [docs[name] for name in docs if name not in entries],
    }
    return {file: f"# Written by 'make lock': {PURPOSES[file]}.\n" + "\n".join(lines) + "\n" for file, lines in chosen.items()}


def _entry(requirement: str, found: set[str]) -> str:
    return " \\\n".join([requirement, *(f"    --hash=sha256:{digest}" for digest in sorted(found))])


def resolved(project: str, *options: str, constraints: str = "") -> dict[str, str]:
    """The entries that uv finds for a file of requirements, "-" for its standard input. Raises CalledProcessError."""
    command = ["uv", "pip", "compile", "--quiet", "--no-config", "--universal", "--generate-hashes", "--python-version=3.11"]
    command += ["--no-header", "--no-annotate", *options, project]
    done = subprocess.run(command, cwd=REPOSITORY, input=constraints, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    return parsed(done.stdout)


def cpu_hashes() -> dict[str, set[str]]:
    """The hashes of torch's and torchvision's CPU builds; where their index is out of reach, those that are locked already."""
    builds = "\n".join(f"{name}=={version}+cpu" for name, version in TORCH.items())
    try:
        found = resolved("-", "--no-deps", "--default-index", CPU_INDEX, constraints=builds)
    except subprocess.CalledProcessError:
        found = parsed((REPOSITORY / CPU).read_text(encoding="utf-8"))
        if {pin(entry).removesuffix("+cpu") for entry in found.values()} != {f"{n}=={v}" for n, v in TORCH.items()}:
            raise SystemExit(f"{CPU_INDEX} cannot be reached, and {CPU} holds no hashes of {builds.split()}") from None
        print(f"{CPU_INDEX} cannot be reached: {CPU} keeps its hashes", file=sys.stderr)
    return {name: hashes(entry) for name, entry in found.items()}


def licence(metadata: Mapping[str, str | list[str] | None], name: str) -> str:
    """What a package's metadata (keys as in pip's report) say of its licence, in one line."""
    stated = metadata.get("license_expression") or ""
    field = (metadata.get("license") or "").strip()
    classifiers = [c.rpartition(" :: ")[2] for c in metadata.get("classifier") or [] if c.startswith("License :: ")]
    if not stated and "\n" not in field and field != "UNKNOWN":
        stated = field
    return (stated or FROM_FILE.get(name) or ", ".join(classifiers)).replace("|", "or") or "-"


def table(rows: Iterable[tuple[str, str, str]]) -> str:
    """(name, version, licence) in Markdown, by name."""
    lines = [f"| {name} | {version} | {words} |" for name, version, words in sorted(rows)]
    return "\n".join(["| package | version | licence |", "| --- | --- | --- |", *lines]) + "\n"


def reported(lock: str) -> dict[str, str]:
    """The licence of every package of a lock that this platform would install, by name, from pip's report."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    command += ["--require-hashes", "--report=-", "--requirement", lock]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    found = [package["metadata"] for package in json.loads(done.stdout)["install"]]
    return {(name := normalised(metadata["name"])): licence(metadata, name) for metadata in found}


def normalised(name: str) -> str:
    """A package's name as indexes and locks write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, str]:
    """The version of every package in the locks, by name, but for torch's build for CPUs."""
    files = [parsed((REPOSITORY / file).read_text(encoding="utf-8")) for file in (BUILD, CUDA, REST, DOCS)]
    return {normalised(name): pin(entry).partition("==")[2] for entries in files for name, entry in entries.items()}


def main() -> None:
    """Write the locks, then the table of licences."""
    pins = "\n".join(f"{name}=={version}" for name, version in TORCH.items())
    entries = resolved("pyproject.toml", "--extra=dev", "--constraint=-", constraints=pins)
    # Both are installed into one environment.
    docs = resolved("--group=docs", "--constraint=-", constraints="\n".join(map(pin, entries.values())))
    for file, text in split(entries, cpu_hashes(), docs).items():
        (REPOSITORY / file).write_text(text, encoding="utf-8")
    licences = reported(BUILD) | reported(CUDA) | reported(REST) | reported(DOCS)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(FIRST)
    rows = [(name, version, licences.get(name, "-")) for name, version in locked().items()]
    PAGE.write_text(before + FIRST + table(rows) + LAST + rest.partition(LAST)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
