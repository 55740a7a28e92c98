import pytest
import torch
from torch import Tensor

from defense.errors import BudgetExhausted, InvalidAnswer
from defense.victims import MeteredVictim, QueryLedger, probe


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


def test_the_probe_finds_an_exact_victim_exact():
    victim = MeteredVictim(softmax_victim, QueryLedger())
    report = probe(victim, images(), images() + 0.01, mu=0.08)
    assert (report.num_classes, report.kind) == (3, "probabilities")
    assert report.noise < 1e-6
    assert report.resolves_mu
    assert "resolved" in report.describe()
    assert victim.ledger.spent == {"probe": 24}
    assert (victim.num_classes, victim.kind) == (3, "probabilities")


def test_the_probe_measures_the_noise_of_a_noisy_victim():
    noise, s = torch.Generator().manual_seed(0), 0.1

    def noisy_logits(batch: Tensor) -> Tensor:
        mean = batch.flatten(1).mean(1)
        # The loss of two logits (a, 0) moves by about half of a's move where a is near zero.
        return torch.stack([mean + 2 * s * torch.randn(len(batch), generator=noise), 0 * mean], dim=1)

    victim = MeteredVictim(noisy_logits, QueryLedger())
    report = probe(victim, images(400) * 0, images(400) * 0 + 1e-3, mu=0.008)
    assert report.kind == "logits"
    assert report.noise == pytest.approx(s, rel=0.15)
    assert not report.resolves_mu
    assert "NOT resolved" in report.describe()


def test_images_on_which_the_victim_is_sure_do_not_hide_that_a_step_is_resolved():
    def sure_of_bright_images(batch: Tensor) -> Tensor:
        score = 1000 * batch.flatten(1).mean(1)
        return torch.stack([score, 0 * score], dim=1).softmax(1)

    batch = torch.cat([torch.ones(5, 1, 8, 8), torch.zeros(1, 1, 8, 8)])
    moved = torch.cat([torch.ones(5, 1, 8, 8) - 1e-3, torch.full((1, 1, 8, 8), 1e-3)])
    report = probe(MeteredVictim(sure_of_bright_images, QueryLedger()), batch, moved, mu=0.008)
    assert report.resolves_mu


def test_an_image_whose_answer_depends_on_its_batch_counts_as_noise():
    def position_dependent(batch: Tensor) -> Tensor:
        first = softmax_victim(batch)
        first[0] = first[0].roll(1)
        return first

    victim = MeteredVictim(position_dependent, QueryLedger())
    assert probe(victim, images(), images(), 0.005).noise > 1e-3
