"""Some of the disturbances of chaos.py; docs/reliability.md has the outcome of all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import disturbance, is_good, survive, undisturbed


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[float | None]:
    found = undisturbed(tmp_path_factory.mktemp("undisturbed"))
    assert None not in found
    return found


@pytest.mark.parametrize("number", [0, 6])
def test_a_disturbed_run_is_resumed_with_the_losses_of_one_that_was_not(
    number: int, expected: list[float | None], tmp_path: Path
) -> None:
    row = survive(disturbance(number), tmp_path, expected)
    assert is_good(row), row


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3, 5, 9, 13])
def test_more_disturbances(number: int, expected: list[float | None], tmp_path: Path) -> None:
    row = survive(disturbance(number), tmp_path, expected)
    assert is_good(row), row
