"""Scores of single steps, as metrics.jsonl tells them."""

from zeta.run.step_scores import best_first, read_scores


def test_a_line_torn_anywhere_costs_only_itself(tmp_path):
    lines = [
        '{"step": 2, "val/loss": 1.5}',
        '{"step": 4, "val/top1"{"step": 4, "val/loss": 1.0}',
        '{"step": 6, "val/loss": 0.5}',
        '{"step": 8, "val/lo',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_scores(tmp_path / "metrics.jsonl") == {2: {"val/loss": 1.5}, 6: {"val/loss": 0.5}}


def test_steps_without_a_score_of_their_own_are_ranked_by_the_probes():
    """An objective without labels logs how embeddings spread, which says nothing of good or bad."""
    spread = {step: {"val/images": 64.0, "val/embedding_rank": 9.0 - step} for step in (2, 4, 6)}
    assert best_first(spread, (2, 4, 6)) == []
    probed = {2: {"val/knn_top1": 0.3}, 4: {"val/knn_top1": 0.5}, 6: {"val/knn_top1": 0.4}}
    with_probes = {step: {**spread[step], **probed[step]} for step in spread}
    assert [each.step for each in best_first(with_probes, (2, 4, 6))] == [4, 6, 2]
    assert best_first(with_probes, (2, 6))[0].metric == "val/knn_top1"
    labelled = {step: {**with_probes[step], "val/top1": step / 10} for step in spread}
    assert best_first(labelled, (2, 4, 6))[0].step == 6
