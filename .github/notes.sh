#!/usr/bin/env bash
# What CHANGELOG.md says of a version, with links to files below ADDRESS: .github/notes.sh VERSION ADDRESS
set -euo pipefail
cd "$(dirname "$0")/.."
notes=$(awk -v heading="## [$1] - " '/^(## |\[)/ { inside = index($0, heading) == 1; next } inside' CHANGELOG.md)
test -n "$notes" || { echo "CHANGELOG.md has no section '## [$1] - DATE'" >&2; exit 1; }
sed -E "s,\]\(([A-Za-z]+[/.]),]($2/\1,g" <<< "$notes"
