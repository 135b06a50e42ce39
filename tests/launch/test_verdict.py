"""The verdict of rank 0 on a start, as the other ranks hear it."""

from torch._C._distributed_c10d import HashStore

from launch.verdict import check_together
from zeta.distributed import RankInfo
from zeta.train_config import WatchdogConfig


def test_without_a_limit_for_the_start_the_others_wait_for_the_verdict_all_the_same():
    store, unlimited = HashStore(), WatchdogConfig(start_s=0).limit("start")
    for rank in range(2):
        info = RankInfo(rank=rank, world_size=2)
        assert check_together(lambda: "checked", store, info, unlimited) == "checked"
