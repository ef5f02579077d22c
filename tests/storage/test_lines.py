from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiostage._loop.slices import exhausted
from aiostage.storage.lines import STEP_BYTES, Lines, parse

MIB = 1 << 20

values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(1 << 60), 1 << 60),
        st.floats(allow_nan=False),
        st.text(max_size=60),
        st.text(st.sampled_from('"\\\n\u00e9\U0001f600\ud83d\udc00abc'), max_size=40),
    ),
    lambda children: st.one_of(
        st.lists(children, max_size=6), st.dictionaries(st.text(max_size=8), children, max_size=4)
    ),
    max_leaves=30,
)


def counted(work: Any) -> tuple[Any, int]:
    """Run a generator to its end; return what it returns, and how often it has yielded."""
    count = 0
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value, count
        count += 1


def all_lines(text: bytes, step_bytes: int) -> list[bytes]:
    lines, found = Lines(memoryview(text), step_bytes), []
    while line := exhausted(lines.next()):
        found.append(bytes(line))
    return found


@given(
    lines=st.lists(st.binary(max_size=100).map(lambda line: line.replace(b"\n", b"")), max_size=20),
    step_bytes=st.integers(1, 64),
    end=st.sampled_from([b"", b"\n", b"\n\n\n"]),
)
def test_lines_of_any_length(lines: list[bytes], step_bytes: int, end: bytes) -> None:
    assert all_lines(b"\n".join(lines) + end, step_bytes) == [line for line in lines if line]


@given(value=values, step_bytes=st.integers(32, 80), spaces=st.booleans())
def test_any_value_in_pieces(value: Any, step_bytes: int, spaces: bool) -> None:
    text = json.dumps(value, separators=(" , ", " : ") if spaces else (",", ":")).encode()
    found = exhausted(parse(text, step_bytes))
    assert found == json.loads(text)
    assert json.dumps(found) == json.dumps(value)


@given(value=values, cut=st.integers(0, 200), more=st.sampled_from([b"", b"]", b",", b'"', b"}", b"0", b"\\", b"[1"]))
def test_what_is_no_value_is_an_error(value: Any, cut: int, more: bytes) -> None:
    text = json.dumps([value, "x" * 50], separators=(",", ":")).encode()
    text = text[: max(0, len(text) - cut)] + more
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError):  # noqa: PT011 - json's own has as many texts as there are mistakes
            exhausted(parse(text, 32))
    else:
        assert exhausted(parse(text, 32)) == expected


@pytest.mark.parametrize(
    "text",
    [
        b'{"is":"str","value":"' + b"a\\u00e9\\ud83d\\ude00" * (8 * MIB // 19) + b'"}',
        b'{"digests":[' + b",".join([b'"0123456789abcdef"'] * (8 * MIB // 19)) + b"]}",
        b'{"pieces":[' + b",".join([b"[1,2,3]"] * MIB) + b"]}",
        b"[" + b"1," * (4 * MIB) + b"1]",
    ],
    ids=["string", "strings", "lists", "numbers"],
)
def test_a_long_line_is_never_parsed_at_once(text: bytes) -> None:
    value, yields = counted(parse(text))
    assert value == json.loads(text)
    assert yields >= len(text) // STEP_BYTES
    lines = Lines(memoryview(b"first\n" + text + b"\nlast"))
    assert exhausted(lines.next()) == b"first"
    line, yields = counted(lines.next())
    assert isinstance(line, memoryview)
    assert line == text
    assert yields >= len(text) // STEP_BYTES - 1
    assert exhausted(lines.next()) == b"last"
    assert exhausted(lines.next()) == b""


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 100_000,
        b'"' + b"a" * 100_000,
        b'"' + b"a" * 100_000 + b'\\x"',
        b'"' + b"a" * 100_000 + b'\\ud8"',
        b" " * 100_000,
        b" " * 100_000 + b"1 1",
        b'{"a" ' + b" " * 100_000 + b"1}",
        b"{1" + b" " * 100_000 + b":1}",
        b'["' + b"a" * 100_000 + b'" 1]',
    ],
    ids=lambda text: text[:8].decode(),
)
def test_long_lines_that_are_no_values(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"at byte|levels deep|escape"):
        exhausted(parse(text))
