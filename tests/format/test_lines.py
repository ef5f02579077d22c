from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiostage.format.lines import lines_of, parse_line

MIB = 1 << 20

values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(1 << 60), 1 << 60),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=60),
        st.text(st.sampled_from('"\\\n\u00e9\U0001f600\ud83d\udc00abc'), max_size=40),
    ),
    lambda children: st.one_of(
        st.lists(children, max_size=6), st.dictionaries(st.text(max_size=8), children, max_size=4)
    ),
    max_leaves=30,
)


@given(
    lines=st.lists(st.binary(max_size=100).map(lambda line: line.replace(b"\n", b"")), max_size=20),
    blank=st.integers(0, 200_000),
    end=st.sampled_from([b"", b"\n", b"\n\n\n"]),
)
def test_lines_of_any_length(lines: list[bytes], blank: int, end: bytes) -> None:
    lines = [*lines, b"x" * blank, *lines]
    assert list(lines_of(memoryview(b"\n".join(lines) + end))) == [line for line in lines if line]


@given(value=values)
def test_any_value(value: Any) -> None:
    assert json.dumps(parse_line(json.dumps(value).encode())) == json.dumps(value)


@pytest.mark.parametrize(
    "text",
    [
        b'{"is":"str","value":"' + b"a\\u00e9\\ud83d\\ude00" * (8 * MIB // 19) + b'"}',
        b'{"is":"str","value":"' + b"[1,2],{" * MIB + b'\\""}',
        b'{"digests":[' + b",".join([b'"0123456789abcdef"'] * (8 * MIB // 19)) + b"]}",
        b'{"a":[' + b",".join([b'"[1],[2]"'] * 5000) + b"]}",
    ],
    ids=["string", "marks in a string", "digests", "strings with marks"],
)
def test_long_lines_of_few_values(text: bytes) -> None:
    assert parse_line(text) == json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        b"[" + b"[0]," * (4 * MIB) + b"0]",
        b"[" + b"1," * (4 * MIB) + b"1]",
        b"[" + b'"ab",' * (4 * MIB) + b"1]",
        b"[" + b"{}," * (4 * MIB) + b"1]",
        b"[" * MIB,
    ],
    ids=["lists", "numbers", "texts", "objects", "depth"],
)
def test_long_lines_of_many_values_are_not_parsed(text: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(ValueError, match="consists of more than"):
        parse_line(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * len(text) + MIB


@pytest.mark.parametrize(
    "text",
    [b'{"a":1,"a":2}', b"[NaN]", b"[Infinity]", b"9" * 5000, b'"\xff"', b"{} {}", b"", b"[1", b'{"a"}'],
)
def test_what_is_no_value_is_an_error(text: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json's own has as many texts as there are mistakes
        parse_line(text)


@pytest.mark.parametrize("name", ["", "model.weight", "\u00e9\U0001f600\x7f", 'a"b', "a\\b", "a\x01", "a\n", "\ud800"])
def test_the_line_of_a_tensor(name: str) -> None:
    line = json.dumps({"is": "tensor", "name": name}, separators=(",", ":"))
    assert parse_line(line.encode()) == {"is": "tensor", "name": name}
    unescaped = f'{{"is":"tensor","name":"{name}"}}'.encode("utf-8", "surrogatepass")
    try:
        expected = json.loads(unescaped.decode())
    except ValueError as error:
        with pytest.raises(type(error)):
            parse_line(unescaped)
    else:
        assert parse_line(unescaped) == expected
