"""Scores of single steps, as metrics.jsonl tells them."""

from zeta.run.step_scores import read_scores


def test_a_line_torn_anywhere_costs_only_itself(tmp_path):
    lines = [
        '{"step": 2, "val/loss": 1.5}',
        '{"step": 4, "val/top1"{"step": 4, "val/loss": 1.0}',
        '{"step": 6, "val/loss": 0.5}',
        '{"step": 8, "val/lo',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_scores(tmp_path / "metrics.jsonl") == {2: {"val/loss": 1.5}, 6: {"val/loss": 0.5}}
