#!/usr/bin/env bash
# Resolves pyproject.toml and requirements/*.in into requirements/*.lock (make lock). Versions that a lock holds
# already are kept where they still fit; --upgrade, or --upgrade-package NAME, takes newer ones.
set -euo pipefail
cd "$(dirname "$0")/.."
# The default index knows every file of a release; of an extra index with some of them the hashes would be too few.
export UV_INDEX=
for kind in cpu:3.11 cuda:3.12; do
  name=${kind%:*}
  bash tools/setup_env.sh uv pip compile pyproject.toml "requirements/$name.in" \
    --extra "$name" --extra sinks --extra dev --excludes "requirements/$name.excludes" \
    --python-version "${kind#*:}" --python-platform x86_64-manylinux_2_28 --no-python-downloads \
    --generate-hashes --annotation-style line --custom-compile-command "make lock" \
    --quiet --output-file "requirements/$name.lock" "$@"
  echo "requirements/$name.lock: $(grep -c == "requirements/$name.lock") packages"
done
