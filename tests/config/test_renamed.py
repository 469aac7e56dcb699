"""Renamed keys: the error names the new key, and a run started under old keys resumes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megarl.config.grpo import GrpoConfig
from megarl.config.introspect import walk
from megarl.config.load import load_config
from megarl.config.renamed import RENAMED, with_new_names
from megarl.errors import UserError
from megarl.jobs import roots
from megarl.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
GRPO = ROOT / "configs" / "quickstart_grpo.yaml"


def keys_of_all_roots() -> set[str]:
    return {".".join(path) for root in roots().values() for path in walk(root)}


def test_every_new_name_is_a_key_and_no_old_one_is():
    keys = keys_of_all_roots()
    assert set(RENAMED.values()) <= keys
    assert not RENAMED.keys() & keys


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_key_is_answered_with_the_new_one(old: str, new: str):
    with pytest.raises(UserError, match=re.escape(f"{old}: unknown key; it is called {new} now")):
        load_config(GrpoConfig, GRPO, [f"{old}=0.3"], check_files=False)


def test_the_migration_page_lists_every_key():
    page = (ROOT / "docs" / "migration.md").read_text()
    section = page.partition("## Configuration keys")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|$", section, re.MULTILINE)
    assert dict(rows) == RENAMED


def test_only_the_keys_themselves_are_renamed():
    written = {"algorithm": {"clip_ratio_c": 3.0, "kl_coef": 0.1}, "clip_ratio_c": 1, "data": {"a": [1]}}
    assert with_new_names(written) == {
        "algorithm": {"dual_clip": 3.0, "kl_coef": 0.1},
        "clip_ratio_c": 1,
        "data": {"a": [1]},
    }
    assert "clip_ratio_c" in written["algorithm"]


def test_a_run_started_under_old_keys_is_resumed(tmp_path: Path):
    old = {"run": {"dir": str(tmp_path)}, "algorithm": {"clip_ratio_high": 0.28}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    new = {"run": {"dir": str(tmp_path)}, "algorithm": {"clip_high": 0.28}}
    directory = RunDirectory(tmp_path)
    assert directory.open(new) == []
    directory.close()
    with pytest.raises(UserError, match=r"algorithm\.clip_high"):
        RunDirectory(tmp_path).open(new | {"algorithm": {"clip_high": 0.3}})
