"""The package as users install it: a complete sdist, and a wheel that works outside the tree."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from megarl.ops import _load

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(kind: str, tree: Path, into: Path, **variables: str) -> Path:
    """Build like a build front end, without an isolated environment."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{kind}", str(into)],
        cwd=tree,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return into / done.stdout.split()[-1]


def tracked() -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in listed.stdout.split() if not name.startswith((".github/", ".gitignore"))}


def copy_of_tree(into: Path) -> Path:
    """The tracked files alone, so that nothing built here goes into a package."""
    for name in tracked():
        target = into / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    return into


def test_an_sdist_has_every_source_and_imports_no_torch(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    blocked = tmp_path / "blocked"
    (blocked / "torch").mkdir(parents=True)
    (blocked / "torch" / "__init__.py").write_text("raise ImportError('an sdist needs no torch')")
    sdist = build("sdist", copy_of_tree(tmp_path / "tree"), tmp_path, PYTHONPATH=str(blocked))
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked() <= held
    assert not [name for name in held if name.endswith((".so", ".o", ".pyc"))]


def fresh_environment(into: Path, wheel: Path) -> Path:
    """A new environment with the wheel; its dependencies are this environment's, by their path.

    Files named .pth are not read there: an editable install of this tree would find its modules before the
    wheel's.
    """
    venv.create(into, symlinks=True)
    variables = {"base": str(into), "platbase": str(into)}
    site = Path(sysconfig.get_path("purelib", vars=variables))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(into / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    return into


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_wheel_of_the_sdist_plans_and_trains(tmp_path: Path) -> None:
    """In an environment of its own, from a working directory without a tree."""
    sdist = build("sdist", copy_of_tree(tmp_path / "tree"), tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    [tree] = (tmp_path / "unpacked").iterdir()
    wheel = build("wheel", tree, tmp_path, FORCE_CUDA="0")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"megarl/py.typed", "megarl/_C.pyi", "megarl/configs/quickstart_sft.yaml"} <= set(names)
    assert sum(name.startswith("megarl/_C_avx") for name in names) == 2
    work = tmp_path / "work"
    work.mkdir()
    programs = fresh_environment(tmp_path / "environment", wheel) / "bin"
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}

    def run(program: str, *arguments: str) -> str:
        command = [str(programs / program), *arguments]
        done = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    found, native = run(
        "python", "-c", "import megarl.ops, megarl; print(megarl.__file__, megarl._C.__name__)"
    ).split()
    package = Path(found).parent
    assert package.is_relative_to(tmp_path / "environment")
    assert native.startswith("megarl._C_avx")
    assert "quickstart_sft" in run("megarl", "recipes", "ls")
    run("megarl", "recipes", "cp", "plan_qwen3_30b_a3b", "plan.yaml")
    model = package / "configs" / "models" / "qwen3_30b_a3b"
    assert "GiB" in run("megarl", "plan", "--config", "plan.yaml", f"model.path={model}", "--gpus", "32")
    run("megarl", "recipes", "cp", "quickstart_sft", "sft.yaml")
    run("python", str(ROOT / "tools" / "make_tiny_model.py"), "--output", "model", "--seed", "1")
    short = ("training.num_steps=2", "optimizer.lr_warmup_steps=1")
    run("megarl", "sft", "--config", "sft.yaml", "model.path=model", "run.dir=run", *short)
    assert (work / "run" / "summary.json").is_file()


@pytest.mark.parametrize(
    ("present", "built", "loaded"),
    [
        ("AVX512", {"_C_avx2": "AVX2", "_C_avx512": "AVX512"}, "_C_avx512"),
        ("AVX2", {"_C_avx2": "AVX2", "_C_avx512": "AVX512"}, "_C_avx2"),
        ("AVX512", {"_C": "AVX2", "_C_avx512": "AVX512"}, "_C"),
        ("AVX2", {"_C": "AVX512", "_C_avx2": "AVX2"}, "_C_avx2"),
        ("DEFAULT", {"_C_avx2": "AVX2"}, None),
        ("AVX2", {}, None),
    ],
)
def test_the_extension_that_this_cpu_runs_is_loaded(
    present: str, built: dict[str, str], loaded: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, width in built.items():
        (tmp_path / name).write_bytes(b"\x7fELF MEGARL_CPU_CAPABILITY=" + width.encode() + b"\0")

    def find_spec(name: str) -> SimpleNamespace | None:
        path = tmp_path / name.removeprefix("megarl.")
        return SimpleNamespace(origin=str(path)) if path.exists() else None

    imported: list[str] = []
    monkeypatch.delitem(sys.modules, "megarl._C", raising=False)
    monkeypatch.setattr(_load.torch.backends.cpu, "get_cpu_capability", lambda: present)
    monkeypatch.setattr(_load.importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(_load.importlib, "import_module", lambda name: imported.append(name) or name)
    monkeypatch.setattr(_load.megarl, "_C", None, raising=False)
    if loaded is None:
        with pytest.raises(
            _load.NativeOpsUnavailable, match="is not built" if not built else "built for AVX2"
        ):
            _load.load_native()
    else:
        _load.load_native()
        assert imported == [f"megarl.{loaded}"]
