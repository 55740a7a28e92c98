import math
from typing import Any

import pytest

from services.gateway.config import GatewaySettings, Mode
from services.gateway.modes import Modes
from services.protocol.errors import InvalidInput

ALL = "sanitize,smooth,certify"


def modes(trained: float = 0.25, **changes: Any) -> Modes:
    return Modes(GatewaySettings(**{"artifact": "unused", "victim_url": "http://victim", **changes}), trained)


def test_by_default_there_is_only_one_pass() -> None:
    plan = modes().plan(None, None)
    assert (plan.mode, plan.copies, plan.queries(7)) == ("sanitize", (), 7)
    with pytest.raises(InvalidInput, match="mode 'certify' is not offered here; choose from: sanitize"):
        modes().plan("certify", None)


@pytest.mark.parametrize("order", [ALL, "certify,sanitize,smooth"])
def test_the_first_mode_is_for_those_who_choose_none(order: str) -> None:
    assert modes(modes=order).plan(None, None).mode == order.partition(",")[0]


def test_where_one_pass_is_not_configured_it_cannot_be_chosen() -> None:
    with pytest.raises(InvalidInput, match="not offered here; choose from: smooth"):
        modes(modes="smooth").plan("sanitize", None)


@pytest.mark.parametrize(
    ("mode", "n", "copies", "cost"),
    [
        ("smooth", None, (80,), 240),
        ("smooth", 80, (80,), 240),
        ("smooth", 11, (11,), 33),
        ("certify", None, (50, 400), 1350),
        ("certify", 11, (50, 11), 183),
    ],
)
def test_a_request_may_ask_for_fewer_copies(mode: Mode, n: int | None, copies: tuple[int, ...], cost: int) -> None:
    plan = modes(modes=ALL, smooth_n=80, certify_n0=50, certify_n=400).plan(mode, n)
    assert plan.copies == copies
    assert plan.queries(3) == cost


@pytest.mark.parametrize(("mode", "n"), [("smooth", 81), ("smooth", 10), ("certify", 401), ("certify", 9)])
def test_but_not_for_more_than_configured_nor_for_too_few_to_answer(mode: Mode, n: int) -> None:
    with pytest.raises(InvalidInput, match=rf"n must lie between 1\d .* and \d+ in mode '{mode}', got {n}"):
        modes(modes=ALL, smooth_n=80, certify_n0=50, certify_n=400).plan(mode, n)


def test_n_means_nothing_where_there_are_no_copies() -> None:
    with pytest.raises(InvalidInput, match="n has no meaning in mode 'sanitize'"):
        modes(modes=ALL).plan(None, 20)


@pytest.mark.parametrize("alpha", [0.5, 0.05, 0.001, 1e-6])
def test_the_fewest_copies_are_those_whose_unanimous_votes_are_an_answer(alpha: float) -> None:
    offered = modes(modes=ALL, alpha=alpha)
    # Two-sided: 2 (1/2)^n <= alpha. One-sided: the n-th root of alpha is above 1/2.
    fewest = {"smooth": math.ceil(math.log2(2 / alpha)), "certify": math.floor(math.log2(1 / alpha)) + 1}
    for mode in ("smooth", "certify"):
        n = fewest[mode]
        assert offered.plan(mode, n).copies[-1] == n
        with pytest.raises(InvalidInput, match="always abstain"):
            offered.plan(mode, n - 1)


def test_the_noise_is_the_artifacts_unless_the_settings_say_otherwise() -> None:
    assert modes(0.5, modes="smooth").plan(None, None).sigma == 0.5
    assert modes(0.5, modes="smooth", sigma=0.1).plan(None, None).sigma == 0.1
    assert modes(0, modes="smooth", sigma=0.1).plan(None, None).sigma == 0.1


def test_settings_under_which_nothing_could_ever_be_answered_are_refused() -> None:
    with pytest.raises(InvalidInput, match="trained without noise: mode 'smooth' needs --sigma"):
        modes(0, modes=ALL)
    with pytest.raises(InvalidInput, match=r"--certify-n 9 can never answer anything at --alpha 0.001: .* at least 10"):
        modes(modes=ALL, certify_n=9)
    assert modes(0, smooth_n=1, certify_n=1).plan(None, None).mode == "sanitize"


def test_terms_say_how_an_answer_was_found() -> None:
    offered = modes(modes=ALL, tau=0.9)
    assert offered.plan("sanitize", None).terms() == {"mode": "sanitize"}
    assert offered.plan("smooth", 20).terms(masks=True) == {"mode": "smooth", "sigma": 0.25, "alpha": 0.001, "n": 20}
    certified = {"mode": "certify", "sigma": 0.25, "alpha": 0.001, "n0": 100, "n": 30}
    assert offered.plan("certify", 30).terms() == certified
    assert offered.plan("certify", 30).terms(masks=True) == {**certified, "tau": 0.9}
