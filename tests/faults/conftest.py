"""Fixtures of the fault suite."""

from __future__ import annotations

import pytest

from tests.harness import Ranks
from tests.small import Lab, lab_of


@pytest.fixture(scope="session")
def lab(ranks: Ranks) -> Lab:
    """The one lab of the session."""
    return lab_of(ranks)
