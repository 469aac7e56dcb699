"""The program's process: runs it, then does what the tests ask of it over a pipe (code_wire.py).

Started as a file in a sandbox, beside solution.py. Descriptor 3 brings requests, 4 takes answers. Nothing of
the tests is here, beyond the arguments of the calls that they make.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import types
from typing import Any

_EXTRA_FRAMES = 40  # of this file and code_wire.py, below a call of the program's


def main() -> None:
    """Until the tests are done, or the program ends this process."""
    sys.path.insert(0, os.getcwd())
    wire: Any = importlib.import_module("code_wire")
    sys.path.pop(0)
    with open("solution.py", encoding="utf-8", errors="surrogateescape") as file:
        source = file.read()
    kept = sys.modules["__main__"]  # else its names are taken away with it
    module = types.ModuleType("__main__")
    module.__file__ = "solution.py"
    sys.modules["__main__"] = module
    peer = wire.Peer(wire.Channel(3, 4), wire.Guard(), 1, module.__dict__)
    sys.setrecursionlimit(sys.getrecursionlimit() + _EXTRA_FRAMES)
    problem: BaseException | None = None
    try:
        exec(compile(source, "solution.py", "exec", dont_inherit=True), module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        traceback.print_exc()
        problem = error
    try:
        peer.announce(problem)
        if problem is None:
            peer.serve()
    except wire.GoneError:
        os._exit(0)
    del kept


if __name__ == "__main__":
    main()
