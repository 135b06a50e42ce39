"""k-NN and linear probe against plain formulas and a library."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from zeta.probes import classifiers as probes
from zeta.probes.classifiers import hit_rates, knn_scores, linear_probe_scores


def _blobs(count, classes=4, dim=6, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    centres = 2 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    return centres[labels] + spread * torch.randn(count, dim, generator=generator), labels


def test_knn_votes_are_those_of_the_nearest_by_cosine(monkeypatch):
    train, labels = _blobs(50)
    test, _ = _blobs(7, seed=1)
    monkeypatch.setattr(probes, "_ROWS_AT_ONCE", 3)
    scores = knn_scores(train, labels, test, 5, k=6)
    for row, image in enumerate(test.double().numpy()):
        others = train.double().numpy()
        cosines = others @ image / np.linalg.norm(others, axis=1) / np.linalg.norm(image)
        expected = np.zeros(5)
        for index in np.argsort(-cosines)[:6]:
            expected[labels[index]] += np.exp(cosines[index] / 0.07)
        assert scores[row].numpy() == pytest.approx(expected, rel=1e-9)


def test_fewer_images_than_neighbours_all_vote():
    scores = knn_scores(torch.eye(3), torch.tensor([0, 1, 1]), torch.eye(3), 2)
    assert scores.argmax(1).tolist() == [0, 1, 1]


@pytest.mark.slow
def test_the_probe_is_the_optimum_of_logistic_regression(monkeypatch):
    train, labels = _blobs(300, spread=3.0)
    test, _ = _blobs(40, spread=3.0, seed=1)
    monkeypatch.setattr(probes, "_PENALTIES", (0.1,) * 3)
    ours = linear_probe_scores(train, labels, test, 4)
    mean, std = train.double().mean(0), train.double().std(0, correction=0)
    strength = 1 / (0.1 / train.shape[1] * len(train))  # C weighs the sum of the losses
    library = LogisticRegression(C=strength, tol=1e-10, max_iter=5000)
    library.fit(((train - mean) / std).numpy(), labels.numpy())
    theirs = library.decision_function(((test - mean) / std).numpy())
    ours = ours - ours.mean(1, keepdim=True)  # logits are known up to a constant
    assert ours.numpy() == pytest.approx(theirs - theirs.mean(1, keepdims=True), abs=1e-3)


def test_the_probe_does_not_depend_on_the_order_of_features_that_hardly_differ():
    train, labels = _blobs(200)
    test, truth = _blobs(100, seed=1)
    noisy = train + 1e-6 * torch.randn(train.shape, generator=torch.Generator().manual_seed(2))
    first, second = (linear_probe_scores(x, labels, test, 4) for x in (train, noisy))
    assert torch.allclose(first, second, atol=1e-3)
    assert hit_rates(first, truth)["top1"] > 0.7


def test_constant_features_and_a_handful_of_images_are_no_obstacle():
    train = torch.cat([torch.eye(3), torch.ones(3, 2)], dim=1)
    scores = linear_probe_scores(train, torch.arange(3), train, 3)
    assert scores.argmax(1).tolist() == [0, 1, 2]
    assert scores.isfinite().all()


def test_hit_rates_count_the_highest_and_the_five_highest():
    scores = torch.tensor([[3.0, 2, 1, 0, -1, -2], [0, 1, 2, 3, 4, 5]])
    rates = hit_rates(scores, torch.tensor([0, 0]))
    assert rates == {"top1": 0.5, "top5": 0.5}
    assert hit_rates(scores[:, :2], torch.tensor([0, 0])) == {"top1": 0.5, "top5": 1.0}
