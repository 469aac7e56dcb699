#!/usr/bin/env bash
# Build Transformer Engine into a CUDA environment (make transformer-engine): its torch extension comes as source
# and is compiled against the installed torch, with the CUDA, cuDNN and NCCL headers of NVIDIA's wheels. Takes
# minutes; MAX_JOBS compilers run in parallel. Nothing in MegaRL requires it: docs/dependencies.md.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${1:-$PWD/.venv}
[[ -x $environment/bin/python && $("$environment/bin/python" -c 'import torch; print(torch.version.cuda)') != None ]] || {
  echo "make transformer-engine: $environment has no CUDA build of torch: MEGARL_CUDA=1 make setup first" >&2
  exit 1
}
export NVTE_FRAMEWORK=pytorch NVTE_BUILD_USE_NVIDIA_WHEELS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
PATH=$environment/bin:$PATH bash tools/setup_env.sh uv pip install --python "$environment" --no-build-isolation \
  -r requirements/transformer-engine.lock
# torch first: Transformer Engine links to the NCCL of NVIDIA's wheels but does not search for it; torch loads it.
"$environment/bin/python" -c 'import torch, transformer_engine.pytorch'
