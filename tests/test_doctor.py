"""`megarl doctor` on machines with missing parts."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megarl import doctor


def cpuinfo(flags: str) -> str:
    core = f"model name\t: Some CPU @ 2 GHz\nflags\t\t: fpu sse2 {flags}\n"
    return f"processor\t: 0\n{core}\nprocessor\t: 1\n{core}"


@pytest.mark.parametrize(
    ("flags", "level", "shown"),
    [
        ("avx2", "note", "AVX2"),
        ("avx2 avx512f", "note", "AVX2, AVX512"),
        ("avx2 avx512f avx512_bf16", "ok", "AVX2, AVX512, AVX512-BF16"),
        ("avx", "problem", "no AVX2"),
    ],
)
def test_instructions_decide_on_the_fast_type(flags: str, level: str, shown: str):
    name, instructions = doctor.processor_findings(cpuinfo(flags), 2)
    assert name.found == "Some CPU @ 2 GHz, 2 cores available"
    assert (instructions.level, instructions.found) == (level, shown)


def test_pins_are_read_and_compared():
    lines = ["# comment", "Torch==2.13.0+cpu", "typing_extensions==4.16.0", "vllm==1; extra == 'cuda'", ""]
    pins = doctor.read_pins(lines)
    assert pins == {"torch": "2.13.0+cpu", "typing-extensions": "4.16.0"}
    findings = doctor.package_findings({"torch": "2.13.0+cpu", "torchvision": "0.28.0"}, pins, "a file")
    by_subject = {finding.subject: finding for finding in findings}
    assert by_subject["typing-extensions"].level == "problem"
    assert by_subject["torchvision"].level == "problem"
    assert "torch" not in by_subject
    complete = doctor.package_findings(pins, pins, "a file")
    assert [finding.level for finding in complete] == ["ok", "ok"]
    moved = doctor.package_findings({**pins, "torch": "2.14.0"}, pins, "a file")
    assert [(f.subject, f.level) for f in moved if f.level != "ok"] == [("torch", "note")]


@pytest.mark.parametrize(("free", "level"), [(2**33, "ok"), (2**28, "note"), (2**25, "problem")])
def test_small_shared_memory_is_said_in_parameters(free: int, level: str):
    finding = doctor.shm_finding(free)
    assert finding.level == level
    if level != "ok":
        assert f"{free // 4_000_000} M parameters" in finding.meaning


def test_a_failing_import_is_a_problem_with_its_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(doctor._IMPORTS, "engine", "import no_such_module")
    finding = doctor.check_import("engine", doctor._start_import("import no_such_module"))
    assert finding.level == "problem"
    assert "No module named 'no_such_module'" in finding.meaning
    crash = doctor._start_import("import os; os.kill(os.getpid(), 4)")
    assert "killed by signal 4" in doctor.check_import("engine", crash).meaning


def test_exit_code_follows_the_findings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(doctor, "_IMPORTS", {})
    assert doctor.main() == 0
    assert "the main job can run here" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "shm_finding", lambda _: doctor.Finding("/dev/shm", "none", "problem", "why"))
    assert doctor.main() == 2
    out = capsys.readouterr().out
    assert "-> why" in out
    assert "1 problem" in out


def test_lines_are_plain_where_there_is_no_terminal():
    code = "from megarl import doctor; doctor.show([doctor.Finding('a', 'x' * 200, 'note', 'm')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == f"note     a             {'x' * 200}  -> m"
    assert "\033" not in done.stdout


def test_a_library_that_the_engine_links_to_is_looked_for(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(doctor.metadata, "distributions", lambda name: [name])
    monkeypatch.setattr(doctor.ctypes, "CDLL", absent)
    [finding] = doctor.check_libraries()
    assert finding.level == "problem"
    assert "libnuma.so.1: cannot open" in finding.meaning
    assert "apt-get install libnuma1" in finding.meaning
    monkeypatch.setattr(doctor.metadata, "distributions", lambda name: [])
    assert doctor.check_libraries() == []  # vLLM for GPUs does without
