import pytest
import torch
from torch import Tensor

from defense.errors import BudgetExhausted, InvalidAnswer
from defense.victims import MeteredVictim, QueryLedger, is_distribution


def softmax_victim(images: Tensor) -> Tensor:
    """Three classes; a smooth function of the image."""
    flat = images.flatten(1)
    return torch.stack([flat.mean(1), flat[:, 0], flat.square().mean(1)], dim=1).mul(5).softmax(1)


def images(count: int = 6) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_ledger_books_by_purpose_and_tells_its_journal_first():
    told = []
    ledger = QueryLedger(10, {"probe": 2}, lambda purpose, count: told.append((purpose, count)))
    ledger.charge("training", 5)
    ledger.charge("probe", 1)
    assert ledger.spent == {"probe": 3, "training": 5}
    assert (ledger.total, ledger.remaining) == (8, 2)
    assert told == [("training", 5), ("probe", 1)]


def test_a_charge_beyond_the_budget_books_nothing_and_the_victim_is_not_asked():
    asked, told = [], []
    ledger = QueryLedger(5, on_charge=lambda *entry: told.append(entry))
    victim = MeteredVictim(lambda batch: asked.append(batch) or softmax_victim(batch), ledger)
    with pytest.raises(BudgetExhausted, match=r"6 queries \(training\) exceed the budget: 0 of 5"):
        victim.query(images(6), "training")
    assert (asked, told, ledger.total) == ([], [], 0)
    victim.query(images(5), "training")
    assert ledger.remaining == 0


def test_without_a_bound_the_ledger_only_counts():
    ledger = QueryLedger()
    ledger.charge("training", 10**9)
    assert (ledger.total, ledger.remaining) == (10**9, None)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.full((5, 3), 1 / 3), r"shape \(5, 3\) for 6 images; expected \(6, 3\)"),
        (torch.full((6, 4), 1 / 4), r"shape \(6, 4\)"),
        (torch.full((6,), 1.0), r"shape \(6,\)"),
        (torch.full((6, 3), float("nan")), "not finite"),
        (torch.full((6, 3), 0.5), "no distribution"),
        (torch.tensor([1.5, -0.5, 0.0]).expand(6, 3), "no distribution"),
    ],
)
def test_nonsense_is_refused(answer, message):
    victim = MeteredVictim(lambda _: answer, QueryLedger(), num_classes=3, kind="probabilities")
    with pytest.raises(InvalidAnswer, match=message):
        victim.query(images(6), "training")


def test_every_query_of_an_image_is_charged():
    ledger = QueryLedger(20)
    victim = MeteredVictim(softmax_victim, ledger, queries_per_image=3)
    victim.query(images(6), "training")
    assert ledger.total == 18
    with pytest.raises(BudgetExhausted, match="the next 3 queries"):
        victim.query(images(1), "training")


def test_zeros_of_rounded_probabilities_are_read_as_half_a_unit():
    victim = MeteredVictim(lambda _: torch.tensor([[1.0, 0.0, 0.0]]), QueryLedger(), kind="probabilities")
    assert victim.query(images(1), "training").tolist() == [[1.0, 0.0, 0.0]]
    victim.rounding = 0.01
    torch.testing.assert_close(victim.query(images(1), "training"), torch.tensor([[1.0, 0.005, 0.005]]))
    victim.rounding = 1.0  # labels
    assert victim.query(images(1), "training").tolist() == [[1.0, 0.0, 0.0]]
    victim.kind, victim.rounding = "logits", 0.01
    assert victim.query(images(1), "training").tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize(("classes", "sharpness"), [(2, 1.0), (4, 3.0), (10, 1.0), (10, 5.0)])
def test_probabilities_that_were_rounded_to_two_digits_are_still_a_distribution(classes, sharpness):
    scores = torch.randn(2000, classes, generator=torch.Generator().manual_seed(0)).mul(sharpness).softmax(1)
    assert is_distribution(scores)
    assert is_distribution(torch.round(scores, decimals=2))
    assert not is_distribution(torch.randn(20, classes))
    assert not is_distribution(2 * scores)
