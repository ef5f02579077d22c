"""Saves to a local disk and to S3, beside what others need for the same, and beside the disk and the server themselves.

    make bench-pipeline
    python benchmarks/pipeline.py --quick --json figures.json --directory /fast/disk

Every way runs in a process of its own, one after the other: a few saves of the same state dict, each next to a raw
write of as many bytes, so that a slow moment counts for both. Figures are medians of all saves but the first, which
pays for cold memory; the loop's worst delay is the worst of them all.

disk: The raw write is that of warm memory: two threads, direct I/O, parts of 8 MiB, fsync.
server: SeaweedFS, on the same machine, and slower than any client by far, so less is saved to it. The raw write is
    obstore's put of one buffer, 16 MiB a request, four at once. torch.save and torch_checkpointing write to the disk
    first, and the files are uploaded with the same client; dcp.async_save writes through fsspec and s3fs; torchsnapshot
    has a writer for S3 of its own.
sink: A server that takes everything and keeps nothing, so that clients are compared and not servers. It knows too
    little of S3 for others than obstore. Beside it is obstore's writer, whose uploads can be aborted, as those of its
    put cannot.
plain threads: What every save has to do, and nothing else: two threads copy into warm memory, a third computes digests,
    and the parts are written as they come: to the disk by two threads, to a server with obstore's writer. Nothing is
    walked, checked, planned or committed. It shows what a target costs at the least.
overlap: Whether staging and writing take no longer than the slower of the two.
changed: Incremental saves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import changed
import overlap
import saves
from places import serving
from report import Check, machine
from savers import RIVALS
from saves import Saves, in_own_process

GIB = 2**30
_UNIT = 64 * 2**20
"""Sizes are multiples of this, so that every way of cutting them comes out even."""

_OURS, _LESS_MEMORY, _STORAGE = "aiostage", "aiostage, a quarter of the memory", "its storage alone"
_WRITER, _THREADS = "obstore's writer alone", "plain threads"


@dataclass
class Bench:
    """What was asked for, and what was found.

    Attributes:
        gib: Size of a state dict.
        server_gib: The same for the server.
        count: Saves in each way.
        rounds: Of what is measured in turns.
        directory: On the disk to measure.
        checks: Figures beside their targets.
    """

    gib: float
    server_gib: float
    count: int
    rounds: int
    directory: str
    checks: list[Check] = field(default_factory=list)

    def disk(self) -> Iterator[Saves]:
        """Save to the disk."""
        found = {}
        for way in [_OURS, _THREADS, _LESS_MEMORY, *RIVALS]:
            yield self._saved(found, "disk", way, self.gib, self.count)
        self.checks.append(Check("disk: aiostage / the raw write", found[_OURS].ratio, 1.10))
        self._check_floor(found)
        self._check_capture(found)

    def server(self) -> Iterator[Saves]:
        """Save to a real server."""
        found = {}
        for way in [_OURS, _THREADS, _STORAGE, *RIVALS]:
            yield self._saved(found, "S3 server", way, self.server_gib, self.count)
        self.checks.append(Check("S3 server: aiostage / the raw put", found[_OURS].ratio, 1.10))
        self._check_floor(found)
        self._check_capture(found)

    def sink(self) -> Iterator[Saves]:
        """Save to a server that is never in the way."""
        for place in ("S3 sink, signed", "S3 sink, unsigned"):
            found = {}
            for way in (_OURS, _THREADS, _STORAGE, _WRITER):
                # Quick, and from one time to the next very different.
                yield self._saved(found, place, way, self.gib / 2, 2 * self.count)
            self.checks.append(Check(f"{place}: aiostage / the raw put", found[_OURS].ratio, 1.10))
            self._check_floor(found)
            # The put leaves its parts behind when it is cancelled; this is the least for what can be aborted.
            least = found[_STORAGE].median("committed") / found[_WRITER].median("committed")
            self.checks.append(Check(f"{place}: its storage alone / obstore's writer alone", least, 1.10))

    def overlap(self) -> list[overlap.Overlap]:
        """Stage and write at once."""
        found = asyncio.run(overlap.overlaps(_size(self.gib), self.rounds))
        self.checks += [check for each in found for check in each.checks()]
        return found

    def changed(self) -> list[changed.Changed]:
        """Save incrementally."""
        with tempfile.TemporaryDirectory(dir=self.directory) as directory:
            found = asyncio.run(changed.incremental_saves(_size(self.gib), self.rounds, directory))
        self.checks += [each.check() for each in found if each.what != changed.FULL]
        return found

    def _saved(self, found: dict[str, Saves], place: str, way: str, gib: float, count: int) -> Saves:
        with serving(place) as environment:
            made = in_own_process(way, place, _size(gib), count, directory=self.directory, environment=environment)
        found[way] = made
        if way in (_OURS, _LESS_MEMORY) and not made.failure:
            self.checks.append(Check(f"{place}: {way}, the loop's worst delay, ms", 1e3 * made.worst("worst"), 5))
        return made

    def _check_floor(self, found: dict[str, Saves]) -> None:
        """Compare with what every save has to do, by plain threads."""
        ours, floor = found[_OURS], found[_THREADS]
        if ours.failure or floor.failure:
            return
        place = ours.place
        ratio = ours.ratio / floor.ratio
        self.checks.append(Check(f"{place}: aiostage / plain threads, both by the raw write beside", ratio, 1.10))
        captured = ours.median("captured") / floor.median("captured")
        self.checks.append(Check(f"{place}: aiostage has captured / plain threads have", captured, 1.25))
        worst = ours.worst("worst") / floor.worst("worst")
        self.checks.append(Check(f"{place}: the loop's worst delay, aiostage / plain threads", worst, 1.25))

    def _check_capture(self, found: dict[str, Saves]) -> None:
        """Compare when the trainer may go on, in later saves."""
        ours = found[_OURS].median("captured")
        what = f"{found[_OURS].place}: aiostage has captured / a copy into warm memory, the lower limit"
        self.checks.append(Check(what, ours / found[_OURS].median("copy"), 1.25))
        for way in RIVALS:
            if not found[way].failure:
                what = f"{found[way].place}: {way} gives control back / aiostage has captured"
                self.checks.append(Check(what, found[way].median("captured") / ours, 2, at_least=True))


SECTIONS: dict[str, tuple[str, Callable[[Bench], Any]]] = {
    "disk": (saves.HEAD, Bench.disk),
    "server": (saves.HEAD, Bench.server),
    "sink": (saves.HEAD, Bench.sink),
    "overlap": (overlap.HEAD, Bench.overlap),
    "changed": (changed.HEAD, Bench.changed),
}


def _size(gib: float) -> int:
    return max(int(gib * GIB) // _UNIT * _UNIT, _UNIT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which, separated by commas")
    parser.add_argument("--gib", type=float, default=2, help="size of a state dict")
    parser.add_argument("--server-gib", type=float, default=0.25, help="the same for the real server")
    parser.add_argument("--saves", type=int, default=3, help="how many in each way")
    parser.add_argument("--rounds", type=int, default=3, help="of what is measured in turns")
    parser.add_argument("--quick", action="store_true", help="an eighth of the bytes, to see that it works")
    parser.add_argument("--directory", help="on the disk to measure", default=".")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    share = 8 if options.quick else 1
    bench = Bench(options.gib / share, options.server_gib / share, options.saves, options.rounds, options.directory)
    begin = perf_counter()
    figures: dict[str, list[Any]] = {}
    print(f"{machine()}; {bench.gib} GiB, to the server {bench.server_gib} GiB")
    head = ""
    for section in options.sections.split(","):
        if SECTIONS[section][0] != head:
            head = SECTIONS[section][0]
            print(f"\n{head}")
        figures[section] = []
        for row in SECTIONS[section][1](bench):
            print(row.as_row(), flush=True)
            figures[section].append(vars(row))
    print("\n| target | figure | limit | |\n| --- | ---: | ---: | --- |")
    for check in bench.checks:
        print(check.as_row())
    met = sum(check.met for check in bench.checks)
    print(f"\n{met} of {len(bench.checks)} targets met, {perf_counter() - begin:.0f} s")
    if options.json:
        checks = [check.as_json() for check in bench.checks]
        options.json.write_text(json.dumps({"machine": machine(), **figures, "checks": checks}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
