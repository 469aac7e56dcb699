"""What the environment should hold, what it does hold, and the stamps that say which parts are done.

Standard library only: the interpreter that makes .venv runs it.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CPU_LOCK = ROOT / "requirements" / "cpu.lock"
PYTHON_WANTED = "3.11"
SITE_PACKAGES = VENV / "lib" / f"python{PYTHON_WANTED}" / "site-packages"


def canonical(name: str) -> str:
    """PEP 503 form of a distribution's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(path: Path) -> dict[str, str]:
    """Versions by name, from every `name==version` line; comments and blank lines are skipped."""
    pins = {}
    for line in path.read_text().splitlines():
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[a-z0-9_,-]+\])?==(\S+)", line)
        if match:
            pins[canonical(match.group(1))] = match.group(2)
    return pins


def is_intact(dist_info: Path) -> bool:
    """Whether every file of the distribution is there in its recorded size (pip writes RECORD last)."""
    record = dist_info / "RECORD"
    if not record.is_file():
        return False
    with record.open(newline="") as rows:
        for name, _, size in csv.reader(rows):
            if name.endswith(".pyc") or name == "":
                continue
            try:
                found = (dist_info.parent / name).stat().st_size
            except FileNotFoundError:
                return False
            if size and found != int(size):
                return False
    return True


def pip_is_intact() -> bool:
    """Whether there is exactly one pip, and all of it."""
    found = list(SITE_PACKAGES.glob("pip-*.dist-info"))
    return len(found) == 1 and is_intact(found[0])


def remove_damaged() -> list[str]:
    """Forgets half-installed distributions, so that pip installs them again; their names."""
    damaged = [path for path in SITE_PACKAGES.glob("*.dist-info") if not is_intact(path)]
    # pip moves what it uninstalls to names that begin with a tilde; after a kill they stay behind.
    for path in [*damaged, *SITE_PACKAGES.glob("~*")]:
        shutil.rmtree(path)
    return [path.name.split("-")[0] for path in damaged]


def installed() -> dict[str, str]:
    """Versions by name of what the environment holds."""
    pairs = (path.name.removesuffix(".dist-info").split("-", 1) for path in SITE_PACKAGES.glob("*.dist-info"))
    return {canonical(name): version for name, version in pairs}


def missing(pins: dict[str, str]) -> list[str]:
    """The pins that are not installed in just that version, as requirements."""
    have = installed()
    return [f"{name}=={version}" for name, version in pins.items() if have.get(name) != version]


def digest(paths: list[Path], *words: str) -> str:
    """One hash of the files' names and contents, and of the words."""
    total = hashlib.sha256("\0".join(words).encode())
    for path in sorted(paths):
        total.update(f"\0{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return total.hexdigest()


def packages_key(pins_file: Path) -> str:
    """Changes when another set of packages is asked for."""
    return digest([CPU_LOCK, pins_file], PYTHON_WANTED, pins_file.name)


def extension_key(packages: str) -> str:
    """Changes when the extension must be built again: its sources, its flags, torch, or the CPU."""
    sources = [ROOT / "pyproject.toml", ROOT / "setup.py"]
    sources += [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    present = set(flags.group(1).split()) if flags else set()
    vectors = sorted(present & {"avx2", "avx512f", "avx512bw", "avx512vl", "avx512dq"})
    return digest(sources, packages, *vectors, os.environ.get("FORCE_CUDA", ""))


def stamp_matches(name: str, key: str) -> bool:
    """Whether that part was finished for this key."""
    path = VENV / f".megarl-{name}"
    return path.is_file() and path.read_text() == key


def write_stamp(name: str, key: str) -> None:
    """In one rename, so that a stamp is whole or absent."""
    path = VENV / f".megarl-{name}"
    path.with_suffix(".new").write_text(key)
    path.with_suffix(".new").replace(path)
