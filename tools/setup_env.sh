#!/usr/bin/env bash
# Make .venv from a lock in requirements/ (make setup). uv installs the packages; this script installs uv with
# pip and passes it pip's settings, compiles the native extension in parallel, and keeps stamps of finished
# steps. An interrupted installation starts again; uv's cache makes that cheap.
#   setup_env.sh                     everything; MEGARL_CUDA=1: the CUDA lock, PYTHON=...: this interpreter
#   setup_env.sh packages DIR KIND   only the packages of requirements/KIND.lock, into DIR
#   setup_env.sh uv ARGUMENTS...     that uv, with pip's settings
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV PYTHONDONTWRITEBYTECODE
uv=$PWD/.setup/uv/bin/uv uv_version=0.13.9

fail() { printf '\nmake setup: %s\n' "$1" >&2; exit 1; }

run() { # run NAME COMMAND...: output into .setup/NAME.log, its end on the screen if the command fails
  local name=$1 begin=$SECONDS
  "${@:2}" >".setup/$name.log" 2>&1 </dev/null || fail "$name failed; the end of .setup/$name.log:
$(grep -v '^WARNING' ".setup/$name.log" | tail -n 8 | sed 's/^/    /')"
  echo "  $name: $((SECONDS - begin)) s"
}

bring_uv() {
  local python names section value settings
  if [[ $("$uv" --version 2>/dev/null) != "uv $uv_version "* ]]; then
    for python in ${PYTHON-} python3.11 python3.12 python3.13 python3 none; do
      ! "$python" -c 'import ensurepip' 2>/dev/null || break
    done
    [[ $python != none ]] || fail "no Python with venv is here to fetch uv: apt-get install python3-venv"
    run venv "$python" -m venv --clear .setup/uv
    run uv .setup/uv/bin/python -m pip install "uv==$uv_version"
  fi
  settings=$(.setup/uv/bin/python -m pip config list)
  for section in :env: install global; do
    for names in index-url:UV_DEFAULT_INDEX extra-index-url:UV_INDEX find-links:UV_FIND_LINKS no-index:UV_NO_INDEX \
      trusted-host:UV_INSECURE_HOST cert:SSL_CERT_FILE client-cert:SSL_CLIENT_CERT proxy:ALL_PROXY; do
      value=$(sed -n "s/^$section\.${names%:*}='\(.*\)'$/\1/p" <<<"$settings" | sed 's/\\n/ /g' | xargs)
      [[ $names != find-links:* ]] || value=${value// /,}
      [[ -z $value || -v ${names#*:} ]] || export "${names#*:}=$value"
    done
  done
  export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY-unsafe-best-match} # as in pip, no index hides another
}

create() { # create DIR KIND: an environment that can compile against torch
  local version=3.11 gib=6 free lock=requirements/$2.lock
  [[ $2 = cpu ]] || version=3.12 gib=14
  local python=${PYTHON:-$version} remedy="apt-get install python$version-dev, or make setup PYTHON=/path/to/python$version"
  free=$(($(df --output=avail -k . | tail -n 1) >> 20))
  ((free >= gib)) || fail "$gib GiB of disk are needed in $PWD, $free are free"
  PATH=$(printf '%s:' "${PYENV_ROOT:-$HOME/.pyenv}"/versions/$version.*/bin)$PATH \
    "$uv" venv --clear --prompt "megarl-$2" --python "$python" "$1" >.setup/python.log 2>&1 ||
    fail "no ${PYTHON:-Python $version} here, and uv could not fetch one (.setup/python.log): $remedy"
  "$1/bin/python" - $version <<'PYTHON' || fail "Python $version with its headers is needed: $remedy"
import pathlib, sys, sysconfig
fits = sys.argv[1] == "%d.%d" % sys.version_info[:2]
sys.exit(not (fits and pathlib.Path(sysconfig.get_paths()["include"], "Python.h").is_file()))
PYTHON
  [[ $2 != cpu ]] || "$1/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
    fail "no libnuma here, which vLLM's CPU engine links to: apt-get install libnuma1"
  # Use PyTorch's own index if pip's settings do not lead to the CPU build.
  [[ $2 != cpu ]] || grep -o '^torch==[^ ]*' $lock | "$uv" pip compile -q --no-deps - >.setup/torch.log 2>&1 ||
    export UV_TORCH_BACKEND=cpu
  run torch "$uv" pip install --python "$1" --constraint $lock torch ninja setuptools wheel
}

sync() { # sync DIR KIND: install exactly the lock, byte code included, without a time limit per file
  UV_COMPILE_BYTECODE_TIMEOUT=0 UV_COMPILE_BYTECODE=${UV_COMPILE_BYTECODE-1} run packages "$uv" pip sync --python "$1" --no-build-isolation "requirements/$2.lock"
}

start_build() { # in the background, in a process group that can be ended with all its compilers
  set -m
  PATH=$PWD/.venv/bin:$PATH run extension .venv/bin/python setup.py build_ext --inplace --force &
  build=$!
  set +m
  trap 'kill -- -$build 2>/dev/null || true' EXIT
}

check_imports() { # proves that the versions work on this machine
  local modules pids=()
  for modules in "$@"; do
    run "import-${modules%%[,.]*}" .venv/bin/python -c "import $modules" & pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || exit 1; done
}

stamp() { [[ -f $1 && $(<"$1") = "$2" ]]; } # stamp FILE KEY: true if that step was finished for this key

packages_key() { echo "$1 $PWD $(sha256sum "requirements/$1.lock")"; }

[[ $(uname -sm) = "Linux x86_64" ]] || fail "the locks are for Linux on x86_64, this is $(uname -sm)"
mkdir -p .setup
exec 9>.setup/lock # children hold it too: if this process is killed, the next one waits for them
flock -n 9 || { echo "  another set-up is at work in this clone; waiting for it ..."; flock 9; }
case ${1-} in
  uv) bring_uv; exec "$uv" "${@:2}" ;;
  packages)
    stamp "$2/.megarl-packages" "$(packages_key "$3")" && exit
    bring_uv; create "$2" "$3"; sync "$2" "$3"
    packages_key "$3" >"$2/.megarl-packages"
    exit ;;
  ?*) sed -n '2,/^set/{/^#/p}' "$0"; exit 2 ;;
esac

# Without MEGARL_CUDA an environment keeps its kind; a link to another environment is not changed.
kind=cpu abi=311
if [[ ${MEGARL_CUDA-} = 1 || -z ${MEGARL_CUDA-} && $(cat .venv/pyvenv.cfg 2>/dev/null) = *megarl-cuda* ]]; then
  kind=cuda abi=312
fi
# Keys of the stamps. Packages: lock and directory; extension: sources, flags and this CPU's vector units.
packages=$(packages_key $kind)
extension=$(sha256sum < <(
  echo "$packages ${FORCE_CUDA-} ${TORCH_CUDA_ARCH_LIST-}"
  grep -m 1 '^flags' /proc/cpuinfo | tr ' ' '\n' | grep -E '^avx(2|512(f|bw|vl|dq))$' | sort
  find csrc pyproject.toml setup.py -type f -print0 | sort -z | xargs -0 sha256sum
))
if [[ -x .venv/bin/python ]] && { [[ -L .venv ]] || stamp .venv/.megarl-packages "$packages"; }; then
  if compgen -G "megarl/_C.cpython-$abi-*.so" >/dev/null && stamp .setup/extension.stamp "$extension"; then
    echo "environment: .venv is up to date"
    exit
  fi
  fresh=
else
  fresh=1
fi

command -v "${CXX:-g++}" >/dev/null || fail "no C++ compiler here: apt-get install g++"
echo "environment: making .venv of requirements/$kind.lock (details in .setup/*.log)"
begin=$SECONDS
[[ -L .venv ]] || bring_uv
[[ -z $fresh ]] || create .venv $kind
start_build
if [[ -n $fresh ]]; then
  sync .venv $kind
  check_imports "ray, transformers, megatron.core, datasets" "vllm.v1.engine.async_llm"
  echo "$packages" >.venv/.megarl-packages
fi
wait $build || exit 1
trap - EXIT
[[ -L .venv ]] || MEGARL_METADATA_ONLY=1 run megarl "$uv" pip install --python .venv --no-deps --no-build-isolation -e .
check_imports "torch, megarl._C"
echo "$extension" >.setup/extension.stamp
echo "environment: ready in $((SECONDS - begin)) s"
