"""What a killed set-up leaves behind is told from what is whole, and stamps see what they stand for."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """env_state.py for a clone in tmp_path, with an empty site-packages."""
    spec = importlib.util.spec_from_file_location("env_state_under_test", TOOLS / "env_state.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    site = tmp_path / ".venv" / "lib" / "python3.11" / "site-packages"
    site.mkdir(parents=True)
    for name, value in {
        "ROOT": tmp_path,
        "VENV": tmp_path / ".venv",
        "SITE_PACKAGES": site,
        "CPU_LOCK": tmp_path / "cpu.lock",
    }.items():
        monkeypatch.setattr(module, name, value)
    return module


def install(site: Path, name: str, version: str) -> Path:
    """A distribution as pip leaves it, written by pip itself; its dist-info directory."""

    wheel = site.parent / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": "value = 1\n",
        f"{name}/data.txt": "x" * 1000,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\nGenerator: test\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,{len(text)}\n" for path, text in files.items())
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    return site / info


def test_what_pip_installed_is_intact_until_a_file_is_cut_or_gone(state: ModuleType):
    info = install(state.SITE_PACKAGES, "alpha", "1.0")
    assert state.is_intact(info)
    data = state.SITE_PACKAGES / "alpha" / "data.txt"
    data.write_text("x" * 999)
    assert not state.is_intact(info)
    data.write_text("x" * 1000)
    assert state.is_intact(info)
    data.unlink()
    assert not state.is_intact(info)


def test_a_kill_before_the_record_was_written_counts_as_damage(state: ModuleType):
    whole, cut = (install(state.SITE_PACKAGES, name, "1.0") for name in ("alpha", "beta"))
    (cut / "RECORD").unlink()
    (state.SITE_PACKAGES / "~lpha").mkdir()
    assert state.remove_damaged() == ["beta"]
    assert whole.is_dir()
    assert not cut.exists()
    assert not (state.SITE_PACKAGES / "~lpha").exists()
    assert state.missing({"alpha": "1.0", "beta": "1.0"}) == ["beta==1.0"]
    assert state.missing({"alpha": "1.1"}) == ["alpha==1.1"]


def test_half_of_pip_is_no_pip(state: ModuleType):
    assert not state.pip_is_intact()
    info = install(state.SITE_PACKAGES, "pip", "1.0")
    assert state.pip_is_intact()
    (state.SITE_PACKAGES / "pip" / "data.txt").unlink()
    assert info.is_dir()
    assert not state.pip_is_intact()


def test_pins_are_read_with_extras_and_local_versions(state: ModuleType, tmp_path: Path):
    path = tmp_path / "pins"
    path.write_text("# a comment==1\ntorch==2.13.0+cpu\nTransformer_Engine[pytorch,core-cu13]==2.20.2\n")
    assert state.read_pins(path) == {"torch": "2.13.0+cpu", "transformer-engine": "2.20.2"}


def test_stamps_follow_what_they_stand_for(state: ModuleType, tmp_path: Path):
    for name in ("cpu.lock", "cuda.txt", "pyproject.toml", "setup.py"):
        (tmp_path / name).write_text(name)
    header = tmp_path / "csrc" / "op" / "op_math.h"
    header.parent.mkdir(parents=True)
    header.write_text("int x;")
    packages = state.packages_key(tmp_path / "cpu.lock")
    extension = state.extension_key(packages)
    state.write_stamp("extension", extension)
    assert state.stamp_matches("extension", state.extension_key(packages))
    header.write_text("int y;")
    assert not state.stamp_matches("extension", state.extension_key(packages))
    header.write_text("int x;")
    assert state.stamp_matches("extension", state.extension_key(packages))
    header.rename(header.with_name("other.h"))
    assert not state.stamp_matches("extension", state.extension_key(packages))
    assert state.packages_key(tmp_path / "cuda.txt") != packages
    (tmp_path / "cpu.lock").write_text("torch==2.14.0")
    assert state.packages_key(tmp_path / "cpu.lock") != packages


def test_the_lock_and_pyproject_agree_on_direct_dependencies(state: ModuleType):

    root = TOOLS.parent
    lock = state.read_pins(root / "requirements" / "cpu.lock")
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["cpu"], *extras["sinks"], *extras["dev"]]
    for requirement in wanted:
        name, version = requirement.split("==")
        assert lock[state.canonical(name)].removesuffix("+cpu") == version, name
    cuda = state.read_pins(root / "requirements" / "cuda.txt")
    shared = set(cuda) & set(lock)
    assert "ray" in shared
    for name in shared - {"torch"}:
        assert cuda[name] == lock[name], name
