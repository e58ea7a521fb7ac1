#!/usr/bin/env bash
# The demo's results in this checkout against those that commit BASE holds, as Markdown: .github/compare.sh BASE
# Fails when the regression gate does.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

printf '## Demo, before and after\n\n### Headline numbers that changed\n\n'
# As code: of what stands in metrics (names of classes among it), nothing becomes a link, a mention or a table of its own.
dvc metrics diff --md "$1" | tr '\000-\010\013-\037\177' ' ' | sed 's/^/    /'
printf '\n### Regression gate\n\n'
if git cat-file -e "$1:metrics/results" 2>/dev/null; then
  make --silent --no-print-directory gate BASE="$1"
else
  echo "The base holds no metrics/results: nothing to compare."
fi
