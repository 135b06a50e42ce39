"""What W&B has of a run is known across kills, and decides what it is sent."""

import json

import pytest

from zeta.tracking.wandb_state import WandbState, begin_state, has_news, read_state


def _row(step, **values):
    return {"step": step, "data/images_seen": 8 * step, "train/loss": 1.0, **values}


def test_a_replayed_step_has_nothing_new_but_what_it_lacked():
    state = WandbState()
    assert state.take_new(_row(2)) == {
        "trainer/step": 2,
        "data/images_seen": 16,
        "train/loss": 1.0,
    }
    assert state.take_new(_row(1)) == {}
    assert state.take_new(_row(2)) == {}
    late = state.take_new(_row(2, **{"val/loss": 3.0}))
    assert late == {"trainer/step": 2, "data/images_seen": 16, "val/loss": 3.0}
    assert state.take_new(_row(3))["train/loss"] == 1.0


def test_the_file_is_whole_after_every_write_and_says_the_same(tmp_path):
    path = tmp_path / "wandb_state.json"
    state = WandbState({"train/loss": 4}, 1, None, 7, "online", "https://x", None, ["pack_1.png"])
    state.write(path)
    assert read_state(path) == state
    assert [item.name for item in tmp_path.iterdir()] == ["wandb_state.json"]
    path.write_text('{"logged": ')
    with pytest.raises(ValueError, match=r"wandb_state\.json is damaged"):
        read_state(path)


@pytest.mark.parametrize(
    ("on_server", "expected"), [(7.0, 7), (4.0, 5), (None, 5), (30.0, 9), (5.0, 5)]
)
def test_after_a_session_that_was_cut_the_server_says_what_it_has(on_server, expected):
    """The session began at step 5 and was handed step 9."""
    state = WandbState(logged={"train/loss": 9}, unsure_from={"train/loss": 5})
    state.settle(on_server)
    assert state.logged == {"train/loss": expected}


def test_a_session_that_ended_in_order_is_not_doubted():
    state = WandbState(logged={"train/loss": 9}, unsure_from=None)
    state.settle(2.0)
    assert state.logged == {"train/loss": 9}


def test_a_new_directory_of_an_old_run_sends_only_what_lies_beyond():
    state = WandbState()
    state.settle(6.0)
    assert state.take_new(_row(6)) == {}
    assert state.take_new(_row(7))


def test_a_run_of_a_version_without_a_state_is_not_sent_again(tmp_path):
    metrics, sessions = tmp_path / "metrics.jsonl", tmp_path / "wandb"
    metrics.write_text("".join(json.dumps(_row(step)) + "\n" for step in (1, 2)))
    fresh = begin_state(tmp_path / "wandb_state.json", metrics, sessions)
    assert has_news(fresh, metrics)
    (sessions / "offline-run-20260101_000000-abc").mkdir(parents=True)
    old = begin_state(tmp_path / "wandb_state.json", metrics, sessions)
    assert not has_news(old, metrics)
    assert old.take_new(_row(3))
