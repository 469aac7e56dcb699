"""A family without a table whose weights are not here, a hub id in a dry run: shapes by transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megarl.errors import UserError
from megarl.models import load_architecture
from tests.trainer.torch.families import FAMILIES, save_family


@pytest.mark.parametrize("name", list(FAMILIES))
def test_shapes_are_those_of_the_weights(name: str, tmp_path: Path) -> None:
    save_family(name, tmp_path / "whole")
    (tmp_path / "small").mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "small")
    whole, small = (load_architecture(tmp_path / each, any_family=True) for each in ("whole", "small"))
    assert small.hf_shapes() == whole.hf_shapes()
    assert small.spec == whole.spec


def test_what_transformers_cannot_build_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_family"}))
    with pytest.raises(UserError, match=r"^model.path: no weights in .* cannot build .*no_such_family"):
        load_architecture(tmp_path, any_family=True)
    with pytest.raises(UserError, match=r"'no_such_family' is not supported .*trainer.backend=torch"):
        load_architecture(tmp_path)
