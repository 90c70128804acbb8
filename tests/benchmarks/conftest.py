"""Benchmarks read /proc, so their tests need Linux."""

import sys

collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]
