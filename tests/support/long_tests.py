"""The tests that take longest: `make test` leaves them to `make test-long`.

`python -m tests.support.long_tests --minutes 8 REPORT ...` writes the list, `tests/long.txt`. The reports come from
runs of all tests but the matrix: `make test test-long` with PYTEST_ADDOPTS="--junitxml=REPORT", a name for each.
"""

from __future__ import annotations

import argparse
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Mapping

from tests.support.paths import ROOT

LIST = ROOT / "tests" / "long.txt"
"""An id in each line: of a test function, "tests/FILE.py::FUNCTION", or of one case of it, "...[CASE]"."""
WORKERS, BUSY = 2, 0.92
"""Processes of `make test`, and the share of the time in which both of them have tests."""


def listed() -> frozenset[str]:
    """The ids in the list."""
    return frozenset(LIST.read_text("utf-8").splitlines())


def is_long(test: str, ids: Collection[str]) -> bool:
    """Whether a test, or its function, is among the ids."""
    return test in ids or function_of(test) in ids


def function_of(test: str) -> str:
    """The id of a test's function."""
    return test.partition("[")[0]


def read(report: str) -> dict[str, float]:
    """The seconds of each test in a report."""
    cases = ElementTree.parse(report).getroot().iter("testcase")
    return {
        f"{case.attrib['classname'].replace('.', '/')}.py::{case.attrib['name']}": float(case.attrib["time"])
        for case in cases
    }


def choose(seconds: Mapping[str, float], budget_s: float) -> list[str]:
    """The ids of the tests that take longest, so that the others take at most `budget_s`. Of each file the shortest
    test stays."""
    shortest: dict[str, str] = {}
    for test in sorted(seconds, key=seconds.__getitem__):
        shortest.setdefault(test.partition("::")[0], test)
    stay = set(shortest.values())
    total, chosen = sum(seconds.values()), set[str]()
    for test in sorted(seconds.keys() - stay, key=lambda test: -seconds[test]):
        if total <= budget_s:
            break
        total -= seconds[test]
        chosen.add(test)
    whole = {function_of(test) for test in chosen} - {function_of(test) for test in seconds.keys() - chosen}
    return sorted({function_of(test) if function_of(test) in whole else test for test in chosen})


def main(arguments: list[str]) -> None:
    """Write the list."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.long_tests")
    parser.add_argument("reports", nargs="+", metavar="REPORT")
    parser.add_argument("--minutes", type=float, required=True, help="that `make test` may take")
    options = parser.parse_args(arguments)
    seconds = {test: took for report in options.reports for test, took in read(report).items()}
    chosen = choose(seconds, options.minutes * 60 * WORKERS * BUSY)
    LIST.write_text("".join(f"{test}\n" for test in chosen), "utf-8")
    left = [test for test in seconds if not is_long(test, set(chosen))]
    print(
        f"{len(left)} of {len(seconds)} tests stay, with {sum(map(seconds.__getitem__, left)) / 60:.1f} of "
        f"{sum(seconds.values()) / 60:.1f} minutes of their processes"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
