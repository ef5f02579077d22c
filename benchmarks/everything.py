"""Run every benchmark once, and put what they find where the documents show it.

    make bench-all                                                  # an hour with nothing else running
    python benchmarks/everything.py --results bench-results         # the same, without setting anything up
    python benchmarks/everything.py --quick --only staging,busy     # small sizes and few rounds, to see that it works

Each benchmark is a program of its own. What it prints is in the folder of results, and so are its figures where it
writes them. One that fails is named at the end, and what the documents say of it stays. With --publish,
benchmarks/publish.py then puts tables, figures and pictures into docs/.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from time import perf_counter

BENCHMARKS = Path(__file__).parent
_LIMIT_SECONDS = 900
_STOP_SECONDS = 30

PROGRAMS: dict[str, tuple[list[str], list[str]]] = {
    "staging": (
        ["staging.py", "--rounds", "3", "--rows", "1,2,3,4,5,6,8,9", "--json", "{results}/staging.json"],
        ["staging.py", "--rounds", "3", "--rows", "3", "--json", "{results}/staging.json"],
    ),
    "staging-uvloop": (
        ["staging.py", "--rounds", "5", "--rows", "1,3,4,5,6,8", "--alone", "--uvloop"],
        ["staging.py", "--rounds", "1", "--rows", "3", "--alone", "--uvloop"],
    ),
    # By itself: what other rows leave behind takes the memory for 8 GiB.
    "growth": (["staging.py", "--rounds", "3", "--rows", "10"], ["staging.py", "--rounds", "1", "--rows", "8"]),
    "pipeline": (
        ["pipeline.py", "--directory", "{results}", "--json", "{results}/pipeline.json"],
        ["pipeline.py", "--quick", "--directory", "{results}", "--json", "{results}/pipeline.json"],
    ),
    "loading": (
        ["loading.py", "--local", "--mib", "512", "--rounds", "3"],
        ["loading.py", "--local", "--mib", "64", "--rounds", "1"],
    ),
    # A server that is never the bottleneck.
    "loading-remote": (
        ["loading.py", "--only-remote", "--latency", "0", "--mib", "512", "--rounds", "9"],
        ["loading.py", "--only-remote", "--latency", "0", "--mib", "64", "--rounds", "1"],
    ),
    "in-place": (
        ["loading.py", "--local", "--only-in-place", "--mib", "2048", "--rounds", "9", "--rivals", "3"],
        ["loading.py", "--local", "--only-in-place", "--mib", "64", "--rounds", "1"],
    ),
    "in-place-cold": (
        ["loading.py", "--local", "--only-in-place", "--cold", "--mib", "2048", "--rounds", "9", "--rivals", "3"],
        ["loading.py", "--local", "--only-in-place", "--cold", "--mib", "64", "--rounds", "1"],
    ),
    "many": (["many.py"], ["many.py", "--count", "1000", "--rounds", "1"]),
    "distributed": (["distributed.py"], ["distributed.py", "--megabytes", "4", "--rounds", "1", "--sizes", "1", "2"]),
    "busy": (["busy.py", "--rounds", "5"], ["busy.py", "--rounds", "1", "--seconds", "1", "--mib", "64"]),
    "steps": (["steps.py", "--rounds", "15"], ["steps.py", "--rounds", "1"]),
    "floor": (["floor.py", "--rounds", "7"], ["floor.py", "--rounds", "1"]),
    "ticks": (["ticks.py", "--rounds", "5"], ["ticks.py", "--rounds", "1"]),
    "events": (
        ["events.py", "--rounds", "3", "--seconds", "0.01", "0.1", "1"],
        ["events.py", "--rounds", "1", "--seconds", "0.01"],
    ),
}
"""Each with its arguments, and with those of a quick run."""


def run(name: str, results: Path, *, quick: bool) -> bool:
    """Run one benchmark; return whether it has ended well."""
    script, *options = (each.format(results=results) for each in PROGRAMS[name][quick])
    begin = perf_counter()
    print(f"{name}: ", end="", flush=True)
    # The library beside these benchmarks, and not one that is installed.
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)}
    output = results / f"{name}.md.part"
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As nohup and the & of a shell leave it. What is started would ignore it too, and stop() could not end it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with (
        output.open("w") as written,
        subprocess.Popen(
            [sys.executable, BENCHMARKS / script, *options],
            env=environment,
            stdout=written,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        try:
            _, errors = process.communicate(timeout=_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            stop(process)
            print(f"took more than {_LIMIT_SECONDS} s")
            return False
        except BaseException:
            stop(process)
            raise
    if process.returncode:
        print(f"failed\n{errors[-1500:]}")
        return False
    output.rename(results / f"{name}.md")
    print(f"{perf_counter() - begin:.0f} s", flush=True)
    return True


def stop(process: subprocess.Popen[str]) -> None:
    """End a benchmark, which has some seconds to end the servers that it has started."""
    process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("bench-results"), help="folder to write to")
    parser.add_argument("--only", default=",".join(PROGRAMS), help="which, separated by commas")
    parser.add_argument("--quick", action="store_true", help="small, to see that it works")
    parser.add_argument("--publish", action="store_true", help="put what was found into docs/")
    options = parser.parse_args()
    results = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    failed = [name for name in options.only.split(",") if not run(name, results, quick=options.quick)]
    if options.publish:
        subprocess.run([sys.executable, BENCHMARKS / "publish.py", results], check=True)
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
