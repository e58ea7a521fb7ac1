"""Write page.html, the template of the page that `dvc plots show` and `dvc plots diff` write: python .dvc/plots/make_page.py

DVC's own template loads three scripts from a network. This one holds them, so that the page also draws without one. DVC wants
its template in one file. The scripts come from the npm registry, by npm; to take others, change VERSIONS and run it again.
"""

import json
import subprocess
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

PAGE = Path(__file__).with_name("page.html")
# In the order in which they load. Version 5 of vega-lite is what DVC's templates and those beside this file are written for.
VERSIONS = {"vega": "5.33.1", "vega-lite": "5.23.0", "vega-embed": "6.29.0"}
# Packages that the three are built from, beside those called vega-* and d3-*. npm also installs some for command lines only.
BUNDLED = {
    *("delaunator", "fast-json-patch", "internmap", "json-stringify-pretty-compact", "robust-predicates", "semver"),
    *("topojson-client", "tslib"),
}

# DVC replaces two words in braces: refresh_tag, and plot_divs. A third one, scripts, would load the scripts from the network.
HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
    <meta charset="utf-8">
    {refresh_tag}
    <title>DVC Plot</title>
    <style>
        table {
            border-spacing: 15px;
        }
    </style>
"""
BODY = """</head>
<body>
    {plot_divs}
</body>
</html>
"""


def main() -> None:
    """Install the three packages in a temporary folder and write the page."""
    with TemporaryDirectory() as folder:
        packages = [f"{name}@{version}" for name, version in VERSIONS.items()]
        subprocess.run(["npm", "install", "--silent", "--ignore-scripts", "--prefix", folder, *packages], check=True)
        modules = Path(folder) / "node_modules"
        notice = "Written by make_page.py. Licences of its scripts and of what they are built from:"
        licences = f"<!-- {notice}\n\n{_licences(modules)}\n-->\n"
        scripts = [f"<script>/* {package}, licence above */\n{_script(modules, package)}\n</script>\n" for package in packages]
    PAGE.write_text("".join([HEAD, licences, *scripts, BODY]), encoding="utf-8")


def _script(modules: Path, package: str) -> str:
    """The minified build of a package ("vega@5.33.1"), without the reference to a file for debuggers."""
    name = package.partition("@")[0]
    lines = (modules / name / "build" / f"{name}.min.js").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("//# sourceMappingURL"))


def _licences(modules: Path) -> str:
    """Every licence text once, behind the packages that it is of; for a package that comes without one, the licence's name."""
    owners: dict[str, list[str]] = defaultdict(list)
    for folder in sorted(modules.iterdir()):
        if folder.name in {"vega", *BUNDLED} or folder.name.startswith(("vega-", "d3-")):
            package = json.loads((folder / "package.json").read_text(encoding="utf-8"))
            file = next(iter(sorted(folder.glob("LICENSE*"))), None)
            text = file.read_text(encoding="utf-8").strip() if file else f"{package['license']} (the package holds no text)"
            owners[text].append(f"{package['name']} {package['version']}")
    return "\n\n".join(f"{', '.join(names)}:\n\n{text}" for text, names in owners.items())


if __name__ == "__main__":
    main()
