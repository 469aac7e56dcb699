"""A chat template is a program of the model's directory: how much time and memory it may take.

Jinja's sandbox keeps it from files and from the interpreter, not from loops without end. So it is tried
before it is used, in a process with limits, on a few short messages; what it does with them takes
milliseconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from megarl.errors import UserError

_SECONDS = 3
_MEMORY = 2**30  # bytes of address space, most of which Python and Jinja need themselves
_MEMORY_FAILED = 3  # exit codes of the child

# The environment is that of transformers: sandbox, block options, extensions. It is not imported: that takes
# seconds. What a template lacks here is an error that is not looked at.
_CHILD = """
import json, resource, sys
seconds, memory = int(sys.argv[1]), int(sys.argv[2])
from jinja2.sandbox import ImmutableSandboxedEnvironment
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
template, conversations = json.load(sys.stdin)
environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
)
environment.filters["tojson"] = lambda value, **_: json.dumps(value)
def refuse(message):
    raise ValueError(message)
for messages in conversations:
    try:
        given = dict(messages=messages, raise_exception=refuse, strftime_now=lambda form: "2000-01-01")
        environment.from_string(template).render(**given, add_generation_prompt=True, tools=None)
    except MemoryError:
        sys.exit(3)
    except Exception:
        pass
"""
_CONVERSATIONS = [
    [{"role": "user", "content": "hello"}],
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2 + 2"},
    ],
]


def check_template(template: Any, at: str) -> None:
    """Refuse a chat template that takes more than seconds or a gigabyte; ``at`` begins the message.

    Raises:
        UserError: it does.
    """
    for text in _texts(template):
        command = [sys.executable, "-I", "-c", _CHILD, str(_SECONDS), str(_MEMORY)]
        try:
            child = subprocess.run(
                command,
                input=json.dumps([text, _CONVERSATIONS]).encode(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=20 * _SECONDS,  # by the clock, on a machine that does other things too
            )
            code = child.returncode
        except subprocess.TimeoutExpired:
            code = -1
        if code < 0:
            raise UserError(f"{at}: the chat template is not done with four short messages in {_SECONDS} s")
        if code == _MEMORY_FAILED:
            raise UserError(f"{at}: the chat template takes more than 1 GiB for four short messages")


def _texts(template: Any) -> Iterator[str]:
    """A template, or those of a mapping by name; whatever else it is the tokenizer refuses."""
    if isinstance(template, str):
        yield template
    elif isinstance(template, Mapping):
        yield from (each for each in template.values() if isinstance(each, str))
