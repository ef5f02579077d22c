"""What compares two commits tells a difference from noise."""

from __future__ import annotations

import json
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.patience import seconds
from tests.warm import PYTHON

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
WAITS = "training waits"


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import compare

    return compare


def pairs(factor: float, noise: float, seed: int) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Return measurements of two commits on a machine that is slow now and then, as a whole."""
    chance = random.Random(seed)
    found = []
    for _ in range(15):
        machine = chance.choice([1.0, 1.0, 3.0])
        old, new = (machine * by * chance.uniform(1 - noise, 1 + noise) for by in (0.1, 0.1 * factor))
        found.append(({"time": old}, {"time": new}))
    return found


@pytest.mark.parametrize(("factor", "verdict"), [(1.15, "slower"), (0.85, "faster")])
def test_a_difference_larger_than_the_noise_is_found(compare: Any, factor: float, verdict: str):
    for seed in range(20):
        assert compare.row("stage", pairs(factor, 0.05, seed), "time")["verdict"] == verdict


def test_noise_alone_is_rarely_taken_for_a_difference(compare: Any):
    verdicts = [compare.row("stage", pairs(1.0, 0.3, seed), "time")["verdict"] for seed in range(60)]
    assert verdicts.count("the same") >= 50
    assert not all(low <= 1 <= high for low, high in [compare.interval([1.2, 1.21, 1.22, 1.25, 1.19])]), "the control"


@pytest.mark.parametrize("work", ["stage, warm", "save", "load"])
def test_one_commit_is_measured_in_a_process_of_its_own(compare: Any, work: str):
    script = (
        "import sys, asyncio, json; sys.path.insert(0, sys.argv[1]); import compare\n"
        "print(json.dumps(asyncio.run(compare.WORK[sys.argv[2]](compare.many_small(10)))))"
    )
    done = subprocess.run([*PYTHON, "-c", script, str(BENCHMARKS), work], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured.keys() == {"time", "CPU time", "worst delay"}
    assert measured["time"] > 0
    assert measured["CPU time"] > 0


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """A copy of what figures are put into."""
    for name in ("docs/performance.md", "docs/measurements.md", "benchmarks/figures/staging.json"):
        copy = tmp_path / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((BENCHMARKS.parent / name).read_bytes())
    return tmp_path


def staging_figures(seconds: float) -> dict[str, Any]:
    """Return figures as staging.py writes them."""

    def samples(seconds: float, failure: str = "") -> dict[str, Any]:
        found = [] if failure else [3 * seconds, seconds, 2 * seconds]
        return {"seconds": found, "delay_p99": 0.001, "delay_worst": 0.002, "timings": {}, "failure": failure}

    check = {"what": "aiostage / _foreach_copy_", "figure": 0.5, "limit": 1.1, "at_least": False, "met": True}
    kept = {"aiostage": samples(seconds), "_foreach_copy_": samples(2 * seconds)}
    failed = {"aiostage": samples(seconds), "DefaultStager, shared": samples(0, "too many files")}
    return {
        "machine": "a machine",
        "rows": [
            {"row": 1, "work": "large", "samples": kept, "checks": [check], "notes": []},
            {"row": 5, "work": "shared", "samples": failed, "checks": [], "notes": ["Too little memory."]},
        ],
    }


def test_figures_go_where_the_documents_show_them(
    documents: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import publish

    results = tmp_path_factory.mktemp("results")
    (results / "busy.md").write_text("## 2. steps\n\n| peer | step |\n| --- | ---: |\n| aiostage | 50 ms |\n")
    (results / "steps.md.part").write_text("not to its end")
    (results / "staging.md").write_text("the tables of staging are made from its figures")
    (results / "staging.json").write_text(json.dumps(staging_figures(0.123)))
    before = (documents / "docs" / "measurements.md").read_text()
    assert publish.publish(results, documents, "On a day.") == ["busy", "staging"]
    once = (documents / "docs" / "measurements.md").read_text()
    assert "On a day.\n\nRow 2. steps\n\n| peer | step |" in once
    assert "not to its end" not in once
    assert "| 1 | large | aiostage | 246 ms (123-369) | 1.0 | 2.0 |" in once
    assert '| | | DefaultStager, shared | fails: "too many files" | | |' in once
    assert "| 1 | aiostage / _foreach_copy_ | 0.5 | at most 1.1 | met |" in once
    short = (documents / "docs" / "performance.md").read_text()
    assert "| large | 246 ms |  |  | 492 ms |" in short
    assert "| shared |" not in short
    [row] = json.loads((documents / "benchmarks" / "figures" / "staging.json").read_text())["rows"]
    assert row["samples"]["aiostage"]["seconds"] == [0.123, 0.246, 0.369]
    # What comes before and after the marks stays, and a second time changes nothing.
    assert once.startswith(before.partition("<!-- staging -->")[0])
    publish.publish(results, documents, "On a day.")
    assert (documents / "docs" / "measurements.md").read_text() == once


def test_the_table_of_aims_says_what_the_measurements_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import aims
    import publish

    measurements, performance = (
        (BENCHMARKS.parent / "docs" / f"{name}.md").read_text() for name in ("measurements", "performance")
    )
    shown = aims.table(aims.aims(measurements))
    assert publish.replaced(performance, "aims", shown) == performance, "run benchmarks/publish.py"
    # A line for each, with a link that leads somewhere.
    links = re.findall(r"\(measurements\.md#(.+?)\)", shown)
    heads = [re.sub(r"[^a-z0-9 -]", "", head.lower()) for head in re.findall(r"^#+ (.+)$", measurements, re.MULTILINE)]
    assert len(links) == 10
    assert set(links) <= {head.replace(" ", "-") for head in heads}
    # A floor in the rows of stagings is one of the figures beside it.
    below = re.sub(
        r"(\| 3 \| aiostage, worst, ms \| .*\n)",
        r"\1| 3 | aiostage / slices, worst | 0.5 | at most 1.1 | met |\n",
        measurements,
    )
    [third] = [each for each in aims.delays(aims.Tables(below)).parts[1].figures if each.label == "3"]
    assert third.floor == 2 * third.value
    # A row that is no longer there is named, with what to do.
    with pytest.raises(ValueError, match=r"0 rows of in-place .*`preadv` alone.*change it there, too"):
        aims.aims(measurements.replace("/ `preadv` alone |", "/ something |"))
    with pytest.raises(ValueError, match="no table between <!-- ticks -->"):
        aims.aims(measurements.replace("<!-- ticks -->", ""))


def test_the_tables_of_many_ranks_say_what_the_measurements_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import publish
    import ranks

    measurements, scaling = (
        (BENCHMARKS.parent / "docs" / f"{name}.md").read_text() for name in ("measurements", "scaling")
    )
    shown = ranks.tables(measurements)
    for name, each in shown.items():
        assert publish.replaced(scaling, name, each) == scaling, "run benchmarks/publish.py"
    with pytest.raises(ValueError, match=r"0 rows of many ranks .* 'load / `dcp.load`, at most 1'"):
        ranks.tables(measurements.replace("load / `dcp.load`, at most 1", "load"))
    with pytest.raises(ValueError, match="when, or how often"):
        ranks.tables(measurements.replace("medians of", "of"))


def test_verdicts_on_aims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from aims import Aim, Figure, Span

    met, near, far = Figure("a", 1.0, 1.0), Figure("b", 2.1, 1.0, floor=2.0), Figure("c", 2.3, 1.0, floor=2.0)
    assert Aim("", "", [met]).judged() == "met"
    assert Aim("", "", [far]).judged() == "not met"
    assert Aim("", "", [met, near]).judged() == "at its floor"
    assert Aim("", "", [met, near, far]).judged() == "not met: 1 of 3, 1 at the floor"
    assert Aim("", "", [Span("all", [met, far])]).judged() == "not met: 1 of 2"
    assert Figure("d", 0.8, 0.9, floor=0.8, at_least=True).met is False
    rows = str(Aim("What", "Some section, here", [met, near, Span("all", [met, near, far])], "plain code")).splitlines()
    assert rows == [
        "| **[What](measurements.md#some-section-here)** |  | | plain code | not met: 1 of 5, 2 at the floor |",
        "| a | 1 | at most 1 |  | met |",
        "| b | **2.1** | at most 1 | 2 | at its floor |",
        "| all | **1 to 2.3** (missed: b, c) | at most 1 | 2 | not met: 1 of 3, 1 at the floor |",
    ]


def test_every_benchmark_has_its_place_in_the_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import everything
    import publish

    text = (BENCHMARKS.parent / "docs" / "measurements.md").read_text()
    for name, programs in everything.PROGRAMS.items():
        assert publish.replaced(text, name, "this") != text
        for script, *_ in programs:
            assert (BENCHMARKS / script).is_file()
    with pytest.raises(ValueError, match="expected one <!-- nothing -->"):
        publish.replaced(text, "nothing", "")


BUSY = """
import asyncio, busy
found = asyncio.run(busy.measure(0.1, 1, 1, ["aiostage"]))
assert list(found) == ["no staging", "aiostage"]
assert all(len(each.steps) == 1 and each.slower(found["no staging"]) > 0 for each in found.values())
"""

STEPS = """
import asyncio, gc, steps
from asyncio.events import Handle
before = Handle._run
tree = steps.many_small(3000)
found = asyncio.run(steps.measure(lambda: tree, 2))
assert Handle._run is before and not gc.callbacks
assert len(found.seconds) > 4 and sum(found.seconds) > 0
print(steps.row("small", found))
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("script", [BUSY, STEPS], ids=["busy", "steps"])
def test_what_is_measured_on_a_busy_machine(script: str):
    program = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n{script}"
    done = subprocess.run([*PYTHON, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_events_are_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import events

    figures = {"median_us": 1.2, "worst_us": 3.4, "core_percent": 0.5, "most_queries": 6}
    ways = list(events.WAYS)
    rows = [{"loop": "trio", "seconds": duration, "way": way, **figures} for duration in (0.1, 1.0) for way in ways]
    head, rule, *lines = events.table(rows, [0.1, 1.0]).splitlines()
    assert head.count("|") == rule.count("|") == 7
    assert lines[0] == "| trio | `wait_event` | 1 us (3) | 1 us (3) | 0.5 % | 6 |"
    assert [line.split("`")[1] for line in lines] == ways


SERVING = """
import pathlib, sys, time
place = pathlib.Path(sys.argv[1])
try:
    (place / "started").touch()
    time.sleep(600)
finally:
    (place / "ended").touch()
"""


def test_a_benchmark_that_takes_too_long_can_end_its_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import everything

    script = tmp_path / "serving.py"
    script.write_text(SERVING)
    monkeypatch.setitem(everything.PROGRAMS, "serving", ([str(script), "{results}"], []))
    started = seconds(1)
    monkeypatch.setattr(everything, "_LIMIT_SECONDS", started)
    assert not everything.run("serving", tmp_path, quick=False)
    assert (tmp_path / "started").exists(), f"it did not start within {started} s"
    assert (tmp_path / "ended").exists()
    assert not (tmp_path / "serving.md").exists()


def test_rows_of_saves_have_the_columns_of_their_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import saves

    keys = ("raw", "raw_processor", "copy", "captured", "committed", "peak", "processor", "delay", "worst")
    found = [dict.fromkeys(keys, float(number)) for number in (9, 1, 2, 3)]
    for row in (saves.Saves("disk", "aiostage", found), saves.Saves("disk", "aiostage", failure="an error")):
        assert {line.count("|") for line in [*saves.HEAD.splitlines(), row.as_row()]} == {13}
    # Without the first, which pays for cold memory.
    assert saves.Saves("disk", "aiostage", found).as_row().endswith("| 9.00 | 2.00 | 2.00 |")


def test_ratios_of_many_ranks_are_those_of_their_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import distributed

    # Ours takes half as long in each round, also in the one in which the machine was slow.
    theirs = [1.0, 9.0, 2.0]
    kinds = ("total", WAITS, "CPU of all ranks", "CPU of all ranks, saves in a row")
    found = {f"{name}: {what}, s": theirs for name in (distributed.PYTORCH, distributed.FLOOR) for what in kinds}
    found |= {f"{distributed.OURS}: {what}, s": [each / 2 for each in theirs] for what in kinds}
    for name, values in zip(distributed.LOADS, ([3.0, 8.0], [2.0, 10.0]), strict=True):
        found |= {f"{name}: {what}, s": values for what in ("total", "CPU of all ranks")}
    for when in ("", " after gc.freeze()"):
        for name, value in ((distributed.OURS, 7.0), (distributed.FLOOR, 6.0)):
            found[f"{name}: loop held{when}, ms"] = [value]
            found[f"{name}: loop held while it had a processor{when}, ms"] = [value - 1]
        found[f"{distributed.OURS}: longest step{when}, ms of CPU"] = [0.5]
    shown = distributed.targets(found)
    assert shown["until committed / `dcp.async_save`, at most 1"] == 0.5
    assert shown["until committed / `dcp.async_save`: interval of 95 %"] == "0.50 to 0.50"
    assert shown["load / `dcp.load`, at most 1"] == 1.15
    assert shown["load / `dcp.load`: interval of 95 %"] == "0.80 to 1.50"
    assert shown["loop held, ms, at most 5"] == 7.0
    assert shown["loop held, ms: the floor"] == 6.0
    assert shown["of it while it had a processor, ms after gc.freeze(): the floor"] == 5.0
