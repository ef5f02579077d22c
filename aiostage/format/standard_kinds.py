"""Kinds of the standard library, which come back as themselves."""

from __future__ import annotations

import pathlib
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from io import BytesIO
from random import Random
from types import SimpleNamespace
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import torch

from aiostage.errors import shown
from aiostage.format.kinds import Kind, NotCarried, Parts

__all__ = ["STANDARD_KINDS", "read_zones"]

_MAX_FRACTION_BITS = 1 << 16
"""A guess. Reducing a fraction takes time that grows with the square of its size."""

_PATHS: dict[str, type[pathlib.PurePath]] = {
    "PurePosixPath": pathlib.PurePosixPath,
    "PureWindowsPath": pathlib.PureWindowsPath,
    "PosixPath": pathlib.PosixPath,
    "WindowsPath": pathlib.WindowsPath,
}


def _path(name: str) -> Kind:
    def rebuild(form: Mapping[str, Any], children: Sequence[Any]) -> pathlib.PurePath:
        text = _only(children, str)
        cls = _PATHS[name]
        if issubclass(cls, pathlib.Path) and cls is not type(pathlib.Path()):
            # Only the pure path can be made on another system: pathlib refuses a WindowsPath on POSIX.
            cls = _PATHS[f"Pure{name}"]
        return cls(text)

    return Kind(name, (_PATHS[name],), lambda path: Parts(children={"text": str(path)}), rebuild)


def _only(children: Sequence[Any], cls: type) -> Any:
    """Return the one child that there has to be, of a class."""
    (child,) = children
    if type(child) is not cls:
        raise ValueError(f"there is a {type(child).__name__} in place of a {cls.__name__}")
    return child


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError("a text is expected")
    return value


def _integers(values: Sequence[Any], count: int) -> Sequence[int]:
    if len(values) != count or not all(type(value) is int for value in values):
        raise ValueError(f"{count} integers are expected")
    return values


def _take_datetime_apart(value: datetime) -> Parts:
    numbers = [value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond]
    return Parts({"value": [*numbers, value.fold]}, {"tzinfo": value.tzinfo})


def _rebuild_datetime(form: Mapping[str, Any], children: Sequence[Any]) -> datetime:
    *numbers, fold = _integers(form["value"], 8)
    return datetime(*numbers, tzinfo=_zone(children), fold=fold)  # type: ignore[misc,arg-type]


def _take_time_apart(value: time) -> Parts:
    numbers = [value.hour, value.minute, value.second, value.microsecond]
    return Parts({"value": [*numbers, value.fold]}, {"tzinfo": value.tzinfo})


def _rebuild_time(form: Mapping[str, Any], children: Sequence[Any]) -> time:
    *numbers, fold = _integers(form["value"], 5)
    return time(*numbers, tzinfo=_zone(children), fold=fold)  # type: ignore[misc,arg-type]


def _zone(children: Sequence[Any]) -> Any:
    (zone,) = children
    if zone is not None and type(zone) not in (timezone, ZoneInfo):
        raise ValueError("a time zone is expected")
    return zone


def _take_timezone_apart(value: timezone) -> Parts:
    # A name that was not given is not carried: tzname() computes one from the offset, and a zone that is made with that
    # name would be pickled and printed differently.
    offset = value.utcoffset(None)
    name = value.tzname(None)
    return Parts(children={"offset": offset, "name": None if name == timezone(offset).tzname(None) else name})


def _rebuild_timezone(form: Mapping[str, Any], children: Sequence[Any]) -> timezone:
    offset, name = children
    if type(offset) is not timedelta or not (name is None or type(name) is str):
        raise ValueError("an offset and a name are expected")
    return timezone(offset) if name is None else timezone(offset, name)


def _take_zone_apart(value: ZoneInfo) -> Parts:
    if value.key is None:
        raise NotCarried("a ZoneInfo that was read from a file has no key", "Make it with ZoneInfo(key).")
    return Parts({"key": value.key})


def read_zones(forms: Iterable[Mapping[str, Any]]) -> None:
    """Read the time zones that nodes need from the system's files, so that making them later does not block. Blocks.

    Raises:
        ValueError: If there is no such zone.
    """
    for form in forms:
        if form["is"] == "ZoneInfo":
            try:
                _rebuild_zone(form, ())
            except (LookupError, OSError) as error:
                raise ValueError(f"the system has no time zone {shown(form['key'])}") from error


def _rebuild_zone(form: Mapping[str, Any], children: Sequence[Any]) -> ZoneInfo:
    # The key becomes the path of a file. ZoneInfo refuses keys that lead out of its directories.
    if type(form["key"]) is not str or not form["key"].isascii() or len(form["key"]) > 100:
        raise ValueError("the key of a time zone is expected")
    return ZoneInfo(form["key"])


def _take_fraction_apart(value: Fraction) -> Parts:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_FRACTION_BITS:
        raise NotCarried(
            f"a Fraction of more than {_MAX_FRACTION_BITS} bits cannot be carried",
            "Put its numerator and denominator into the state dict.",
        )
    return Parts(children={"numerator": value.numerator, "denominator": value.denominator})


def _rebuild_fraction(form: Mapping[str, Any], children: Sequence[Any]) -> Fraction:
    numerator, denominator = _integers(children, 2)
    if max(numerator.bit_length(), denominator.bit_length()) > _MAX_FRACTION_BITS:
        raise ValueError(f"a Fraction has more than {_MAX_FRACTION_BITS} bits")
    return Fraction(numerator, denominator)


def _rebuild_slice(form: Mapping[str, Any], children: Sequence[Any]) -> slice:
    start, stop, step = children
    return slice(start, stop, step)


def _take_buffer_apart(value: BytesIO) -> Parts:
    # As a tensor, so that its bytes go to a safetensors file and not into the manifest.
    if value.closed:
        raise NotCarried("a BytesIO that was closed has no contents", "Put its getvalue() into the state dict.")
    contents = torch.frombuffer(bytearray(value.getvalue()), dtype=torch.uint8) if value.getbuffer().nbytes else None
    data = contents if contents is not None else torch.empty(0, dtype=torch.uint8, device="cpu")
    return Parts({"position": value.tell()}, {"data": data}, dict(vars(value)))


def _rebuild_buffer(form: Mapping[str, Any], children: Sequence[Any]) -> BytesIO:
    data = _only(children, torch.Tensor)
    (position,) = _integers([form["position"]], 1)
    buffer = BytesIO(data.numpy().tobytes())
    buffer.seek(position)
    return buffer


def _rebuild_random(form: Mapping[str, Any], children: Sequence[Any]) -> Random:
    made = Random()
    # It checks the length of the state and the position in it.
    made.setstate(_only(children, tuple))
    return made


STANDARD_KINDS: tuple[Kind, ...] = (
    *map(_path, _PATHS),
    Kind("datetime", (datetime,), _take_datetime_apart, _rebuild_datetime),
    Kind(
        "date",
        (date,),
        lambda value: Parts({"value": [value.year, value.month, value.day]}),
        lambda form, children: date(*_integers(form["value"], 3)),
    ),
    Kind("time", (time,), _take_time_apart, _rebuild_time),
    Kind(
        "timedelta",
        (timedelta,),
        lambda value: Parts({"value": [value.days, value.seconds, value.microseconds]}),
        lambda form, children: timedelta(*_integers(form["value"], 3)),
    ),
    Kind("timezone", (timezone,), _take_timezone_apart, _rebuild_timezone),
    Kind("ZoneInfo", (ZoneInfo,), _take_zone_apart, _rebuild_zone),
    Kind("UUID", (UUID,), lambda value: Parts({"value": value.hex}), lambda form, children: UUID(hex=form["value"])),
    Kind(
        "Decimal",
        (Decimal,),
        lambda value: Parts({"value": str(value)}),
        lambda form, children: Decimal(_text(form["value"])),
    ),
    Kind("Fraction", (Fraction,), _take_fraction_apart, _rebuild_fraction),
    Kind(
        "range",
        (range,),
        lambda value: Parts(children={"start": value.start, "stop": value.stop, "step": value.step}),
        lambda form, children: range(*_integers(children, 3)),
    ),
    Kind(
        "slice",
        (slice,),
        lambda value: Parts(children={"start": value.start, "stop": value.stop, "step": value.step}),
        _rebuild_slice,
    ),
    Kind("Namespace", (Namespace,), lambda value: Parts(attributes=vars(value)), lambda form, children: Namespace()),
    Kind(
        "SimpleNamespace",
        (SimpleNamespace,),
        lambda value: Parts(attributes=vars(value)),
        lambda form, children: SimpleNamespace(),
    ),
    Kind("BytesIO", (BytesIO,), _take_buffer_apart, _rebuild_buffer),
    Kind("Random", (Random,), lambda value: Parts(children={"state": value.getstate()}), _rebuild_random),
)
