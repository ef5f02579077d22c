"""Checkpoints that were changed with knowledge of the format, with every digest right again.

Whatever is changed, a reader returns a tree or raises CheckpointCorruptError, within limits of time and memory, and
its message is short. Each case follows from a seed and its number alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import io
import json
import random
import resource
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import xxhash

import aiostage
from aiostage import CheckpointCorruptError, CheckpointMismatchError, HostMemoryError
from aiostage.checkpoint.verify import outline_of, verify
from aiostage.cli.checking import check
from aiostage.cli.finding import place_of
from aiostage.cli.inspect import inspect
from aiostage.cli.output import Output
from aiostage.storage import locate

__all__ = ["main"]

SECONDS = 10.0
"""For one reader of one case, on a machine that does other things too."""

MEMORY = 1 << 30
"""How much the process may grow over all cases."""

SHOWN = 5
LONGEST_MESSAGE = 2048
ALLOWED = (CheckpointCorruptError, CheckpointMismatchError, HostMemoryError)

NUMBERS: list[Any] = [
    0, 1, -1, 2, 7, 255, 4096, 1 << 31, 1 << 53, (1 << 53) + 1, 1 << 61, (1 << 61) - 1, 1 << 63, 1 << 64, 10**400,
    1.5, 1e308, True, False, None,
]  # fmt: skip
TEXTS = [
    "", "a", "a\0b", "\ud800", "x" * 300, "x" * 20_000, "..", "/", "../a", ".", "\x1b[2J", "a.b", "0", "-1", "f" * 5000,
    "float32", "F32", "int64", "sparse_coo", "compiler", "cuda:99", "0x1p-3", "1970-01-01", "UTC", "step-00000001",
    "model.safetensors", "manifest.json", "weight", "é",
]  # fmt: skip
KINDS = [
    "tensor", "dict", "list", "tuple", "set", "frozenset", "deque", "defaultdict", "OrderedDict", "Counter", "int",
    "float", "complex", "str", "bytes", "bytearray", "Size", "device", "torch", "numpy", "ndarray", "sparse",
    "sparse_compressed", "quantized", "more", "object", "enum", "namedtuple", "array", "path", "datetime", "Decimal",
    "Fraction", "nothing of ours", "registered", "wrapper", "subclass",
]  # fmt: skip


def tree() -> dict[Any, Any]:
    base = torch.arange(40, dtype=torch.float32)
    circle: list[Any] = []
    circle.append(circle)
    return {
        "tied": [base, base[3:7], base.view(4, 10).t()],
        "turned": torch.arange(6, dtype=torch.int16).view(2, 3).t(),
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "sparse": torch.eye(3).to_sparse(),
        "rows": torch.eye(3).to_sparse_csr(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "values": (None, 1 << 70, 0.5, 2j, b"bytes", {1: "one", (1, (2,)): 3}, {2, 3.5, (4,)}, frozenset({5})),
        "more": [torch.Size([1]), torch.device("cpu"), torch.float16, Path("a/b"), Fraction(1, 3), range(3), circle],
        "array": torch.ones(3).numpy(),
        "empty": [[], {}, (), set(), torch.empty(0, 3)],
    }


class Case:
    """A checkpoint in memory: its manifest as JSON, and its files."""

    def __init__(self, directory: Path) -> None:
        self.manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_bytes())
        self.files = {
            file.name: bytearray(file.read_bytes()) for file in directory.iterdir() if file.name != "manifest.json"
        }

    def write(self, directory: Path) -> None:
        """Write it with every size and digest right, unless a change has made them something else."""
        for name, data in self.files.items():
            (directory / name).write_bytes(data)
        about = {key: value for key, value in self.manifest.items() if key not in ("files", "nodes", "digest")}
        records = self.manifest["files"] if isinstance(self.manifest.get("files"), list) else ["none"]
        nodes = self.manifest["nodes"] if isinstance(self.manifest.get("nodes"), list) else ["none"]
        for record in records:
            if isinstance(record, dict) and isinstance(record.get("name"), str) and record["name"] in self.files:
                data = self.files[record["name"]]
                if "forged" not in record:
                    record["nbytes"], record["digests"] = len(data), [xxhash.xxh3_64_hexdigest(data)]
        text = dump(about)[:-1] + ',\n"files":[\n' + ",\n".join(map(dump, records))
        text += '\n],"nodes":[\n' + ",\n".join(map(dump, nodes)) + "\n"
        encoded = text.encode("utf-8", "surrogatepass")
        (directory / "manifest.json").write_bytes(
            encoded + b'],"digest":"%s"}\n' % xxhash.xxh3_64_hexdigest(encoded).encode()
        )


def dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Iterate over all that a JSON value contains, as containers and keys."""
    pending = [value]
    while pending:
        at = pending.pop()
        keys: list[Any] = list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []
        for key in keys:
            yield at, key
            pending.append(at[key])


def other_value(chance: random.Random, value: Any, nodes: int) -> Any:
    """Return a value to stand for another: near it, or of another kind."""
    choice = chance.randrange(10)
    if choice == 0 and isinstance(value, int) and not isinstance(value, bool):
        return value + chance.choice([-1, 1, 1 << 20])
    if choice <= 2:
        return chance.choice(NUMBERS)
    if choice <= 4:
        return chance.choice(TEXTS)
    if choice == 5:
        return [chance.randrange(-1, nodes + 2)]
    if choice == 6:
        return [copy.deepcopy(value)] * chance.choice([0, 1, 2, 70])
    if choice == 7:
        return chance.choice(KINDS)
    if choice == 8:
        return {"a": copy.deepcopy(value)}
    return chance.choice([[], {}, [[]], [[0]], [NUMBERS[chance.randrange(15)]] * 3])


def change_value(chance: random.Random, case: Case) -> None:
    what = chance.choice([case.manifest["nodes"], case.manifest["nodes"], case.manifest])
    found = list(places(what))
    container, key = chance.choice(found)
    container[key] = other_value(chance, container[key], len(case.manifest["nodes"]))


def change_kind(chance: random.Random, case: Case) -> None:
    node = chance.choice(case.manifest["nodes"])
    if isinstance(node, dict):
        node["is"] = chance.choice(KINDS)


def change_members(chance: random.Random, case: Case) -> None:
    """Take a member away, or give one of another node."""
    nodes = [node for node in case.manifest["nodes"] if isinstance(node, dict) and node]
    if nodes:
        node, other = chance.choice(nodes), chance.choice(nodes)
        if chance.random() < 0.4:
            del node[chance.choice(list(node))]
        else:
            key = chance.choice(list(other))
            node[key] = copy.deepcopy(other[key])


def change_order(chance: random.Random, case: Case) -> None:
    nodes = case.manifest["nodes"]
    one, two = chance.randrange(len(nodes)), chance.randrange(len(nodes))
    choice = chance.randrange(3)
    if choice == 0:
        nodes[one], nodes[two] = nodes[two], nodes[one]
    elif choice == 1:
        nodes.insert(one, copy.deepcopy(nodes[two]))
    else:
        del nodes[one]
    if not nodes:
        nodes.append({"root": 1})


def add_bomb(chance: random.Random, case: Case) -> None:
    """Add nodes that describe more than they are, in a container that hashes it, as the root or beside it."""
    nodes = case.manifest["nodes"]
    root = nodes.pop()
    first = len(nodes)
    nodes.append({"is": "tuple"})
    depth = chance.choice([10, 60, 3000])
    for index in range(first, first + depth):
        nodes.append({"is": chance.choice(["tuple", "frozenset"]), "of": [[index]] * chance.choice([1, 2])})
    nodes.append({"is": chance.choice(["set", "frozenset", "list"]), "of": [[len(nodes) - 1]]})
    nodes.append({"root": [len(nodes) - 1]} if chance.random() < 0.7 else root)


def change_header(chance: random.Random, case: Case) -> None:
    names = [name for name in case.files if name.endswith(".safetensors")]
    data = case.files[chance.choice(names)]
    length = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8 : 8 + length]))
    found = list(places(header))
    container, key = chance.choice(found)
    if chance.random() < 0.2 and isinstance(container, dict):
        container[chance.choice(TEXTS)] = container.pop(key)
    else:
        container[key] = other_value(chance, container[key], 3)
    text = dump(header).encode()
    text = text.ljust(-(-len(text) // 4096) * 4096 - 8)
    data[: 8 + length] = len(text).to_bytes(8, "little") + text


def change_bytes(chance: random.Random, case: Case) -> None:
    data = case.files[chance.choice(list(case.files))]
    for _ in range(chance.choice([1, 1, 8])):
        data[chance.randrange(len(data))] = chance.randrange(256)
    if chance.random() < 0.2:
        del data[chance.randrange(len(data)) :]


def change_record(chance: random.Random, case: Case) -> None:
    """Say something else of a file than is so."""
    record = chance.choice(case.manifest["files"])
    if isinstance(record, dict) and record:
        key = chance.choice(list(record))
        record[key] = other_value(chance, record[key], 3)
        record["forged"] = 1


CHANGES: list[Callable[[random.Random, Case], None]] = [
    change_value, change_value, change_value, change_kind, change_members, change_order, add_bomb, change_header,
    change_header, change_bytes, change_record,
]  # fmt: skip


async def read_all(directory: Path, chance: random.Random) -> list[str]:
    """Give a case to every reader; return what each of them said."""
    live = {"tied": [torch.zeros(40)], "values": (1, 2)}
    readers: list[Callable[[], Any]] = [
        lambda: aiostage.load(directory),
        lambda: aiostage.load(directory, verify=False),
        lambda: aiostage.load(directory, device="meta"),
        lambda: aiostage.load(directory, into=copy.deepcopy(live)),
        lambda: aiostage.load(directory, into=copy.deepcopy(live), in_place=True),
        lambda: aiostage.load(directory, only=["tied.*", "values"]),
        lambda: verify(directory),
        lambda: outline_of(directory),
        lambda: lines(directory),
        lambda: all_damage(directory),
    ]
    said = []
    # The first always; the others by turns would take too long for all of them each time.
    for reader in [readers[0], *chance.sample(readers[1:], 2)]:
        begin = perf_counter()
        try:
            await reader()
            said.append("read")
        except ALLOWED as error:
            if len(str(error)) > LONGEST_MESSAGE + len(str(directory)):
                raise AssertionError(f"a message of {len(str(error))} characters") from error
            said.append(type(error).__name__)
        except ValueError as error:
            # only= and device= say so of what can be right and not be had.
            if not str(error).startswith(("only=", "device")) and "meta" not in str(error):
                raise
            said.append("refused")
        if perf_counter() - begin > SECONDS:
            raise AssertionError(f"{perf_counter() - begin:.1f} s")
    return said


async def lines(directory: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        await inspect(str(directory), Output(as_json=False))
    assert all(line.isprintable() for line in shown.getvalue().split("\n"))


async def all_damage(directory: Path) -> None:
    """What is read is whole for verify, which stops, and for the command, which goes on."""
    found = await check(await place_of(str(directory), *locate(directory)))
    try:
        await verify(directory)
    except ALLOWED:
        assert found.damage
        raise
    assert not found.damage


async def whole(directory: Path) -> Case:
    await aiostage.save(tree(), directory)
    return Case(directory)


def main(n: int, seed: int) -> int:
    """Run cases, and print those whose reader broke a limit or raised something else, with seed and number.

    Args:
        n: How many.
        seed: From which they follow.

    Returns:
        How many failed.
    """
    return run(n, seed)[1]


def run(n: int, seed: int) -> tuple[dict[str, int], int]:
    """Do as :func:`main` does; return how often readers said what, and how many cases failed."""
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as parent, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        original = asyncio.run(whole(Path(parent) / "whole"))

        async def cases() -> int:
            failed = 0
            for number in range(n):
                directory = Path(parent) / "case"
                write_case(original, seed, number, directory)
                before = peak_bytes()
                try:
                    for said in await read_all(directory, random.Random(f"{seed} {number} readers")):
                        counts[said] = counts.get(said, 0) + 1
                    grown = peak_bytes() - before
                    assert grown < MEMORY, f"the process has grown by {grown >> 20} MiB"
                except Exception as error:
                    failed += 1
                    print(f"checkpoints: seed {seed}, case {number}: {type(error).__name__}: {str(error)[:300]}")
                    if failed <= SHOWN:
                        traceback.print_exception(error)
                finally:
                    shutil.rmtree(directory)
            return failed

        failed = asyncio.run(cases())
    print(f"checkpoints: seed {seed}, {n} cases, {failed} failed, {dict(sorted(counts.items()))}")
    return counts, failed


def write_case(original: Case, seed: int, number: int, directory: Path) -> None:
    """Write one case to a directory that is not there."""
    case, chance = copy.deepcopy(original), random.Random(f"{seed} {number}")
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        # A change may find nothing to change any more.
        with contextlib.suppress(LookupError, TypeError, AttributeError, ValueError):
            chance.choice(CHANGES)(chance, case)
    directory.mkdir()
    case.write(directory)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
