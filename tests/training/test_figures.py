"""Logits -> figures, against numbers worked out by hand and against formulas written another way."""

import json
import math

import numpy as np
import pytest
import torch

from training.errors import DivergedError
from training.figures import BINS, figures, wilson_interval

LN3 = math.log(3)


def logits_and_labels(n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    logits = rng.normal(0, 2, (n, k)).astype(np.float32)
    logits[np.arange(n), labels] += 1.5
    return logits, labels


def test_four_images_of_two_classes_by_hand() -> None:
    # Probabilities of class 1: 3/4, 3/4, 1/4, 1/4; true classes 1, 0, 0, 1: right, wrong, right, wrong.
    measured = figures(np.array([[0, LN3], [0, LN3], [LN3, 0], [LN3, 0]]), [1, 0, 0, 1])
    assert measured.accuracy == 0.5
    assert measured.loss == pytest.approx((2 * math.log(4 / 3) + 2 * math.log(4)) / 4)
    assert measured.top5_accuracy == 1.0
    assert measured.ece == pytest.approx(0.25)  # all in one bin: confidence 3/4, accuracy 1/2
    assert measured.confusion.tolist() == [[1, 1], [1, 1]]
    assert [each.n for each in measured.bins if each.n] == [4]
    first = measured.classes[0]
    assert (first.n, first.accuracy, first.precision, first.f1) == (2, 0.5, 0.5, 0.5)


def test_loss_and_top_five_are_those_of_torch() -> None:
    logits, labels = logits_and_labels(9000, 12)  # more rows than are worked on at once
    measured = figures(logits, labels)
    scores, truth = torch.from_numpy(logits).double(), torch.from_numpy(labels)
    assert measured.loss == pytest.approx(float(torch.nn.functional.cross_entropy(scores, truth)), rel=1e-12)
    top5 = (scores.topk(5).indices == truth[:, None]).any(1).double().mean()
    assert measured.top5_accuracy == pytest.approx(float(top5))
    assert measured.accuracy == pytest.approx(float((scores.argmax(1) == truth).double().mean()))
    assert np.allclose(measured.confidence, scores.softmax(1).max(1).values.numpy())
    assert measured.n == 9000


def test_calibration_error_is_the_weighted_distance_over_bins() -> None:
    logits, labels = logits_and_labels(500, 7)
    measured = figures(logits, labels)
    right = logits.argmax(1) == labels
    error = 0.0
    for m in range(BINS):
        inside = [i for i, c in enumerate(measured.confidence) if m / BINS < c <= (m + 1) / BINS]
        if inside:
            error += abs(sum(right[inside]) - sum(measured.confidence[inside])) / 500
    assert measured.ece == pytest.approx(error)
    assert sum(each.n for each in measured.bins) == 500


def test_confusion_precision_recall_and_f1_count_each_image_once() -> None:
    logits, labels = logits_and_labels(300, 5)
    measured = figures(logits, labels)
    predicted = logits.argmax(1)
    for i in range(5):
        for j in range(5):
            assert measured.confusion[i, j] == sum((t == i) & (p == j) for t, p in zip(labels, predicted, strict=True))
    for k, each in enumerate(measured.classes):
        precision, recall = (labels[predicted == k] == k).mean(), (predicted[labels == k] == k).mean()
        assert (each.precision, each.accuracy) == (pytest.approx(precision), pytest.approx(recall))
        assert each.f1 == pytest.approx(2 * precision * recall / (precision + recall))
    assert measured.macro_f1 == pytest.approx(np.mean([each.f1 for each in measured.classes]))


def test_of_equal_logits_the_first_class_counts_everywhere() -> None:
    measured = figures(np.zeros((7, 7), np.float32), np.arange(7))
    assert measured.predicted.tolist() == [0] * 7
    assert measured.accuracy == pytest.approx(1 / 7)
    assert measured.top5_accuracy == pytest.approx(5 / 7)
    assert measured.loss == pytest.approx(math.log(7))


def test_a_class_without_images_has_no_accuracy_rather_than_zero() -> None:
    measured = figures(np.array([[3.0, 0, 0], [3.0, 0, 0]]), [0, 1])
    assert [each.accuracy for each in measured.classes] == [1.0, 0.0, None]
    assert [each.precision for each in measured.classes] == [0.5, None, None]
    assert [each.f1 for each in measured.classes] == [pytest.approx(2 / 3), 0.0, None]
    assert measured.macro_f1 == pytest.approx(1 / 3)


def test_a_class_without_images_that_is_predicted_is_no_part_of_the_mean_f1() -> None:
    measured = figures(np.array([[3.0, 0, 0], [0, 3.0, 0], [0, 0, 3.0]]), [0, 1, 1])
    assert [each.f1 for each in measured.classes] == [1.0, pytest.approx(2 / 3), 0.0]
    assert measured.macro_f1 == pytest.approx(5 / 6)


def test_very_large_logits_overflow_nowhere() -> None:
    measured = figures(np.array([[3e38, -3e38], [3e38, -3e38]], np.float32), [0, 1])
    assert measured.confidence.tolist() == [1.0, 1.0]
    assert math.isfinite(measured.loss)
    assert measured.bins[-1].n == 2


def test_logits_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(DivergedError, match=r"1 of 2 images .* smaller --learning-rate"):
        figures(np.array([[0.0, 1.0], [np.nan, 0.0]]), [0, 1])


def test_pairs_and_images_come_worst_first() -> None:
    # Class 0 three times taken for 1, class 2 once for 0.
    logits = np.array([[0, 1.0, 0], [0, 3.0, 0], [0, 2.0, 0], [9.0, 0, 0], [4.0, 0, 0]])
    measured = figures(logits, [0, 0, 0, 0, 2])
    pairs = measured.most_confused(5)
    assert [(pair.true, pair.predicted, pair.n, pair.share) for pair in pairs] == [(0, 1, 3, 0.75), (2, 0, 1, 1.0)]
    assert measured.mistaken(pairs[0], 2) == [1, 2]
    assert measured.surprising(9) == [4, 1, 2, 0]  # the wrong ones, by confidence
    assert measured.worst(1) == [4]
    assert measured.worst(9)[-1] == 3


def test_the_interval_is_wilsons() -> None:
    assert wilson_interval(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))  # published tables
    assert wilson_interval(50, 100) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))


def test_the_json_is_json_and_the_evaluation_the_same_numbers() -> None:
    measured = figures(*logits_and_labels(50, 4))
    stated = json.loads(json.dumps(measured.as_json(), allow_nan=False))
    evaluation = measured.evaluation()
    for name in ("loss", "accuracy", "top5_accuracy", "n"):
        assert stated[name] == getattr(evaluation, name) == getattr(measured, name)
