#!/usr/bin/env bash
# Resolves pyproject.toml and requirements/*.in into requirements/*.lock (make lock). Locked versions
# are kept if they still fit; --upgrade, or --upgrade-package NAME, takes newer ones.
set -euo pipefail
cd "$(dirname "$0")/.."
# Hashes come from the default index, which has every file of a release; an extra index may have only some.
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
bash tools/setup_env.sh uv pip compile requirements/docs.in --python-version 3.11 \
  --python-platform x86_64-manylinux_2_28 --no-python-downloads --generate-hashes --annotation-style line \
  --custom-compile-command "make lock" --quiet --output-file requirements/docs.lock "$@"
echo "requirements/docs.lock: $(grep -c == requirements/docs.lock) packages"
