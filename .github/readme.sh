#!/usr/bin/env bash
# Make README.md's links absolute, for PyPI, which has none of the files: .github/readme.sh REPOSITORY'S_ADDRESS TAG
set -euo pipefail
cd "$(dirname "$0")/.."
sed -E -i \
    -e "s,\]\(\.\./\.\./,]($1/,g" \
    -e "s,(!\[[^]]*\])\(([A-Za-z_]+/),\1($1/raw/$2/\2,g" \
    -e "s,\]\(([A-Za-z_]+[/.)]),]($1/blob/$2/\1,g" README.md
