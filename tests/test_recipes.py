"""`megarl recipes`: every shipped configuration is listed, printed and copied unchanged from configs/."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarl.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"


def test_every_configuration_is_listed_with_what_it_is(capsys: pytest.CaptureFixture[str]):
    assert main(["recipes", "ls"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(lines) == {str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml")}
    assert all(len(text) > 15 for text in lines.values())


@pytest.mark.parametrize("name", ["quickstart_sft", "configs/quickstart_sft.yaml"])
def test_one_is_printed(name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["recipes", "show", name]) == 0
    assert capsys.readouterr().out == (CONFIGS / "quickstart_sft.yaml").read_text()


def test_one_is_copied_and_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = sorted((CONFIGS / "recipes").glob("*.yaml"))[0]
    assert main(["recipes", "cp", source.stem, str(tmp_path)]) == 0
    copied = tmp_path / source.name
    assert capsys.readouterr().out.strip() == str(copied)
    assert copied.read_bytes() == source.read_bytes()
    copied.write_text("mine")
    assert main(["recipes", "cp", source.stem, str(copied)]) == 2
    assert copied.read_text() == "mine"
    assert "exists already" in capsys.readouterr().err


def test_an_unknown_name_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert main(["recipes", "show", "nothing"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
