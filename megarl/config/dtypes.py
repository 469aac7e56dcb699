"""Types of settings that are dtypes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from megarl.config.section import SAID_ITSELF
from megarl.dtypes import full_dtype


def _read(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if (name := full_dtype(value)) == "float16":
        why = "float16 is not supported: gradients underflow without loss scaling; use bfloat16 or float32"
        raise PydanticCustomError(SAID_ITSELF, why)
    return name


IS_DTYPE = BeforeValidator(_read)
"""For ``Annotated``: accepts short names, fp32 and bf16, and says why float16 is no choice."""
Dtype = Annotated[Literal["float32", "bfloat16"], IS_DTYPE]
