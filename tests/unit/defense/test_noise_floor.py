from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from defense.errors import BudgetExhausted, DefenseError
from defense.estimators import sample_directions
from defense.noise_floor import ProbeReport, probe, probe_queries
from defense.objectives import stability_loss
from defense.victims import MeteredVictim, QueryLedger, Victim
from defense.votes import VotingVictim

SIDE, K = 8, 3
WEIGHTS = torch.randn(SIDE * SIDE, 24, generator=torch.Generator().manual_seed(7)) * 0.4
OUT = torch.randn(24, K, generator=torch.Generator().manual_seed(8)) * 0.6


def logits(images: Tensor) -> Tensor:
    """A smooth network of one hidden layer."""
    return torch.tanh((images - 0.5).flatten(1) @ WEIGHTS) @ OUT


def exact(images: Tensor) -> Tensor:
    return logits(images).softmax(1)


def rounded(images: Tensor) -> Tensor:
    return torch.round(exact(images), decimals=4)


def eight_bits(images: Tensor) -> Tensor:
    return exact((images * 255).round() / 255)


def one_hot(images: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(logits(images).argmax(1), K).float()


def with_noise(s: float) -> Victim:
    generator = torch.Generator().manual_seed(0)
    return lambda images: logits(images) + s * torch.randn(len(images), K, generator=generator)


def clamp(points: Tensor) -> Tensor:
    return points.clamp(0, 1)


def images(count: int = 32, seed: int = 0) -> Tensor:
    return 0.2 + 0.6 * torch.rand(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def points(count: int = 32, seed: int = 0) -> Tensor:
    noise = torch.randn(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed + 1))
    return images(count, seed) + 0.05 * noise


def probed(answer: Victim, count: int = 32, **options) -> tuple[ProbeReport, MeteredVictim]:
    victim = MeteredVictim(answer, QueryLedger())
    generator = torch.Generator().manual_seed(3)
    return probe(victim, images(count), points(count), clamp, generator, **options), victim


@dataclass
class Slopes:
    """Measured and true derivatives along one direction at each of many points."""

    answer: Victim
    report: ProbeReport

    def correlation(self, mu: float) -> float:
        z, targets = points(200, 5), exact(images(200, 5)).argmax(1)
        u = sample_directions(200, 1, SIDE * SIDE, "sphere", torch.Generator().manual_seed(9)).view_as(z)
        at = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(stability_loss(logits(clamp(at)), targets, "logits").sum(), at)
        true = (gradient * u).flatten(1).sum(1)
        victim = MeteredVictim(
            self.answer, QueryLedger(), kind=self.report.kind, rounding=self.report.rounding
        )  # as training sees it
        at = torch.cat([z, z + mu * u]) if self.report.difference == "forward" else torch.cat([z - mu * u, z + mu * u])
        losses = stability_loss(victim.query(clamp(at), "slopes"), targets.repeat(2), self.report.kind)
        measured = losses[200:] - losses[:200]
        return 0.0 if not measured.any() else torch.corrcoef(torch.stack([measured, true]))[0, 1].item()


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize(
    ("answer", "rounding"),
    [(exact, None), (rounded, 1e-4), (eight_bits, None), (with_noise(1e-3), None)],
    ids=["float32", "rounded", "8-bit", "noise"],
)
def test_the_step_found_measures_true_slopes_about_as_well_as_any(answer, rounding, difference):
    report, victim = probed(answer, difference=difference)
    assert report.rounding == victim.rounding == rounding
    assert report.num_classes == victim.num_classes == K
    assert report.kind == victim.kind
    assert report.is_resolved, report.describe()
    report.require_step()
    assert "formula 5" in report.describe()
    slopes = Slopes(answer, report)
    best = max(slopes.correlation(0.005 * 2**k) for k in range(9))
    assert slopes.correlation(report.mu) > max(0.9, best - 0.05)


def test_coarse_answers_take_longer_steps_than_fine_ones():
    steps = [probed(answer)[0].mu for answer in (exact, rounded, eight_bits)]
    assert steps[0] < steps[1] < steps[2]


@pytest.mark.parametrize("s", [1e-4, 1e-3, 1e-2])
def test_the_noise_of_a_noisy_victim_is_measured(s):
    report, _ = probed(with_noise(s))
    victim, targets = with_noise(s), exact(images()).argmax(1)
    clamped = clamp(points())
    repeats = torch.stack([stability_loss(victim(clamped), targets, "logits") for _ in range(200)])
    looked_at = repeats.mean(0).topk(8).indices  # where the loss is large, so is its noise
    assert report.noise == pytest.approx(repeats[:, looked_at].std(0).square().mean().sqrt().item(), rel=0.5)


def test_a_victim_of_noise_is_refused_with_what_was_measured():
    report, _ = probed(with_noise(1.0))
    assert not report.is_resolved
    assert report.resolved == ()
    with pytest.raises(DefenseError, match=r"stands clear .*at most 0\.5 would do.*s = \d.*--wire tensor") as caught:
        report.require_step()
    assert "\n" not in str(caught.value)


def test_labels_are_refused_by_name_unless_no_difference_is_needed():
    report, victim = probed(one_hot)
    assert report.label_only
    assert victim.rounding == 1.0
    with pytest.raises(DefenseError, match=r"were labels.*--votes V"):
        report.require_step()
    report, victim = probed(one_hot, mu=0.1)
    with pytest.raises(DefenseError, match="were labels"):
        report.require_step()
    report, victim = probed(one_hot, needs_differences=False)
    report.require_step()
    assert "labels without scores" in report.describe()
    assert victim.ledger.spent == {"probe": probe_queries(32, needs_differences=False)} == {"probe": 80}


def test_votes_are_probabilities_and_every_one_of_them_is_charged():
    asked = 0

    def counting(batch: Tensor) -> Tensor:
        nonlocal asked
        asked += len(batch)
        return one_hot(batch)

    voting = VotingVictim(counting, votes=40, noise=0.2, seed=0)
    victim = MeteredVictim(voting, QueryLedger(), queries_per_image=40)
    report = probe(victim, images(), points(), clamp, torch.Generator().manual_seed(3))
    assert not report.label_only
    assert report.kind == "probabilities"
    assert victim.ledger.spent == {"probe": asked} == {"probe": 40 * probe_queries(32)}
    assert 0.05 < report.noise < 0.5


def test_enough_votes_let_a_victim_of_labels_be_learned_from():
    votes = VotingVictim(one_hot, votes=400, noise=0.3, seed=0)
    report = probe(MeteredVictim(votes, QueryLedger()), images(), points(), clamp, torch.Generator().manual_seed(3))
    assert report.is_resolved, report.describe()
    assert report.mu > 0.1
    assert Slopes(votes, report).correlation(report.mu) > 0.7  # of the shares' slopes, which are not the scores'


def test_a_given_step_is_kept_and_judged():
    report, _ = probed(eight_bits, mu=0.005)
    assert report.mu == 0.005
    assert not report.is_resolved
    assert "(given) is NOT resolved" in report.describe()
    assert "use --mu auto" in report.describe()
    report.require_step()  # whoever gives a number takes the risk
    probed(with_noise(1.0), mu=0.1)[0].require_step()
    report, _ = probed(exact, mu=0.007)
    assert (report.mu, report.is_resolved) == (0.007, True)
    assert "mu = 0.007 (given) is resolved" in report.describe()


@pytest.mark.parametrize(("count", "spent"), [(2, 84), (6, 92), (32, 384)])
def test_the_queries_are_few_and_counted(count, spent):
    _, victim = probed(exact, count)
    assert victim.ledger.spent == {"probe": spent} == {"probe": probe_queries(count)}


def test_a_budget_below_the_probe_is_refused_before_anything_is_sent():
    victim = MeteredVictim(exact, QueryLedger(767), queries_per_image=2)
    with pytest.raises(BudgetExhausted, match=r"takes 768 queries, 767 are left: raise --max-queries"):
        probe(victim, images(), points(), clamp, torch.Generator())
    assert victim.ledger.total == 0


def test_images_on_which_the_victim_is_sure_do_not_hide_that_a_step_is_resolved():
    def sure_of_dark_images(batch: Tensor) -> Tensor:
        return torch.cat([logits(batch)[:, :2], torch.full((len(batch), 1), -9.0)], dim=1) * torch.where(
            batch.flatten(1).mean(1, keepdim=True) < 0.25, 50.0, 1.0
        )

    def probabilities(batch: Tensor) -> Tensor:
        return sure_of_dark_images(batch).softmax(1)

    batch = torch.cat([0.1 * images(28), images(4, 1)])
    victim = MeteredVictim(probabilities, QueryLedger())
    assert probe(victim, batch, batch.clone(), clamp, torch.Generator().manual_seed(0)).is_resolved


def test_a_victim_that_is_sure_of_everything_is_not_resolved():
    report, _ = probed(lambda batch: torch.tensor([[0.9, 0.05, 0.05]]).repeat(len(batch), 1))
    assert not report.is_resolved
    with pytest.raises(DefenseError, match="NOT resolved, relative error of a slope inf"):
        report.require_step()


def test_an_image_whose_answer_depends_on_its_batch_counts_as_noise():
    def position_dependent(batch: Tensor) -> Tensor:
        answer = exact(batch)
        answer[0] = answer[0].roll(1)
        return answer

    assert probed(position_dependent)[0].noise > 1e-2


@pytest.mark.parametrize("digits", [2, 3, 5])
def test_the_unit_of_rounded_probabilities_is_found(digits):
    def coarse(batch: Tensor) -> Tensor:
        return torch.round(exact(batch).double(), decimals=digits).float()

    assert probed(coarse)[0].rounding == 10.0**-digits


def test_probabilities_that_are_nearly_labels_are_no_labels():
    def sure(batch: Tensor) -> Tensor:
        return (60 * logits(batch)).double().softmax(1).float()

    assert probed(sure)[0].rounding is None
