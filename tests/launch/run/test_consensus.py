"""The common verdict of the ranks on a start, as each of them hears it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch._C._distributed_c10d import HashStore

from launch.run.consensus import RefusedError, check_together
from zeta.distributed import RankInfo
from zeta.exit_codes import RunError
from zeta.run.watchdog import WatchdogConfig


def outcomes(*checks):
    """What `check_together` gives or raises on each rank, with these checks."""
    store, unlimited = HashStore(), WatchdogConfig(start_s=0).limit("start")

    def rank(number):
        info = RankInfo(rank=number, world_size=len(checks))
        try:
            return check_together(checks[number], store, info, unlimited)
        except (ValueError, RunError, RefusedError) as error:
            return error

    with ThreadPoolExecutor(len(checks)) as ranks:
        return list(ranks.map(rank, range(len(checks))))


def refuse(error):
    def check():
        raise error

    return check


def test_all_go_on_where_every_check_passes_with_no_limit_for_the_start():
    assert outcomes(lambda: "a", lambda: "b", lambda: "c") == ["a", "b", "c"]


def test_what_rank_0_finds_is_said_by_rank_0_and_the_others_check_nothing():
    looked = []
    first, second = outcomes(refuse(RunError("no")), lambda: looked.append(1))
    assert isinstance(first, RunError)
    assert (type(second), second.status, looked) == (RefusedError, 93, [])


@pytest.mark.parametrize("error", [ValueError("no shards here"), RunError("no")])
def test_what_another_rank_finds_ends_all_of_them_and_is_said_once(error):
    found = outcomes(lambda: "fine", refuse(error), lambda: "fine", refuse(error))
    assert sum(outcome is error for outcome in found) == 1
    refused = [outcome for outcome in found if isinstance(outcome, RefusedError)]
    assert [outcome.status for outcome in refused] == [93, 93, 93]
    assert found.index(error) in (1, 3)
