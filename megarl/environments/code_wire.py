"""Calls between a program and the tests that judge it, two processes: one end of the pipe.

Messages are JSON with its length before it. A value of an exact builtin type (and a few of the standard
library's: decimals, dates, deques, ...) travels as plain data and is made anew on the other side: no code of
the program's comes with it, so a comparison there is Python's own. Lists, dicts, sets and the like keep
their identity: each end knows those that the other still holds and tells what has changed in them with every
message. Functions, classes, generators and objects stay where they are: the other end gets a mirror
(code_mirror.py). Exceptions are raised again by name.

Imports nothing but the standard library: it is also run as a file, in the sandbox.
"""

from __future__ import annotations

import asyncio
import collections
import datetime
import decimal
import fractions
import functools
import importlib
import json
import os
import struct
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

try:
    from megarl.environments import code_mirror as mirror
    from megarl.environments import code_standard as stdlib
except ImportError:  # beside this file, in the sandbox
    mirror = importlib.import_module("code_mirror")
    stdlib = importlib.import_module("code_standard")

MAX_MESSAGE = 16 << 20
"""Bytes of the longest message: arguments and results of one call."""

_PLAIN = frozenset((type(None), bool, float, str))
_SMALL = 1 << 63  # integers beyond it travel in base 16, which takes linear time
_CONTAINERS: dict[type, str] = {
    list: "list",
    dict: "dict",
    set: "set",
    bytearray: "bytearray",
    collections.deque: "deque",
    collections.OrderedDict: "OrderedDict",
    collections.defaultdict: "defaultdict",
    collections.Counter: "Counter",
}
_KINDS = {name: kind for kind, name in _CONTAINERS.items()}
_VIEWS: dict[type, str] = {type({}.keys()): "keys", type({}.values()): "values", type({}.items()): "items"}
_FUNCTIONS = (
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
)
_GENERATOR_METHODS = ("send", "throw", "close", "asend", "athrow", "aclose")
# What a test may have put in the place of: the program finds the same there while it is called.
PATCHABLE = tuple(
    (module, name)
    for module, names in (
        ("sys", "stdin stdout stderr argv"),
        ("builtins", "input print open"),
        ("time", "time sleep perf_counter monotonic"),
        ("random", "random randint choice shuffle uniform randrange sample"),
    )
    for name in names.split()
)


_FROM_THERE = "_raised_by_the_other_process"


def is_from_there(error: BaseException) -> bool:
    """Whether an exception was raised by the other process."""
    return _FROM_THERE in error.__dict__


class GoneError(BaseException):
    """The other process has ended, or its time has."""


class BrokenError(GoneError):
    """A received message is malformed."""


class CannotJudgeError(BaseException):
    """The tests do what cannot be done over a pipe."""


class Channel:
    """Messages over two descriptors. ``wait(descriptor, writing)`` returns when it is ready, or raises."""

    def __init__(self, source: int, target: int, wait: Callable[[int, bool], None] | None = None) -> None:
        self._source, self._target, self._wait = source, target, wait
        if wait is not None:
            os.set_blocking(target, False)

    def send(self, text: str) -> None:
        """Raises ValueError where it is too long, GoneError where nobody reads."""
        data = text.encode()
        if len(data) > MAX_MESSAGE:
            raise ValueError(f"values of {len(data) >> 20} MiB in one call, above {MAX_MESSAGE >> 20}")
        view = memoryview(struct.pack(">I", len(data)) + data)
        while view:
            try:
                view = view[os.write(self._target, view) :]
            except BlockingIOError:
                assert self._wait is not None
                self._wait(self._target, True)
            except OSError as error:
                raise GoneError(str(error)) from None

    def receive(self) -> Any:
        """Raises GoneError at the end, BrokenError for what is no JSON."""
        length = struct.unpack(">I", self._read(4))[0]
        if length > MAX_MESSAGE:
            raise BrokenError(f"a message of {length} bytes")
        try:
            return json.loads(self._read(length))
        except (ValueError, RecursionError, MemoryError) as error:
            raise BrokenError(f"no message: {error}") from None

    def _read(self, count: int) -> bytes:
        parts = []
        while count:
            if self._wait is not None:
                self._wait(self._source, False)
            try:
                part = os.read(self._source, min(count, 1 << 20))
            except OSError as error:
                raise GoneError(str(error)) from None
            if not part:
                raise GoneError("it has ended")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


class Guard:
    """Policy of one end. The program's end allows everything: it has no secrets."""

    looks_up = True  # whether functions of the standard library are taken from this process

    def may_give(self, value: Any) -> bool:
        """Whether the other end may get a mirror of this value."""
        return True

    def may_read(self, value: Any, name: str) -> bool:
        """Whether the other end may read or call this attribute."""
        return True

    def may_write(self, value: Any, name: str) -> bool:
        """Whether the other end may set or delete this attribute."""
        return True

    def operate(
        self, peer: Peer, value: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """An operator on a mirror."""
        return peer.request("do", value, name, args, kwargs)

    def attribute(self, peer: Peer, value: Any, name: str) -> Any:
        """An attribute of a mirror."""
        return peer.request("attribute", value, name)


class _Shared:
    """Containers that both ends hold, by key; what each held when last told of."""

    def __init__(self, first_key: int) -> None:
        self._next = first_key
        self.entries: dict[int, list[Any]] = {}  # [container, snapshot or None]
        self._keys: dict[int, int] = {}

    def key(self, value: Any) -> int:
        """Of a container, which is shared from now on."""
        key = self._keys.get(id(value))
        if key is None:
            key = self._next
            self._next += 2
            self.add(key, value)
        return key

    def check(self, key: int) -> None:
        """Raises ValueError for a new key that the other end may not give."""
        if key % 2 == self._next % 2:
            raise ValueError(f"the key {key}")

    def add(self, key: int, value: Any) -> None:
        """One that the other end has shared."""
        self.entries[key] = [value, None]
        self._keys[id(value)] = key

    def drop(self, key: int) -> None:
        """Forget one."""
        entry = self.entries.pop(key, None)
        if entry is not None:
            del self._keys[id(entry[0])]

    def unheld(self) -> list[int]:
        """Forget those that nothing here holds any more; their keys. Parents were added before children."""
        gone = []
        for key in list(self.entries):
            if sys.getrefcount(self.entries[key][0]) <= _UNHELD:
                self.drop(key)
                gone.append(key)
        return gone


def _snapshot(value: Any) -> Any:
    if isinstance(value, dict):
        return [list(value.keys()), list(value.values())]
    return bytes(value) if isinstance(value, bytearray) else list(value)


def _is_unchanged(value: Any, snapshot: Any) -> bool:
    if snapshot is None:
        return False
    if isinstance(value, bytearray):
        return bool(value == snapshot)
    if isinstance(value, dict):
        keys, values = snapshot
        return len(value) == len(keys) and all(
            a is b and c is d for a, b, c, d in zip(value.keys(), keys, value.values(), values, strict=True)
        )
    return len(value) == len(snapshot) and all(map(mirror.same, value, snapshot))


_UNHELD = 0


def _calibrate() -> int:
    """Return the reference count of a container that only the table holds."""
    shared = _Shared(0)
    shared.add(0, [])
    return sys.getrefcount(shared.entries[0][0])


_UNHELD = _calibrate()


class Peer:
    """One end.

    Args:
        channel: to the other end.
        guard: what is allowed here.
        first_key: 0 for one end, 1 for the other.
        space: names that the other end may look up.
    """

    def __init__(
        self, channel: Channel, guard: Guard, first_key: int, space: dict[str, Any] | None = None
    ) -> None:
        self._channel, self._guard = channel, guard
        self._space = space
        self._shared = _Shared(first_key)
        self._next_handle = 1
        self._mine: dict[int, list[Any]] = {}  # [object, how often it was sent]
        self._handles: dict[int, int] = {}
        self._theirs: dict[int, Any] = {}  # weak references, where mirrors can have them
        self._released: list[tuple[int, int]] = []
        self._classes: dict[int, Any] = {}
        self._news: list[dict[str, Any]] = []  # classes that the other end has not been told of
        self._links: weakref.WeakKeyDictionary[Any, mirror.Link] = weakref.WeakKeyDictionary()  # generators'
        self._depth = 0
        self._owner = os.getpid()
        self._lock = threading.RLock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._looked_up: dict[str, Any] = {}
        self._originals = {place: getattr(sys.modules.get(place[0]), place[1], None) for place in PATCHABLE}
        self.is_seeded = False
        """A test has set the seed of random: the program's is the same at the next call."""
        self.is_looking_up = False
        self.failure: GoneError | CannotJudgeError | None = None
        """Why nothing further can be asked, whatever a test has made of the exception."""

    # Requests.

    def request(
        self,
        what: str,
        target: Any,
        name: str = "",
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return the other end's answer; raise what is raised there."""
        if os.getpid() != self._owner or (self._space is not None and not self._depth):
            raise RuntimeError("nothing of the tests can be used outside of their calls")
        with self._lock:
            message = {
                "what": what,
                "of": self.encode(target),
                "name": name,
                "args": [self.encode(value) for value in args],
                "kwargs": {key: self.encode(value) for key, value in (kwargs or {}).items()},
            }
            if self._space is None:
                message |= self._surroundings()
            self._send(message)
            return self._answer()

    def _answer(self) -> Any:
        while True:
            message = self._receive()
            if "what" in message:
                self._serve(message)
            elif "raise" in message:
                error = self.decode(message["raise"])
                if not isinstance(error, BaseException):
                    raise BrokenError("what is raised is no exception")
                error.__dict__[_FROM_THERE] = True
                raise error
            else:
                return self.decode(message.get("value"))

    def greet(self) -> Any:
        """Wait for the other end, which says when it is ready; raises what kept it from that."""
        return self._answer()

    def announce(self, error: BaseException | None) -> None:
        """Say that this end is ready, or what keeps it from that."""
        self._send({"value": None} if error is None else {"raise": self._encode_error(error)})

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a mirror."""
        return self.request("call", target, "", args, kwargs)

    def attribute(self, target: Any, name: str) -> Any:
        """An attribute of a mirror."""
        return self._guard.attribute(self, target, name)

    def set_attribute(self, target: Any, name: str, value: Any) -> None:
        """Set it there."""
        self.request("set", target, name, (value,))

    def delete_attribute(self, target: Any, name: str) -> None:
        """Delete it there."""
        self.request("delete", target, name)

    def operate(
        self, target: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> Any:
        """An operator on a mirror."""
        return self._guard.operate(self, target, name, args, kwargs or {})

    def base_value(self, target: Any) -> Any:
        """Return the plain value of a mirror that derives from list, dict, ...; other mirrors as they are."""
        return self.request("base", target)

    def look_up(self, name: str) -> Any:
        """A global of the other end. Raises KeyError."""
        if name in self._looked_up:
            return self._looked_up[name]
        self.is_looking_up = True
        try:
            value = self.request("look up", None, name)
        finally:
            self.is_looking_up = False
        if mirror.link_of(value) is not None:  # the other end says when it is another
            self._looked_up[name] = value
        return value

    def cannot(self, reason: str) -> None:
        """Raises CannotJudgeError."""
        self.failure = CannotJudgeError(reason)
        raise self.failure

    # Serving.

    def serve(self) -> None:
        """Answer requests until the other end is gone."""
        while True:
            message = self._receive()
            if not isinstance(message, dict) or "what" not in message:
                raise BrokenError("an answer to nothing")
            self._serve(message)

    def _serve(self, message: dict[str, Any]) -> None:
        self._depth += 1
        try:
            with _Patched(self, message):
                answer = {"value": self.encode(self._do(message))}
        except (GoneError, CannotJudgeError):
            raise
        except BaseException as error:
            answer = {"raise": self._encode_error(error)}
        finally:
            self._depth -= 1
        if os.getpid() != self._owner:
            os._exit(0)  # a program forked and came back in both
        message.clear()
        with self._lock:
            try:
                self._send(answer)
            except (ValueError, TypeError) as error:
                self._send({"raise": self._encode_error(error)})

    def _encode_error(self, error: BaseException) -> Any:
        error.__traceback__ = None  # its frames hold the call's arguments
        try:
            return self.encode(error)
        except BaseException as problem:
            return ["e", "TypeError", [f"{type(error).__name__} cannot be passed: {problem}"]]

    def _do(self, message: dict[str, Any]) -> Any:
        what, name = message["what"], message["name"]
        if what == "look up":
            if self._space is None or name not in self._space:
                raise KeyError(name)
            value = self._space[name]
            self._looked_up[name] = value
            return value
        if what == "bind":
            if self._space is None:
                raise BrokenError(what)
            self._space[name] = self.decode(message["args"][0])
            return None
        if what == "unbind":
            if self._space is None:
                raise BrokenError(what)
            self._space.pop(name, None)
            return None
        if what == "offer":
            if self._space is None:
                raise BrokenError(what)
            self._space.setdefault(name, self.decode(message["args"][0]))
            return None
        target = self.decode(message["of"])
        args = tuple(self.decode(value) for value in message["args"])
        kwargs = {key: self.decode(value) for key, value in message["kwargs"].items()}
        if what == "call":
            if not self._guard.may_read(target, "__call__"):
                raise TypeError("not callable")
            return target(*args, **kwargs)
        if what == "base":
            base = _base(type(target), mirror.CHANGEABLE)
            return target if base is None else mirror.plain(target, base)
        may = self._guard.may_write if what in ("set", "delete") else self._guard.may_read
        if not may(target, name):
            raise AttributeError(f"{name} cannot be used from outside")
        if what == "attribute":
            return getattr(target, name)
        if what == "set":
            return setattr(target, name, args[0])
        if what == "delete":
            return delattr(target, name)
        if what == "await":
            return self._await(target)
        if what == "do" and name in _GENERATOR_METHODS:
            return getattr(target, name)(*args)
        if what == "do" and name in mirror.OPERATORS:
            return _operate(target, name, args, kwargs)
        raise BrokenError(f"{what} {name}")

    def _await(self, target: Any) -> Any:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()

        async def wait() -> Any:
            return await target

        return self._loop.run_until_complete(wait())

    # Messages.

    def _surroundings(self) -> dict[str, Any]:
        """Return the test's replacements of standard streams and the like, and a random seed."""
        patched = []
        for (module, name), original in self._originals.items():
            found = getattr(sys.modules.get(module), name, original)
            if found is not original:
                patched.append([module, name, self.encode(found)])
        surroundings: dict[str, Any] = {"patched": patched} if patched else {}
        if self.is_seeded:
            surroundings["random"], self.is_seeded = sys.modules["random"].getstate(), False
        return surroundings

    def _send(self, message: dict[str, Any]) -> None:
        states, news, released = self._states(), self._news, self._released
        self._news, self._released = [], []
        if states:
            message["states"] = states
        if news:
            message["classes"] = news
        if unheld := self._shared.unheld():
            message["dropped"] = unheld
        if released:
            message["released"] = released
        if self._space is not None:
            space = self._space
            changed = [name for name, value in self._looked_up.items() if space.get(name) is not value]
            for name in changed:
                del self._looked_up[name]
            if changed:
                message["changed"] = changed
        try:
            self._channel.send(json.dumps(message, separators=(",", ":")))
        except ValueError:  # too long: nothing of it has been told
            self._news, self._released = news + self._news, released + self._released
            for key, *_ in states:
                if key in self._shared.entries:
                    self._shared.entries[key][1] = None
            raise
        except GoneError as error:
            self.failure = error
            raise

    def _states(self) -> list[Any]:
        """Of the containers that have changed, and of those that these hold."""
        states, done = [], 0
        entries = self._shared.entries
        while done < len(entries):
            keys = list(entries)[done:]
            done = len(entries)
            for key in keys:
                value, snapshot = entries[key]
                if not _is_unchanged(value, snapshot):
                    states.append([key, _CONTAINERS[type(value)], *self._state(value)])
                    entries[key][1] = _snapshot(value)
        return states

    def _state(self, value: Any) -> list[Any]:
        if isinstance(value, bytearray):
            return [value.decode("latin-1")]
        if isinstance(value, dict):
            pairs = [self._all(value.keys()), self._all(value.values())]
            return (
                [*pairs, self.encode(value.default_factory)]
                if type(value) is collections.defaultdict
                else pairs
            )
        return (
            [self._all(value), value.maxlen] if isinstance(value, collections.deque) else [self._all(value)]
        )

    def _all(self, values: Any) -> list[Any]:
        values = list(values)
        kinds = set(map(type, values))
        if kinds <= _PLAIN:
            return values
        if kinds == {int} and min(values) >= -_SMALL and max(values) < _SMALL:
            return values
        return [self.encode(value) for value in values]

    def _receive(self) -> Any:
        try:
            message = self._channel.receive()
            if not isinstance(message, dict):
                raise BrokenError("no message")
            self._read(message)
        except GoneError as error:
            self.failure = error
            raise
        return message

    def _read(self, message: dict[str, Any]) -> None:
        try:
            for about in message.get("classes", ()):
                self._learn_class(about)
            self._fill(message.get("states", ()))
            for name in message.get("changed", ()):
                self._looked_up.pop(name, None)
            if "what" in message and not {"of", "name", "args", "kwargs"} <= message.keys():
                raise BrokenError("a request without its parts")
            # Dropped only when all is decoded: the message itself may speak of them.
            self._decode_ahead(message)
            for key in message.get("dropped", ()):
                self._shared.drop(key)
            for handle, count in message.get("released", ()):
                self._forget(handle, count)
        except Exception as error:
            raise BrokenError(f"no message: {type(error).__name__}: {error}") from None

    def _decode_ahead(self, message: dict[str, Any]) -> None:
        """Replaces what is encoded by values that decode() passes through."""
        for name in ("of", "value", "raise"):
            if name in message:
                message[name] = _Done(self.decode(message[name]))
        if "args" in message:
            message["args"] = [_Done(self.decode(value)) for value in message["args"]]
            message["kwargs"] = {key: _Done(self.decode(value)) for key, value in message["kwargs"].items()}
        message["patched"] = [(m, n, _Done(self.decode(value))) for m, n, value in message.get("patched", ())]

    def _fill(self, states: Any) -> None:
        entries = self._shared.entries
        for key, kind, *state in states:
            if key not in entries:
                self._shared.check(key)
                made = collections.deque(maxlen=state[1]) if kind == "deque" else _KINDS[kind]()
                self._shared.add(key, made)
        for key, _, *state in states:
            value = entries[key][0]
            if isinstance(value, bytearray):
                value[:] = state[0].encode("latin-1")
            elif isinstance(value, dict):
                keys, values = (self._decode_all(part) for part in state[:2])
                value.clear()
                dict.update(value, zip(keys, values, strict=True))
                if isinstance(value, collections.defaultdict):
                    value.default_factory = self.decode(state[2])
            elif isinstance(value, list):
                value[:] = self._decode_all(state[0])
            else:
                parts = self._decode_all(state[0])
                value.clear()
                (value.update if isinstance(value, set) else value.extend)(parts)
            entries[key][1] = _snapshot(value)

    def _decode_all(self, values: list[Any]) -> list[Any]:
        if list not in set(map(type, values)):
            return values
        return [self.decode(value) for value in values]

    # Values.

    def encode(self, value: Any) -> Any:
        """As JSON has it. Raises TypeError for what must not leave this process."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is int:
            return value if -_SMALL <= value < _SMALL else ["i", hex(value)]
        if kind in _CONTAINERS:
            return ["m", self._shared.key(value)]
        by_value = _ENCODERS.get(kind)
        if by_value is not None:
            return by_value(self, value)
        link = mirror.link_of(value) or self._other_link(value)
        if link is not None and link.peer is self:
            return ["y", link.handle]
        return self._reference(value)

    def _other_link(self, value: Any) -> Any:
        return (
            self._links.get(value) if isinstance(value, types.GeneratorType | types.CoroutineType) else None
        )

    def _reference(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, type):
            return self._encode_class(value)
        if isinstance(value, types.ModuleType) and value.__name__.split(".")[0] in sys.stdlib_module_names:
            return ["n", value.__name__]
        if isinstance(value, BaseException):
            if kind.__module__ == "builtins":
                return ["e", kind.__name__, [self.encode(part) for part in value.args]]
            parts = [self.encode(part) for part in value.args]
            return ["x", self._handle(value), self._encode_class(kind), parts]
        if not self._guard.may_give(value):
            raise TypeError(f"a {kind.__name__} cannot be passed")
        if isinstance(value, _FUNCTIONS):
            return ["f", self._handle(value), getattr(value, "__name__", "function"), stdlib.name_of(value)]
        if isinstance(value, types.GeneratorType):
            return ["g", self._handle(value)]
        if isinstance(value, types.CoroutineType):
            return ["a", self._handle(value)]
        base = _base(kind, mirror.VALUES)
        if base is not None:
            plain = self.encode(mirror.plain(value, base))
            return ["v", self._handle(value), self._describe(kind), plain]
        return ["o", self._handle(value), self._describe(kind)]

    def _handle(self, value: Any) -> int:
        handle = self._handles.get(id(value))
        if handle is None:
            handle = self._next_handle
            self._next_handle += 1
            self._mine[handle] = [value, 0]
            self._handles[id(value)] = handle
        self._mine[handle][1] += 1
        return handle

    def _forget(self, handle: int, count: int) -> None:
        entry = self._mine.get(handle)
        if entry is not None and not isinstance(entry[0], type):
            entry[1] -= count
            if entry[1] <= 0:
                del self._mine[handle], self._handles[id(entry[0])]

    def _encode_class(self, kind: type) -> Any:
        link = mirror.link_of(kind)
        if link is not None and link.peer is self:
            return ["y", link.handle]
        name = stdlib.name_of(kind)
        if name is not None and stdlib.is_known(name[0], kind):
            return ["s", *name]
        return self._describe(kind)

    def _describe(self, kind: type) -> Any:
        """A class that the other end is to have a mirror of."""
        link = mirror.link_of(kind)
        if link is not None and link.peer is self:
            return ["y", link.handle]
        if id(kind) not in self._handles:
            own = [base for base in kind.__bases__ if stdlib.name_of(base) is None]
            bases = [self._describe(base) for base in own]
            root = _base(kind, (*mirror.VALUES, *mirror.CHANGEABLE)) or stdlib.exception_base(kind)
            news = {"handle": self._handle(kind), "name": kind.__name__, "module": kind.__module__}
            news |= {
                "bases": bases,
                "root": root.__name__ if root else "",
                "operators": _operators(kind, root),
            }
            self._news.append(news)
        return ["k", self._handles[id(kind)]]

    def decode(self, data: Any) -> Any:
        """A value. What cannot be decoded raises an error that :meth:`_receive` knows."""
        if type(data) is _Done:
            return data.value
        if type(data) is not list:
            if isinstance(data, dict):
                raise ValueError("an object where a value is due")
            return data
        tag, *rest = data
        return _DECODERS[tag](self, *rest)

    def _yours(self, handle: int) -> Any:
        return self._mine[handle][0]

    def _mirrored(self, handle: int, make: Callable[[mirror.Link], Any]) -> Any:
        found = self._theirs.get(handle)
        if found is not None:
            value = found() if isinstance(found, weakref.ref) else found
            if value is not None:
                (mirror.link_of(value) or self._links[value]).received += 1
                return value
        link = mirror.Link(self, int(handle))
        link.received = 1
        value = make(link)
        try:
            self._theirs[handle] = weakref.ref(value, functools.partial(self._released_one, link))
        except TypeError:  # those of int, tuple and the like
            self._theirs[handle] = value
        return value

    def _released_one(self, link: mirror.Link, reference: Any) -> None:
        if self._theirs.get(link.handle) is reference:
            del self._theirs[link.handle]
        self._released.append((link.handle, link.received))

    def _learn_class(self, about: dict[str, Any]) -> None:
        handle = int(about["handle"])
        link = mirror.Link(self, handle)
        root = _ROOTS.get(about["root"]) or (
            stdlib.exceptions().get(about["root"]) if about["root"] else None
        )
        bases = tuple(self.decode(base) for base in about["bases"])
        if not all(isinstance(base, mirror.Mirror) for base in bases):
            raise ValueError("bases that are no classes")
        self._classes[handle] = mirror.make_class(link, about, bases, root)

    def _class(self, handle: int) -> Any:
        return self._classes[handle]

    def _function(self, handle: int, name: str, standard: list[str] | None) -> Any:
        if (
            standard is not None
            and (self._guard.looks_up or self.is_looking_up)
            and standard[0] in stdlib.PURE
        ):
            found = stdlib.find(*standard)
            if isinstance(found, _FUNCTIONS):
                return found
        return self._mirrored(handle, lambda link: mirror.Function(link, str(name)))

    def _standard(self, module: str, name: str) -> Any:
        if module.split(".")[0] in stdlib.EXCEPTIONS_OF:
            importlib.import_module(module)
        found = stdlib.find(module, name)
        if not isinstance(found, type) or not stdlib.is_known(module, found):
            raise ValueError(f"{module}.{name}")
        return found

    def _module(self, name: str) -> Any:
        if (
            not (self._guard.looks_up or self.is_looking_up)
            or name.split(".")[0] not in sys.stdlib_module_names
        ):
            return object()
        return importlib.import_module(name)

    def _object(self, handle: int, kind: Any) -> Any:
        found = self._class_of(kind)
        return self._mirrored(handle, lambda link: mirror.make_object(found, link))

    def _value(self, handle: int, kind: Any, plain: Any) -> Any:
        found, value = self._class_of(kind), self.decode(plain)
        return self._mirrored(handle, lambda link: mirror.make_object(found, link, (value,)))

    def _raised(self, handle: int, kind: Any, args: list[Any]) -> Any:
        found, values = self.decode(kind), tuple(self.decode(part) for part in args)
        if not (isinstance(found, type) and issubclass(found, BaseException)):
            raise ValueError("an exception of a class that is none")
        if not isinstance(found, mirror.Mirror):
            return stdlib.make_exception(found, values)
        return self._mirrored(handle, lambda link: mirror.make_object(found, link, values))

    def _class_of(self, kind: Any) -> Any:
        found = self.decode(kind)
        if not isinstance(found, mirror.Mirror):
            raise ValueError("an object of a class that is none")
        return found

    def _generator(self, handle: int) -> Any:
        return self._mirrored(handle, lambda link: self._linked(link, _drive(self, link)))

    def _coroutine(self, handle: int) -> Any:
        return self._mirrored(handle, lambda link: self._linked(link, _wait(self, link)))

    def _linked(self, link: mirror.Link, value: Any) -> Any:
        self._links[value] = link
        return value


class _Done:
    """A value that is decoded already."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class _Patched:
    """While a request is served: what the tests have put in the place of standard streams and the like."""

    def __init__(self, peer: Peer, message: dict[str, Any]) -> None:
        self._peer, self._message = peer, message
        self._before: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> None:
        for module, name, value in self._message.get("patched", ()):
            if (module, name) in PATCHABLE:
                place = importlib.import_module(module)
                self._before.append((place, name, getattr(place, name)))
                setattr(place, name, self._peer.decode(value))
        state = self._message.get("random")
        if state is not None:
            import random

            random.setstate((state[0], tuple(state[1]), state[2]))  # as the tests have set it

    def __exit__(self, *_: object) -> None:
        for place, name, value in self._before:
            setattr(place, name, value)


def _operate(target: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    method = getattr(type(target), name)
    if kwargs:
        return method(target, *args, **kwargs)
    return method(target, *args)


def _drive(peer: Peer, link: mirror.Link) -> Any:
    """A generator that is one of the other process."""
    holder = _Done(link)
    name: str = "__next__"
    args: tuple[Any, ...] = ()
    while True:
        try:
            value = peer.request("do", _Handle(peer, holder.value), name, args)
        except StopIteration as stop:
            return stop.value
        try:
            sent = yield value
        except GeneratorExit:
            peer.request("do", _Handle(peer, holder.value), "close")
            raise
        except BaseException as error:
            name, args = "throw", (error,)
        else:
            name, args = ("__next__", ()) if sent is None else ("send", (sent,))


async def _wait(peer: Peer, link: mirror.Link) -> Any:
    """A coroutine that is one of the other process: it is run there to its end."""
    return peer.request("await", _Handle(peer, link))


class _Handle:
    """Stands for an object of the other process whose mirror is a generator."""

    def __init__(self, peer: Peer, link: mirror.Link) -> None:
        self.link = link


def _base(kind: type, bases: tuple[type, ...]) -> type | None:
    return next((base for base in kind.__mro__[1:] if base in bases), None)


def _builtin_exception(peer: Peer, name: str, args: list[Any]) -> Any:
    return stdlib.make_exception(stdlib.exceptions()[name], tuple(peer.decode(part) for part in args))


def _operators(kind: type, root: type | None) -> list[str]:
    """Those that a class defines, beyond those of ``root``, object and exceptions."""
    found = []
    plain: list[type] = [
        object,
        *([root] if root is not None and (root in mirror.VALUES or issubclass(root, BaseException)) else []),
    ]
    for name in mirror.OPERATORS:
        value = getattr(kind, name, None)
        if value is not None and all(getattr(base, name, None) is not value for base in plain):
            found.append(name)
    return found


def _date_parts(peer: Peer, value: Any) -> Any:
    if getattr(value, "tzinfo", None) is not None:
        return peer._reference(value)
    names = {
        datetime.date: ("year", "month", "day"),
        datetime.time: ("hour", "minute", "second", "microsecond"),
        datetime.datetime: ("year", "month", "day", "hour", "minute", "second", "microsecond"),
        datetime.timedelta: ("days", "seconds", "microseconds"),
    }[type(value)]
    return ["t", type(value).__name__, [getattr(value, name) for name in names]]


_ENCODERS: dict[type, Callable[[Peer, Any], Any]] = {
    complex: lambda _, v: ["c", v.real, v.imag],
    bytes: lambda _, v: ["b", v.decode("latin-1")],
    tuple: lambda p, v: ["u", p._all(v)],
    frozenset: lambda p, v: ["z", p._all(v)],
    range: lambda p, v: ["r", p.encode(v.start), p.encode(v.stop), p.encode(v.step)],
    slice: lambda p, v: ["l", p.encode(v.start), p.encode(v.stop), p.encode(v.step)],
    type(...): lambda _, v: ["."],
    types.TracebackType: lambda _, v: None,
    type(NotImplemented): lambda _, v: ["!"],
    decimal.Decimal: lambda _, v: ["d", str(v)],
    fractions.Fraction: lambda p, v: ["q", p.encode(v.numerator), p.encode(v.denominator)],
    datetime.date: _date_parts,
    datetime.time: _date_parts,
    datetime.datetime: _date_parts,
    datetime.timedelta: _date_parts,
    _Handle: lambda _, v: ["y", v.link.handle],
    **{kind: lambda p, v: ["w", _VIEWS[type(v)], p._all(v)] for kind in _VIEWS},
}


def _view(peer: Peer, kind: str, values: list[Any]) -> Any:
    found = peer._decode_all(values)
    if kind == "keys":
        return dict.fromkeys(found).keys()
    return dict(enumerate(found)).values() if kind == "values" else dict(found).items()


_DATES: dict[str, Callable[..., Any]] = {
    "date": datetime.date,
    "time": datetime.time,
    "datetime": datetime.datetime,
    "timedelta": datetime.timedelta,
}
_DECODERS: dict[str, Callable[..., Any]] = {
    "i": lambda _, text: int(text, 16),
    "c": lambda _, real, imag: complex(real, imag),
    "b": lambda _, text: text.encode("latin-1"),
    "u": lambda p, values: tuple(p._decode_all(values)),
    "z": lambda p, values: frozenset(p._decode_all(values)),
    "r": lambda p, *parts: range(*map(p.decode, parts)),
    "l": lambda p, *parts: slice(*map(p.decode, parts)),
    ".": lambda _: ...,
    "!": lambda _: NotImplemented,
    "d": lambda _, text: decimal.Decimal(text),
    "q": lambda p, *parts: fractions.Fraction(*map(p.decode, parts)),
    "t": lambda _, kind, parts: _DATES[kind](*parts),
    "w": _view,
    "m": lambda p, key: p._shared.entries[key][0],
    "y": Peer._yours,
    "k": Peer._class,
    "f": Peer._function,
    "s": Peer._standard,
    "n": Peer._module,
    "o": Peer._object,
    "v": Peer._value,
    "x": Peer._raised,
    "e": _builtin_exception,
    "g": Peer._generator,
    "a": Peer._coroutine,
}
_ROOTS: dict[str, type] = {kind.__name__: kind for kind in (*mirror.VALUES, *mirror.CHANGEABLE)}
