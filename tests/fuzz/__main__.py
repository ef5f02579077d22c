"""``python -m tests.fuzz``: run random tests for long, or one of them again."""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys

from tests.fuzz import cancelling, changes, disturbing, staging

KINDS = {
    "trees": (staging.main, 20_000),
    "changes": (changes.main, 500),
    "disturbed": (disturbing.main, 2_000),
    "cancelled": (cancelling.main, 2_000),
}
for name, count in (("schedules", 500), ("checkpoints", 2_000)):
    # Those of devices and of storages.
    if importlib.util.find_spec(f"tests.fuzz.{name}") is not None:
        KINDS[name] = (importlib.import_module(f"tests.fuzz.{name}").main, count)


def run() -> int:
    """Parse the arguments, run, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"one or more of {', '.join(KINDS)}; all if none")
    parser.add_argument("--seed", type=int, help="the first seed; a random one if not given")
    parser.add_argument("-n", type=int, help="how many; the kind's own number if not given, 1 with --explain")
    parser.add_argument("--explain", action="store_true", help="make the failing tree of --seed small")
    options = parser.parse_args()
    unknown = set(options.kinds) - KINDS.keys()
    if unknown:
        parser.error(f"unknown kinds: {', '.join(sorted(unknown))}")
    if options.explain:
        print(staging.explain(options.seed or 0))
        return 0
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**9)
    failed = 0
    for kind in options.kinds or KINDS:
        main, count = KINDS[kind]
        print(f"{kind}, seed {seed}", flush=True)
        failed += main(options.n or count, seed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run())
