from statistics import NormalDist

import numpy as np
import pytest
import torch

from defense.segmentation_smoothing import certify_mask_counts, predict_mask_counts
from defense.smoothing import ABSTAIN, lower_bound
from services.gateway.modes import Plan
from services.gateway.verdicts import judge

ALPHA = 0.001
PHI_INVERSE = NormalDist().inv_cdf


def plan(*copies: int) -> Plan:
    return Plan("smooth" if len(copies) == 1 else "certify", copies, 0.25, ALPHA, 0.75)


def test_the_majority_is_the_answer_and_a_small_lead_is_none() -> None:
    votes = torch.tensor([[10, 80, 10], [0, 45, 55], [100, 0, 0]])
    verdict = judge(plan(100), [votes])
    assert verdict.labels.tolist() == [1, ABSTAIN, 0]
    assert verdict.shares.dtype == np.float32
    assert verdict.shares == pytest.approx(votes.numpy() / 100)
    assert np.array_equal(np.rint(verdict.shares * 100), votes), "times n, shares are votes"
    assert verdict.radius is None
    assert verdict.votes[0].tolist() == votes.tolist()


def test_a_unanimous_certificate_has_the_radius_of_the_closed_form() -> None:
    verdict = judge(plan(10, 1000), [torch.tensor([[0, 10]]), torch.tensor([[0, 1000]])])
    assert verdict.labels.tolist() == [1]
    assert verdict.radius is not None
    assert verdict.radius.tolist() == [pytest.approx(0.25 * PHI_INVERSE(ALPHA ** (1 / 1000)), rel=1e-12)]


def test_the_first_copies_choose_the_class_and_the_others_certify_it() -> None:
    selection = torch.tensor([[9, 1], [1, 9], [10, 0]])
    estimation = torch.tensor([[900, 100], [900, 100], [505, 495]])
    verdict = judge(plan(10, 1000), [selection, estimation])
    assert verdict.labels.tolist() == [0, ABSTAIN, ABSTAIN]
    radius = 0.25 * PHI_INVERSE(lower_bound(900, 1000, ALPHA))
    assert verdict.radius is not None
    assert verdict.radius.tolist() == [pytest.approx(radius, rel=1e-12), 0, 0]
    assert verdict.shares == pytest.approx(estimation.numpy() / 1000)
    assert [one.tolist() for one in verdict.votes] == [selection.tolist(), estimation.tolist()]


def mask_votes(n: int, seed: int) -> torch.Tensor:
    hits = torch.from_numpy(np.random.default_rng(seed).binomial(n, [[0.02, 0.5, 0.98], [0.9, 0.99, 0.4]], (2, 2, 3)))
    return torch.stack([n - hits, hits], dim=1)


def test_each_pixel_of_a_mask_has_its_answer() -> None:
    votes = mask_votes(100, 0)
    verdict = judge(plan(100), [votes])
    assert verdict.labels.shape == (2, 2, 3)
    for labels, counts in zip(verdict.labels, votes, strict=True):
        assert np.array_equal(labels, predict_mask_counts(counts, alpha=ALPHA))
    assert {ABSTAIN, 0, 1} == set(verdict.labels.ravel().tolist())


def test_a_certified_mask_has_one_radius_and_none_where_nothing_is_certain() -> None:
    selection, estimation = mask_votes(50, 1), mask_votes(500, 2)
    estimation[1] = 250
    verdict = judge(plan(50, 500), [selection, estimation])
    one = certify_mask_counts(selection[0], estimation[0], sigma=0.25, alpha=ALPHA, tau=0.75)
    assert np.array_equal(verdict.labels[0], one.labels)
    assert {ABSTAIN, 0, 1} == set(verdict.labels[0].ravel().tolist())
    assert (verdict.labels[1] == ABSTAIN).all()
    assert verdict.radius is not None
    assert verdict.radius.tolist() == [pytest.approx(0.25 * PHI_INVERSE(0.75), rel=1e-12), 0]
