"""Objects of users' classes: carried by name, and made again only of classes that the reader has named itself."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from aiostage import _private
from aiostage.errors import CheckpointError, shown
from aiostage.format.kinds import NotCarried, Parts

__all__ = [
    "Classes",
    "PlainObject",
    "attributes_of",
    "full_name",
    "has_plain_layout",
    "make_enum",
    "make_namedtuple",
    "make_object",
    "make_registered",
    "make_subclass",
    "make_wrapper",
    "registered_parts",
    "set_attributes",
    "take_class_apart",
    "wrapper_parts",
]

_HEAP_TYPE = 1 << 9
"""``Py_TPFLAGS_HEAPTYPE``, the flag of classes that were made by a class statement. Others are written in C."""


class PlainObject:
    """An object of a class that :func:`load` was not given: what it is made of, and its class's name.

    Saved again it is the same object of the same class.

    Attributes:
        class_name: Full name of its class, say ``mypackage.config.Schedule``.
        kind: What it is: ``"dataclass"``, ``"attributes"``, ``"enum"``, ``"namedtuple"``, ``"registered"``,
            ``"tensor"`` or ``"wrapper"``, a tensor around others.
        fields: By name, what it contains. Of an enum ``name`` and ``value``; of a registered class ``children`` and
            ``context``; of a tensor its ``data`` and ``attributes``; of a wrapper its ``inner`` tensors by name, their
            ``context`` and its ``shape``, a pair of sizes and strides.
    """

    __slots__ = ("class_name", "fields", "kind")

    def __init__(self, class_name: str, kind: str, fields: dict[str, Any]) -> None:
        self.class_name = class_name
        self.kind = kind
        self.fields = fields

    def __repr__(self) -> str:
        return f"<PlainObject of {self.class_name}: {self.kind} with {', '.join(self.fields) or 'nothing'}>"


def full_name(cls: type) -> str:
    """Return the name under which a class is saved."""
    return f"{cls.__module__}.{cls.__qualname__}"


def has_plain_layout(cls: type) -> bool:
    """Return whether all that objects of a class hold is in attributes and slots."""
    # The first base that is written in C decides what memory an object has. That of dict or tuple holds more.
    return next(base for base in cls.__mro__ if not base.__flags__ & _HEAP_TYPE) is object


def slots_of(cls: type) -> list[str]:
    """Return the names of a class's slots, as the pickle protocol knows them."""
    return list(_private.slot_names(cls))


def attributes_of(value: Any) -> dict[str, Any]:
    """Return all attributes and slots of an object that have a value."""
    slots = {name: getattr(value, name) for name in slots_of(type(value)) if hasattr(value, name)}
    return slots | getattr(value, "__dict__", {})


def take_class_apart(value: Any) -> tuple[str, Parts] | None:
    """Take an object apart that is of a class of its user, without being registered.

    Returns:
        The name of its kind, and its parts; None if only its class knows what it is made of.

    Raises:
        NotCarried: If it can surely not be carried.
    """
    cls = type(value)
    if cls is PlainObject:
        return _plain_parts(value)
    if isinstance(value, enum.Enum):
        # A combination of flags has a name such as "A|B", by which it is not found.
        name = value.name if value.name in cls.__members__ else None
        return "enum", Parts({"type": full_name(cls), "name": name}, {"value": value.value})
    if isinstance(value, tuple) and _is_namedtuple(cls):
        form = {"type": full_name(cls), "fields": list(cls._fields)}
        return "namedtuple", Parts(form, dict(zip(cls._fields, value, strict=True)), getattr(value, "__dict__", {}))
    if dataclasses.is_dataclass(cls) and has_plain_layout(cls) and not isinstance(value, torch.nn.Module):
        return "object", Parts({"type": full_name(cls), "of": "dataclass"}, {}, attributes_of(value))
    return None


def _is_namedtuple(cls: Any) -> bool:
    names = getattr(cls, "_fields", None)
    return isinstance(names, tuple) and all(type(name) is str for name in names) and cls.__new__ is not tuple.__new__


def _plain_parts(value: PlainObject) -> tuple[str, Parts]:
    """Take apart what stands for an object as that object was taken apart."""
    form: dict[str, Any] = {"type": value.class_name}
    fields = value.fields
    try:
        if value.kind in ("dataclass", "attributes"):
            return "object", Parts(form | {"of": value.kind}, {}, fields)
        if value.kind == "enum":
            return "enum", Parts(form | {"name": fields["name"]}, {"value": fields["value"]})
        if value.kind == "namedtuple":
            return "namedtuple", Parts(form | {"fields": list(fields)}, fields)
        if value.kind == "registered":
            children, context = fields["children"], fields["context"]
            return "registered", registered_parts(value.class_name, children, context, fields.get("as"))
        if value.kind == "wrapper":
            return "wrapper", wrapper_parts(value.class_name, fields["inner"], fields["context"], fields["shape"])
        if value.kind == "tensor":
            return "subclass", Parts(form, {"data": fields["data"]}, fields["attributes"])
    except (KeyError, TypeError) as error:
        raise NotCarried(
            f"a PlainObject of kind {shown(value.kind)} lacks {error}", "Save it as it was loaded."
        ) from None
    raise NotCarried(f"a PlainObject is of kind {value.kind!r:.80}", "Save it as it was loaded.")


def registered_parts(name: str, children: Iterable[Any], context: Any, base: str | None) -> Parts:
    """Return the parts of an object that a registered function has flattened, or one for a package's class."""
    form = {"type": name} if base is None else {"type": name, "as": base}
    return Parts(form, {"context": context} | {str(n): child for n, child in enumerate(children)})


def wrapper_parts(name: str, inner: Mapping[str, Any], context: Any, shape: Any) -> Parts:
    """Return the parts of a tensor that wraps others."""
    return Parts({"type": name, "inner": list(inner)}, {"context": context, "shape": shape} | dict(inner))


class Classes:
    """The classes whose objects a reader makes again, by full name. No name is ever looked up anywhere else.

    Args:
        classes: That the caller has passed.
        declared: That the process has declared safe to be named by files, as with
            :func:`torch.serialization.add_safe_globals`.

    Attributes:
        passed: Those that the caller has passed.

    Raises:
        TypeError: If one is not a class.
    """

    def __init__(self, classes: Iterable[type] = (), declared: Iterable[type] = ()) -> None:
        self._classes: dict[str, type] = {full_name(cls): cls for cls in declared}
        if isinstance(classes, (str, bytes, type)) or not isinstance(classes, Iterable):
            raise TypeError(f"classes must be several classes, as in classes=[Config], not {classes!r:.80}")
        self.passed = tuple(classes)
        for cls in self.passed:
            if not isinstance(cls, type):
                raise TypeError(f"classes must be classes, not {cls!r:.80}")
            self._classes[full_name(cls)] = cls

    def find(self, name: Any) -> type | None:
        """Return the class of a full name, if the reader knows one."""
        if type(name) is not str:
            raise ValueError("the name of a class is expected")
        return self._classes.get(name)


def declared_safe() -> list[type]:
    """Return the classes that the process has declared safe for files to name, for ``torch.load``."""
    return [cls for cls in torch.serialization.get_safe_globals() if isinstance(cls, type)]


def make_enum(cls: type | None, form: Mapping[str, Any], children: Sequence[Any]) -> Any:
    """Make a member of an enumeration."""
    (value,) = children
    name = form["name"]
    if cls is None:
        return PlainObject(form["type"], "enum", {"name": name, "value": value})
    if not issubclass(cls, enum.Enum):
        raise _unfit(cls, "is not an Enum")
    if name is not None and name in cls.__members__:
        member = cls[name]
        # By name and by value: a member that was renumbered since may mean something else now.
        if member.value != value:
            raise _unfit(cls, f"has the value {member.value!r:.80} for {name}, and the checkpoint {value!r:.80}")
        return member
    try:
        return cls(value)
    except ValueError:
        raise _unfit(cls, f"has no member {name or ''} of the value {value!r:.80}") from None


def make_namedtuple(cls: type | None, form: Mapping[str, Any], children: Sequence[Any]) -> Any:
    """Make a named tuple. Its own ``__new__`` is not called."""
    names = form["fields"]
    if len(names) != len(children) or not all(type(name) is str for name in names):
        raise ValueError("a named tuple has other fields than names")
    if cls is None:
        return PlainObject(form["type"], "namedtuple", dict(zip(names, children, strict=True)))
    if not issubclass(cls, tuple) or getattr(cls, "_fields", None) != tuple(names):
        raise _unfit(cls, f"does not have the fields {', '.join(names)[:80]}")
    return tuple.__new__(cls, children)


def make_object(cls: type | None, form: Mapping[str, Any]) -> Any:
    """Make an object whose attributes follow. Nothing of its class is called."""
    if form["of"] not in ("dataclass", "attributes"):
        raise ValueError("the parts of an object are missing")
    if cls is None:
        return PlainObject(form["type"], form["of"], {})
    if not has_plain_layout(cls):
        raise _unfit(cls, "is not made of attributes alone")
    return object.__new__(cls)


def set_attributes(made: Any, attributes: Mapping[str, Any]) -> None:
    """Give an object from :func:`make_object` its attributes, without calling anything of its class.

    Raises:
        CheckpointError: If its class has fields that the checkpoint lacks, or no room for what it has.
    """
    cls = type(made)
    if cls is PlainObject:
        (made.fields["attributes"] if made.kind == "tensor" else made.fields).update(attributes)
        return
    slots = set(slots_of(cls))
    others = getattr(made, "__dict__", None)
    for name, value in attributes.items():
        # As pickle does it: the class's own __setattr__ may refuse (a frozen dataclass) or do something else.
        if name in slots:
            object.__setattr__(made, name, value)
        elif others is not None:
            others[name] = value
        else:
            raise _unfit(cls, f"has no attribute {shown(name)}")
    # Fields that were added to the class since the save.
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        if field.name in attributes or hasattr(made, field.name):
            continue
        if field.default_factory is not dataclasses.MISSING:
            object.__setattr__(made, field.name, field.default_factory())
        elif field.default is not dataclasses.MISSING:
            object.__setattr__(made, field.name, field.default)
        else:
            raise _unfit(cls, f"has a field {shown(field.name)} without a default, which the checkpoint lacks")


def make_registered(
    unflatten: Callable[[list[Any], Any], Any] | None, form: Mapping[str, Any], children: Sequence[Any]
) -> Any:
    """Make an object of a registered class."""
    context, *others = children
    if unflatten is None:
        fields = {"children": others, "context": context} | ({"as": form["as"]} if "as" in form else {})
        return PlainObject(form["type"], "registered", fields)
    return unflatten(others, context)


def make_wrapper(cls: Any, form: Mapping[str, Any], children: Sequence[Any]) -> Any:
    """Make a tensor that wraps others."""
    context, shape, *tensors = children
    inner = dict(zip(form["inner"], tensors, strict=True))
    if cls is None:
        return PlainObject(form["type"], "wrapper", {"inner": inner, "context": context, "shape": shape})
    if not issubclass(cls, torch.Tensor) or not hasattr(cls, "__tensor_unflatten__"):
        raise _unfit(cls, "is not a tensor with __tensor_unflatten__")
    size, stride = shape
    return cls.__tensor_unflatten__(inner, context, torch.Size(size), tuple(stride))


def make_subclass(cls: Any, form: Mapping[str, Any], children: Sequence[Any]) -> Any:
    """Make a tensor of a subclass over the memory of a plain one. Nothing of its class is called."""
    (data,) = children
    if type(data) is not torch.Tensor:
        raise ValueError("a tensor of a subclass has no memory")
    if cls is None:
        return PlainObject(form["type"], "tensor", {"data": data, "attributes": {}})
    if not issubclass(cls, torch.Tensor):
        raise _unfit(cls, "is not a Tensor")
    with _private.without_torch_function():
        return data.as_subclass(cls)


def _unfit(cls: type, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the class {full_name(cls)} {reason}.",
        remedy=f"Leave it out of classes= to get a PlainObject, and make the {cls.__name__} from its fields.",
    )
