"""Ranks for the tests of training: one warm process that forks them."""

import pytest

from tests.zeta.rank_server import RankServer


@pytest.fixture(scope="session")
def ranks():
    """Runs jobs on real ranks, see `tests.zeta.rank_server`."""
    server = RankServer()
    yield server
    server.close()
