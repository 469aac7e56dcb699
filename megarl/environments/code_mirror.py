"""Objects of the other process, as this one sees them: every use of a mirror is a call over the pipe.

A class of the other process becomes a class here (:class:`Mirror`), its instances instances of that: so
isinstance, except and type() work without asking. What derives from int, str, tuple and other values that
cannot change *is* such a value, with the base's own operators: what its class overrides is never asked.

Imports nothing but the standard library: it is also run as a file, in the sandbox.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from typing import Any

VALUES: tuple[type, ...] = (int, float, complex, str, bytes, tuple, frozenset)
CHANGEABLE: tuple[type, ...] = (list, dict, set, bytearray)

COMPARISONS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
_BINARY = [
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
    "divmod",
]
ARITHMETIC = tuple(
    f"__{prefix}{name}__"
    for name in _BINARY
    for prefix in ("", "r", "i")
    if (prefix, name) != ("i", "divmod")
)
NUMERIC = tuple(
    f"__{name}__"
    for name in [
        "abs",
        "neg",
        "pos",
        "invert",
        "int",
        "float",
        "complex",
        "index",
        "round",
        "trunc",
        "floor",
        "ceil",
        "bool",
    ]
)
SHOWN = ("__str__", "__repr__", "__format__")
OTHERS = tuple(
    f"__{name}__"
    for name in [
        "len",
        "iter",
        "next",
        "reversed",
        "bytes",
        "hash",
        "enter",
        "exit",
        "getitem",
        "setitem",
        "delitem",
        "missing",
        "call",
        "contains",
        "length_hint",
        "aiter",
        "anext",
        "aenter",
        "aexit",
        "await",
        "fspath",
    ]
)
OPERATORS = (*COMPARISONS, *ARITHMETIC, *NUMERIC, *SHOWN, *OTHERS)


class Link:
    """A mirror's link to the object it stands for."""

    __slots__ = ("constructed", "handle", "mixed", "peer", "received", "used")

    def __init__(self, peer: Any, handle: int) -> None:
        self.peer, self.handle = peer, handle
        self.received = 0  # how often the other process has sent it
        self.constructed = False  # a test has called the class that it is of
        self.used = False  # a test has read an attribute of it
        self.mixed = False  # it came of an operator whose other operand was a test's own value


def link_of(value: Any) -> Link | None:
    """The link of a mirror, be it a class, an object or a function; None for everything else."""
    kind = type(value)
    if isinstance(kind, Mirror):
        found = object.__getattribute__(value, "__dict__").get("_link")
    elif kind is Mirror:
        found = type.__getattribute__(value, "__dict__").get("_class_link")
    elif kind is Function:
        found = object.__getattribute__(value, "_link")
    else:
        return None
    return found if isinstance(found, Link) else None


class Mirror(type):
    """The class of classes of the other process."""

    def __new__(mcs, name: str, bases: tuple[type, ...], space: dict[str, Any], **_: Any) -> Mirror:
        """Only the wire makes them: a class of a test cannot derive from one of the program."""
        if "_class_link" not in space:
            for base in bases:
                if isinstance(base, Mirror):
                    base._class_link.peer.cannot(f"a test derives a class from {base.__name__}")
        return super().__new__(mcs, name, bases, space)

    _class_link: Link

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """An object of the other process."""
        made = cls._class_link.peer.call(cls, args, kwargs)
        link = link_of(made)
        if link is not None:
            link.constructed = True
        return made

    def __getattr__(cls, name: str) -> Any:
        """Class attributes, class methods, static methods."""
        if name.startswith("__") and name.endswith("__") and name in OPERATORS:
            raise AttributeError(name)
        return cls._class_link.peer.attribute(cls, name)

    def __setattr__(cls, name: str, value: Any) -> None:
        """There too."""
        cls._class_link.peer.set_attribute(cls, name, value)

    def __delattr__(cls, name: str) -> None:
        """There too."""
        cls._class_link.peer.delete_attribute(cls, name)

    def __iter__(cls) -> Any:
        """Members of an enumeration."""
        return cls._class_link.peer.operate(cls, "__iter__", ())

    def __len__(cls) -> int:
        """Of an enumeration."""
        return int(cls._class_link.peer.operate(cls, "__len__", ()))

    def __bool__(cls) -> bool:
        """A class is true."""
        return True

    def __getitem__(cls, key: Any) -> Any:
        """A member by its name, or a generic alias."""
        return cls._class_link.peer.operate(cls, "__getitem__", (key,))


class Function:
    """A function or method of the other process."""

    def __init__(self, link: Link, name: str) -> None:
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "__name__", name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Class that isinstance sees: a function's."""
        return types.FunctionType

    @property
    def __doc__(self) -> Any:  # type: ignore[override,unused-ignore]
        """The function's own."""
        return _link(self).peer.attribute(self, "__doc__")

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call it there."""
        return _link(self).peer.call(self, args, kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """As a function does that is found in a class."""
        return self if instance is None else types.MethodType(self, instance)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the function's object."""
        return _link(self).peer.attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """There too."""
        _link(self).peer.set_attribute(self, name, value)

    def __repr__(self) -> str:
        """As a function's."""
        return f"<function {object.__getattribute__(self, '__name__')}>"


def make_class(link: Link, about: dict[str, Any], bases: tuple[type, ...], base: type | None) -> Mirror:
    """A mirror of a class.

    Args:
        link: to the class.
        about: what the other process says of it: ``name``, ``module``, ``operators``.
        bases: mirrors of those bases that are the other process's own.
        base: the value, container or exception that it derives from.
    """
    is_value = base in VALUES
    operators = [name for name in about["operators"] if name in OPERATORS]
    if is_value:
        operators = [
            name for name in operators if name in SHOWN or name in ("__call__", "__enter__", "__exit__")
        ]
    space: dict[str, Any] = {name: _forwarded(name) for name in operators}
    if base in CHANGEABLE:
        space |= {
            name: _of_base(name) for name in (*COMPARISONS, *ARITHMETIC, "__contains__") if name in operators
        }
        space["__class__"] = property(lambda self: base)  # what isinstance asks; type() knows better
    if "__eq__" in space and "__hash__" not in space:
        space["__hash__"] = None
    space |= {
        "_class_link": link,
        "__module__": str(about["module"]),
        "__getattr__": _attribute,
        "__setattr__": _set_attribute,
        "__delattr__": _delete_attribute,
    }
    roots = (base,) if base is not None and base not in CHANGEABLE else ()
    try:
        return Mirror(str(about["name"]), (*bases, *roots) or (object,), space)
    except TypeError:  # bases that do not agree, or name the same root twice
        return Mirror(str(about["name"]), bases or roots or (object,), space)


def make_object(kind: Mirror, link: Link, value: tuple[Any, ...] = ()) -> Any:
    """An instance of a mirrored class; ``value``: what it is, where it is a value."""
    root: Any = next((base for base in (*VALUES, BaseException) if issubclass(kind, base)), object)
    made = root.__new__(kind, *value)
    object.__getattribute__(made, "__dict__")["_link"] = link
    return made


def _link(value: Any) -> Link:
    found = link_of(value)
    assert found is not None
    return found


def _forwarded(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _link(self).peer.operate(self, name, args, kwargs)

    method.__name__ = name
    return method


def _of_base(name: str) -> Callable[..., Any]:
    """An operator of what derives from list, dict, ...: between the values that they have now."""

    def method(self: Any, other: Any) -> Any:
        link = link_of(other)
        value = link.peer.base_value(other) if link is not None else other
        own = _link(self).peer.base_value(self)
        return getattr(own, name)(value) if hasattr(own, name) else NotImplemented

    method.__name__ = name
    return method


def _attribute(self: Any, name: str) -> Any:
    if name in OPERATORS:
        raise AttributeError(name)
    return _link(self).peer.attribute(self, name)


def _set_attribute(self: Any, name: str, value: Any) -> None:
    if name in ("__traceback__", "__context__", "__cause__", "__suppress_context__", "__notes__"):
        object.__setattr__(self, name, value)
        return
    _link(self).peer.set_attribute(self, name, value)


def _delete_attribute(self: Any, name: str) -> None:
    _link(self).peer.delete_attribute(self, name)


def plain(value: Any, base: type) -> Any:
    """The value of an instance of a class that derives from ``base``, whatever that class overrides."""
    readers: dict[type, Callable[[Any], Any]] = {
        int: int.__pos__,
        float: float.__pos__,
        complex: complex.__pos__,
        str: str.__str__,
        bytes: lambda v: bytes(memoryview(v)),
        tuple: lambda v: tuple(tuple.__iter__(v)),
        frozenset: lambda v: frozenset(frozenset.__iter__(v)),
        list: lambda v: list(list.__iter__(v)),
        dict: lambda v: dict(dict.items(v)),
        set: lambda v: set(set.__iter__(v)),
        bytearray: lambda v: bytearray(memoryview(v)),
    }
    return readers[base](value)


def same(left: Any, right: Any) -> bool:
    """Identity, as a default comparison has it."""
    return operator.is_(left, right)
