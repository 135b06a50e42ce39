"""Alerts: on what, and how often at most."""

from zeta.tracking.wandb_alerts import INTERVAL_S, Alert, Alerts


def _kinds(alerts, now, **values):
    row = {"step": 1} | {name.replace("__", "/"): value for name, value in values.items()}
    return [alert.kind for alert in alerts.of_row(row, now)]


def test_steps_that_changed_nothing_are_told_and_gathered_within_the_interval():
    alerts = Alerts()
    assert _kinds(alerts, 0, optim__skipped_steps=0) == []
    assert _kinds(alerts, 1, optim__skipped_steps=1) == ["nan"]
    assert _kinds(alerts, 2, optim__skipped_steps=4) == []
    (told,) = alerts.of_row({"step": 9, "optim/skipped_steps": 4}, 1 + INTERVAL_S)
    assert "3 more steps up to step 9" in told.text
    assert "4 in all" in told.text
    assert _kinds(alerts, 9e9, optim__skipped_steps=4) == []


def test_the_quarantine_is_told_of_when_it_doubles():
    alerts, told = Alerts(), []
    for hour, count in enumerate([0, 1, 1, 2, 3, 4, 5, 7, 8, 1000]):
        if _kinds(alerts, hour * 2 * INTERVAL_S, data__quarantined=count):
            told.append(count)
    assert told == [1, 2, 4, 8, 1000]


def test_a_rank_that_stays_slow_is_told_once_until_it_is_fast_again():
    alerts = Alerts()
    slow = {"balance__straggler_ratio": 2.0, "balance__slowest_rank": 3}
    even = {"balance__straggler_ratio": 1.0, "balance__slowest_rank": 0}
    hours = iter(range(0, 10**9, 2 * int(INTERVAL_S)))
    other = slow | {"balance__slowest_rank": 4}
    seen = [_kinds(alerts, next(hours), **row) for row in (slow, other, slow, slow, slow)]
    assert seen == [[], [], [], ["straggler"], []]
    seen = [_kinds(alerts, next(hours), **row) for row in (even, slow, slow)]
    assert seen == [[], [], ["straggler"]]


def test_a_crash_loop_alerts_once_an_interval_even_over_processes():
    memory = {}
    restart = Alert("restart", "Run restarted", "")
    told = [len(Alerts(memory).of_event(restart, now)) for now in range(0, 3600, 60)]
    assert sum(told) == 3600 / INTERVAL_S


def test_a_line_without_numbers_is_no_cause():
    assert _kinds(Alerts(), 0, balance__slowest_host="n1", train__loss="NaN") == []


def test_a_clock_that_was_set_back_silences_no_alert():
    alerts = Alerts()
    alert = Alert("restart", "title", "text")
    assert alerts.of_event(alert, now=10_000.0) == [alert]
    assert alerts.of_event(alert, now=10_001.0) == []
    assert alerts.of_event(alert, now=5_000.0) == [alert]
