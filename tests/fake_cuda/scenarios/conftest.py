"""A workbench for runs, and the table of what was compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest

from tests.fake_cuda import activate
from tests.fake_cuda.scenarios.harness import (
    ROOT,
    Compared,
    Finished,
    Workbench,
    compare,
    table,
    write_table,
)

ROWS: list[Compared] = []
TABLE = ROOT / "build" / "fake_cuda" / "compared.json"


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    """Models and runs, made once for all tests."""
    with activate.session() as session:
        yield Workbench(tmp_path_factory.mktemp("fake_cuda"), session)


@pytest.fixture(scope="session")
def agree() -> Callable[[str, Finished, Finished, Mapping[str, float]], None]:
    """Compares two runs, keeps the rows for the table, and fails where they differ."""

    def check(scenario: str, run: Finished, reference: Finished, figures: Mapping[str, float]) -> None:
        rows = compare(scenario, run, reference, figures)
        ROWS.extend(rows)
        assert all(row.passed for row in rows), "\n" + table(rows)

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table, and keep it for the notes of a release."""
    if ROWS:
        terminalreporter.section("fake GPU against CPU")
        terminalreporter.write_line(table(ROWS))
        write_table(ROWS, TABLE)
