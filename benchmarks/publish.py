"""Put what benchmarks have found where the documents show it: tables, figures and pictures.

    python benchmarks/publish.py bench-results

The folder has what benchmarks/everything.py writes; what is not in it stays as it is. NAME.md goes into
docs/measurements.md between ``<!-- NAME -->`` and ``<!-- end of NAME -->``. The short table of staging goes into
docs/performance.md, what it is made from into benchmarks/figures, and the pictures into docs/pictures. The table of
aims in docs/performance.md and those of docs/scaling.md are made anew from all that docs/measurements.md then says.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aims
import ranks

ROOT = Path(__file__).parent.parent
SHORT_ROWS = (1, 2, 3, 6)
SHORT_PEERS = {
    "aiostage": "aiostage",
    "DefaultStager": "DefaultStager",
    "torch_checkpointing": "torch_checkpointing",
    "_foreach_copy_": "a bare copy",
    "populate + copy": "a bare copy",
}
"""Of the short table, and the column of each."""


def replaced(text: str, name: str, content: str) -> str:
    """Return a document with other lines between the marks of a name.

    Raises:
        ValueError: If it has no such marks.
    """
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"expected one {start.strip()} and one {end}")
    before, rest = text.split(start)
    return f"{before}{start}\n{content.strip()}\n\n{end}{rest.split(end)[1]}"


def shortened(figures: dict[str, Any], note: str) -> dict[str, Any]:
    """Return the rows and peers of the short table; of the seconds the least, the median and the most."""
    rows = []
    for row in figures["rows"]:
        if row["row"] not in SHORT_ROWS:
            continue
        samples = {}
        for name, each in row["samples"].items():
            if name in SHORT_PEERS and each["seconds"]:
                seconds = each["seconds"]
                samples[name] = {
                    "seconds": [min(seconds), statistics.median(seconds), max(seconds)],
                    "delay_p99": each["delay_p99"],
                    "delay_worst": each["delay_worst"],
                }
        rows.append({"row": row["row"], "work": row["work"], "samples": samples})
    return {"machine": figures["machine"], "note": note, "rows": rows}


def short_table(figures: dict[str, Any]) -> str:
    """Return the table of what :func:`shortened` returns."""
    columns = list(dict.fromkeys(SHORT_PEERS.values()))
    lines = [f"| staging | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for row in figures["rows"]:
        found = {SHORT_PEERS[name]: f"{1e3 * each['seconds'][1]:.0f} ms" for name, each in row["samples"].items()}
        lines.append(f"| {row['work']} | {' | '.join(found.get(column, '') for column in columns)} |")
    worst: dict[str, list[float]] = {}
    for row in figures["rows"]:
        for name, each in row["samples"].items():
            worst.setdefault(SHORT_PEERS[name], []).append(1e3 * each["delay_worst"])
    # A bare copy holds the thread that it runs in; it has no event loop to delay.
    ranges = [f"{min(worst[each]):.0f} to {max(worst[each]):.0f} ms" if each in worst else "" for each in columns[:-1]]
    return "\n".join([*lines, f"| worst delay of the event loop in these | {' | '.join(ranges)} | |"])


def long_table(figures: dict[str, Any]) -> str:
    """Return every row of staging with its peers, then its targets and its notes."""
    lines = [
        "| row | work | peer | time (least-most) | loop delay: 99 %, ms | worst, ms |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    targets = ["| row | target | figure | limit | |", "| --- | --- | ---: | ---: | --- |"]
    notes = []
    numbers = [row["row"] for row in figures["rows"]]
    for row in figures["rows"]:
        # One number may stand for two states of the same work.
        state = f": {row['work'].rpartition(', ')[2]}" if numbers.count(row["row"]) > 1 else ""
        where = f"| {row['row']} | {row['work']} "
        for name, each in row["samples"].items():
            name = name.replace("_foreach_copy_", "`_foreach_copy_`")
            if each["failure"]:
                lines.append(f'{where}| {name} | fails: "{each["failure"]}" | | |')
            else:
                found = [1e3 * seconds for seconds in each["seconds"]]
                time = f"{statistics.median(found):.0f} ms ({min(found):.0f}-{max(found):.0f})"
                lines.append(
                    f"{where}| {name} | {time} | {1e3 * each['delay_p99']:.1f} | {1e3 * each['delay_worst']:.1f} |"
                )
            where = "| | "
        for check in row["checks"]:
            bound = "at least" if check["at_least"] else "at most"
            met = "met" if check["met"] else "not met"
            what = check["what"] if not check["what"].startswith("row 7: ") else check["what"][7:]
            targets.append(
                f"| {row['row']}{state} | {what} | {check['figure']:.3g} | {bound} {check['limit']:.3g} | {met} |"
            )
        notes += [f"- Row {row['row']}{state}: {note}" for note in row["notes"]]
    return "\n".join([*lines, "", *targets, "", *notes])


def saves(figures: dict[str, Any], note: str) -> dict[str, Any]:
    """Return the saves to a disk, each way with the medians of all but the first save."""
    found = []
    for way in figures["disk"]:
        later = way["found"][1:] or way["found"]
        medians = {key: statistics.median(each[key] for each in later) for key in ("captured", "committed", "raw")}
        kept = [medians | {"worst": max(each["worst"] for each in later)}] if later else []
        found.append({"place": way["place"], "way": way["way"], "found": kept, "failure": way["failure"]})
    return {"machine": figures["machine"], "note": note, "disk": found}


def printed(text: str) -> str:
    """Return what a benchmark has printed, as part of a document: its headings become plain lines."""
    return re.sub(r"^#+ (.*)$", r"Row \1", text.strip(), flags=re.MULTILINE)


def commit() -> str:
    """Return the name of the commit that is measured."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def publish(results: Path, root: Path, when: str) -> list[str]:
    """Put figures into documents.

    Args:
        results: The folder of what was found.
        root: The folder that has ``docs`` and ``benchmarks``.
        when: What is said of when and at which commit.

    Returns:
        The names of what was put somewhere.
    """
    performance, measurements = root / "docs" / "performance.md", root / "docs" / "measurements.md"
    kept = root / "benchmarks" / "figures"
    done = []
    for path in sorted(results.glob("*.md")):
        text, name = measurements.read_text(), path.stem
        if f"<!-- {name} -->" in text and name != "staging":
            measurements.write_text(replaced(text, name, f"{when}\n\n{printed(path.read_text())}"))
            done.append(name)
    if (results / "staging.json").exists():
        figures = json.loads((results / "staging.json").read_text())
        short = shortened(figures, f"{when} Of each round the least, the median and the most.")
        (kept / "staging.json").write_text(json.dumps(short, indent=1) + "\n")
        head = f"{when} {figures['machine']}."
        performance.write_text(replaced(performance.read_text(), "staging", f"{head}\n\n{short_table(short)}"))
        measurements.write_text(replaced(measurements.read_text(), "staging", f"{head}\n\n{long_table(figures)}"))
        done.append("staging")
    if (results / "pipeline.json").exists():
        figures = json.loads((results / "pipeline.json").read_text())
        if figures.get("disk"):
            short = saves(figures, f"{when} Medians of the later saves, and the worst delay.")
            (kept / "saves.json").write_text(json.dumps(short, indent=1) + "\n")
            done.append("saves")
    return done


def publish_aims(root: Path) -> None:
    """Make the table of what was aimed at from the measurements.

    Raises:
        ValueError: If they have no such figure.
    """
    performance, measurements = root / "docs" / "performance.md", root / "docs" / "measurements.md"
    found = aims.table(aims.aims(measurements.read_text()))
    performance.write_text(replaced(performance.read_text(), "aims", found))


def publish_ranks(root: Path) -> None:
    """Make the tables of docs/scaling.md from the measurements.

    Raises:
        ValueError: If they have no such figure.
    """
    scaling, measurements = root / "docs" / "scaling.md", root / "docs" / "measurements.md"
    text = scaling.read_text()
    for name, found in ranks.tables(measurements.read_text()).items():
        text = replaced(text, name, found)
    scaling.write_text(text)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what benchmarks/everything.py has written")
    parser.add_argument("--date", default=f"{datetime.now(UTC):%Y-%m-%d}", help="when it was measured")
    options = parser.parse_args()
    done = publish(options.results, ROOT, f"On {options.date}, at commit {commit()}.")
    publish_aims(ROOT)
    publish_ranks(ROOT)
    pictures = ROOT / "docs" / "pictures"
    drawn = {ROOT / "docs" / "measurements.md": pictures}
    for name in {"staging", "saves"} & set(done):
        drawn[ROOT / "benchmarks" / "figures" / f"{name}.json"] = pictures / f"{name}.svg"
    for source, picture in drawn.items():
        drawing = [sys.executable, Path(__file__).with_name("plot.py"), source, picture]
        subprocess.run(drawing, check=True, env=os.environ | {"MPLBACKEND": "svg"})
    print(f"Published: {', '.join(done)}")


if __name__ == "__main__":
    main()
