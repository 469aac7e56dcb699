"""`make setup` in a small clone: a lock of small wheels, an extension of one function."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SETUP_PY = """
import os, pathlib, subprocess, sys, sysconfig, time
from setuptools import setup
if os.environ.get("MEGARL_METADATA_ONLY") == "1":
    setup()
else:
    pathlib.Path("building").touch()
    while pathlib.Path("hold").exists():
        time.sleep(0.05)
    name = "megarl/_C" + sysconfig.get_config_var("EXT_SUFFIX")
    include = sysconfig.get_paths()["include"]
    subprocess.run(["g++", "-shared", "-fPIC", "-I", include, "csrc/op.cpp", "-o", name], check=True)
"""
EXTENSION = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, VALUE};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""
PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "megarl"
version = "0"
[tool.setuptools]
packages = ["megarl"]
"""
pytestmark = pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the CPU lock is for Python 3.11")


def write_wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> None:
    """A wheel of these files, with their record."""
    record = f"{name}-{version}.dist-info/RECORD"
    lines = [f"{path},,{len(content)}\n" for path, content in files.items()] + [f"{record},,\n"]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, content in {**files, record: "".join(lines).encode()}.items():
            archive.writestr(path, content)


def made_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    """A small distribution."""
    wheel = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\nGenerator: test\n"
    described = {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "WHEEL": wheel}
    described = {f"{name}-{version}.dist-info/{path}": text for path, text in described.items()}
    write_wheel(folder, name, version, {path: text.encode() for path, text in {**files, **described}.items()})


def repacked_wheel(folder: Path, name: str) -> None:
    """An installed distribution as a wheel again."""
    distribution = metadata.distribution(name)
    files = {
        str(file): Path(str(file.locate())) for file in distribution.files or [] if ".." not in file.parts
    }
    left_out = ("RECORD", "INSTALLER", "REQUESTED", "uv_cache.json", ".pyc")
    kept = {name: path.read_bytes() for name, path in files.items() if not name.endswith(left_out)}
    write_wheel(folder, name, distribution.version, kept)


class Clone:
    """A small clone and how to set it up."""

    def __init__(self, place: Path, wheels: Path) -> None:
        self.place, self.wheels, self.site = place, wheels, place / ".venv/lib/python3.11/site-packages"
        # Only pip's configuration says where the wheels are: that uv finds them is part of the test.
        (place / "pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {wheels}\n")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_", "MEGARL_"))}
        self.environment = {
            **kept,
            "PIP_CONFIG_FILE": str(place / "pip.conf"),
            "UV_CACHE_DIR": str(place / "cache"),
        }
        self.environment["UV_PYTHON_DOWNLOADS"] = "never"

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        command = ["bash", "tools/setup_env.sh", *arguments]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        values = {**self.environment, **environment}
        return subprocess.Popen(command, cwd=self.place, env=values, start_new_session=True, **output)  # type: ignore[call-overload,no-any-return]

    def setup(self, *arguments: str, **environment: str) -> tuple[int, str]:
        child = self.start(*arguments, **environment)
        output, _ = child.communicate(timeout=120)
        return child.returncode, output

    @staticmethod
    def kill(child: subprocess.Popen[str]) -> None:
        """The set-up and all that it started, at once."""
        for process in [*psutil.Process(child.pid).children(recursive=True), child]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        child.communicate()

    def wait_for_build(self) -> None:
        deadline = time.monotonic() + 60
        while not (self.place / "building").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (self.place / "building").unlink()

    def broken_files(self) -> list[str]:
        """Return files of installed distributions that are missing or of another size than recorded."""
        broken = []
        for distribution in metadata.distributions(path=[str(self.site)]):
            for file in distribution.files or []:
                path = Path(str(file.locate()))
                if not path.exists() or file.size not in (None, path.stat().st_size):
                    broken.append(str(file))
        return broken


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    made_wheel(folder, "torch", "2.13.0+cpu", {"torch/__init__.py": "", "torch/data.txt": "x" * 100_000})
    modules = ("ray", "transformers", "datasets", "megatron/core", "vllm/v1/engine/async_llm")
    made_wheel(folder, "rest", "1.0", {f"{module}/__init__.py": "" for module in modules})
    made_wheel(folder, "rest", "1.1", {f"{module}/__init__.py": "# 1.1\n" for module in modules})
    made_wheel(folder, "ninja", "1.0", {"ninja/__init__.py": ""})
    for name in ("packaging", "setuptools", "wheel"):
        repacked_wheel(folder, name)
    return folder


def write_lock(clone: Path, wheels: Path, rest: str) -> None:
    lines = []
    for wheel in sorted(wheels.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        if name != "rest" or version == rest:
            lines.append(
                f"{name}=={version} \\\n    --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"
            )
    (clone / "requirements" / "cpu.lock").write_text("".join(lines))


@pytest.fixture(scope="module")
def uv() -> Path:
    """The repository's own uv, brought if it is not there."""
    subprocess.run(
        ["bash", "tools/setup_env.sh", "uv", "--version"], cwd=ROOT, check=True, capture_output=True
    )
    return ROOT / ".setup" / "uv"


@pytest.fixture
def clone(tmp_path: Path, wheels: Path, uv: Path) -> Iterator[Clone]:
    for folder in ("tools", "requirements", "csrc", "megarl", ".setup"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "tools" / "setup_env.sh", tmp_path / "tools")
    (tmp_path / ".setup" / "uv").symlink_to(uv)
    (tmp_path / "megarl" / "__init__.py").touch()
    (tmp_path / "setup.py").write_text(SETUP_PY)
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / "csrc" / "op.cpp").write_text(EXTENSION.replace("VALUE", "1"))
    write_lock(tmp_path, wheels, "1.0")
    yield Clone(tmp_path, wheels)
    (tmp_path / "hold").unlink(missing_ok=True)


def test_an_environment_from_pips_own_settings_and_nothing_to_do_the_second_time(clone: Clone) -> None:
    status, output = clone.setup()
    assert status == 0, output
    assert "environment: ready" in output
    assert clone.broken_files() == []
    assert list(clone.site.glob("torch/__pycache__/*.pyc"))
    begin = time.monotonic()
    status, output = clone.setup()
    assert (status, output) == (0, "environment: .venv is up to date\n")
    assert time.monotonic() - begin < 2


def test_a_changed_source_builds_and_a_changed_lock_installs(clone: Clone) -> None:
    assert clone.setup()[0] == 0
    before = clone.site.stat().st_ino
    (clone.place / "csrc" / "op.cpp").write_text(EXTENSION.replace("VALUE", "2"))
    status, output = clone.setup()
    assert status == 0
    assert "extension:" in output
    assert "packages:" not in output
    assert clone.site.stat().st_ino == before
    write_lock(clone.place, clone.wheels, "1.1")
    status, output = clone.setup()
    assert status == 0
    assert "packages:" in output
    assert (clone.site / "ray" / "__init__.py").read_text() == "# 1.1\n"


def test_what_a_killed_set_up_left_half_installed_is_made_whole(clone: Clone) -> None:
    (clone.place / "hold").touch()
    child = clone.start()
    clone.wait_for_build()
    clone.kill(child)
    (clone.place / "hold").unlink()
    # As a kill in the middle of a package leaves it: metadata there, a file missing.
    (clone.site / "torch" / "data.txt").unlink()
    assert clone.broken_files() != []
    status, output = clone.setup()
    assert status == 0, output
    assert clone.broken_files() == []


@pytest.mark.parametrize("delay", [0.1, 0.4, 0.8, 1.2])
def test_killed_at_any_moment_the_next_set_up_succeeds(clone: Clone, delay: float) -> None:
    child = clone.start()
    time.sleep(delay)
    clone.kill(child)
    status, output = clone.setup()
    assert status == 0, output
    assert clone.broken_files() == []
    assert clone.setup() == (0, "environment: .venv is up to date\n")


def test_two_set_ups_take_turns(clone: Clone) -> None:
    (clone.place / "hold").touch()
    first = clone.start()
    clone.wait_for_build()
    second = clone.start()
    assert second.stdout is not None
    assert "another set-up is at work" in second.stdout.readline()
    (clone.place / "hold").unlink()
    assert "environment: ready" in first.communicate(timeout=60)[0]
    assert second.communicate(timeout=60)[0] == "environment: .venv is up to date\n"
    assert (first.returncode, second.returncode) == (0, 0)


def test_the_compiler_of_a_killed_set_up_is_waited_for(clone: Clone) -> None:
    (clone.place / "hold").touch()
    first = clone.start()
    clone.wait_for_build()
    first.kill()  # the script alone; what it started goes on
    second = clone.start()
    assert second.stdout is not None
    assert "another set-up is at work" in second.stdout.readline()
    (clone.place / "hold").unlink()
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 0, output
    assert clone.broken_files() == []
    first.communicate()


def test_a_file_other_than_the_locked_one_is_refused(clone: Clone) -> None:
    lock = clone.place / "requirements" / "cpu.lock"
    digest = lock.read_text().split("rest==1.0")[1].split("sha256:")[1][:64]
    lock.write_text(lock.read_text().replace(digest, "0" * 64))
    status, output = clone.setup()
    assert status == 1
    assert "make setup: packages failed" in output
    assert "Hash mismatch for `rest==1.0`" in output
    assert clone.setup()[0] == 1  # nothing says that it is done


def test_one_line_says_what_is_missing(clone: Clone, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "uname").write_text("#!/bin/sh\necho Darwin arm64\n")
    (programs / "uname").chmod(0o755)
    status, output = clone.setup(PATH=f"{programs}:{os.environ['PATH']}")
    assert (status, output) == (1, "\nmake setup: the locks are for Linux on x86_64, this is Darwin arm64\n")
    (programs / "libnuma.so.1").write_text("not a library, and found first")
    status, output = clone.setup(LD_LIBRARY_PATH=str(programs))
    assert (status, output.splitlines()[-1]) == (
        1,
        "make setup: no libnuma here, which vLLM's CPU engine links to: apt-get install libnuma1",
    )
    status, output = clone.setup(CXX="no-such-compiler")
    assert (status, output) == (1, "\nmake setup: no C++ compiler here: apt-get install g++\n")
    status, output = clone.setup(PYTHON="python3.99")
    assert status == 1
    assert output.splitlines()[-1].startswith("make setup: no python3.99 here, and uv could not fetch one")


def test_an_environment_stays_of_its_kind(clone: Clone) -> None:
    (clone.place / ".venv").mkdir()
    (clone.place / ".venv" / "pyvenv.cfg").write_text("prompt = megarl-cuda\n")
    (clone.place / "requirements" / "cuda.lock").touch()
    assert "requirements/cuda.lock" in clone.setup(PYTHON="python3.99")[1]
    assert "requirements/cpu.lock" in clone.setup(PYTHON="python3.99", MEGARL_CUDA="0")[1]


def test_a_source_that_does_not_compile_costs_no_second_installation(clone: Clone) -> None:
    source = clone.place / "csrc" / "op.cpp"
    whole = source.read_text()
    source.write_text("int broken")
    status, output = clone.setup()
    assert status == 1
    assert "make setup: extension failed" in output
    source.write_text(whole)
    status, output = clone.setup()
    assert status == 0, output
    assert "packages:" not in output
