"""Random trees, random changes and random cancellations; ``python -m tests.fuzz --help``."""
