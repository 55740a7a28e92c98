import math

import pytest
import torch
from torch import Tensor

from defense.errors import InvalidAnswer
from defense.objectives import stability_loss
from defense.victims import MeteredVictim, QueryLedger
from defense.votes import VotingVictim

K = 3


class Labels:
    """A victim that answers labels: class 0 where the mean of an image is below a half, else class 1, never class 2."""

    def __init__(self) -> None:
        self.received: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.received.append(images)
        return torch.nn.functional.one_hot((images.mean((1, 2, 3)) >= 0.5).long(), K).float()


def images(*levels: float) -> Tensor:
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()


def test_shares_are_those_of_the_noisy_copies_labels():
    # The mean of 16 pixels with noise 0.1 has deviation 0.025; 0.475 is one of them below a half.
    shares = VotingVictim(Labels(), votes=4000, noise=0.1, seed=0)(images(0.3, 0.475, 0.5))
    expected = 0.5 * math.erfc(1 / math.sqrt(2))
    assert shares[0, 1] < 1e-3
    assert shares[1, 1] == pytest.approx(expected, abs=0.02)
    assert shares[2, 1] == pytest.approx(0.5, abs=0.03)
    torch.testing.assert_close(shares.sum(1), torch.ones(3))


def test_every_copy_is_sent_once_inside_the_range_with_its_own_noise():
    labels = Labels()
    VotingVictim(labels, votes=5, noise=0.5, seed=0)(images(0.0, 1.0))
    copies = torch.cat(labels.received)
    assert len(copies) == 10
    assert copies.min() == 0
    assert copies.max() == 1
    assert len({tuple(copy.flatten().tolist()) for copy in copies}) == 10


def test_the_ledger_counts_every_vote():
    labels = Labels()
    voting = VotingVictim(labels, votes=7, noise=0.1, seed=0)
    victim = MeteredVictim(voting, QueryLedger(), queries_per_image=voting.queries_per_image)
    victim.query(images(0.1, 0.2, 0.3), "training")
    assert victim.ledger.spent == {"training": 21}
    assert sum(map(len, labels.received)) == 21


def test_the_loss_is_bounded_also_where_a_label_got_no_vote():
    votes = 16
    shares = VotingVictim(Labels(), votes=votes, noise=0.0, seed=0)(images(0.1))
    losses = stability_loss(shares.expand(2, K), torch.tensor([0, 2]), "probabilities")
    assert losses[0] == pytest.approx(math.log(1 + (K - 1) / (2 * votes + 1)), rel=1e-4)
    assert losses[1] == pytest.approx(math.log(2 * votes + K), rel=1e-4)


def test_the_same_seed_gives_the_same_votes_and_a_second_call_others():
    one, other = (VotingVictim(Labels(), votes=9, noise=0.1, seed=3) for _ in range(2))
    batch = images(*([0.5] * 20))
    first = one(batch)
    assert torch.equal(first, other(batch))
    assert not torch.equal(first, one(batch))


@pytest.mark.parametrize("arguments", [{"votes": 0, "noise": 0.1}, {"votes": 2, "noise": -0.1}])
def test_impossible_votes_are_refused(arguments):
    with pytest.raises(ValueError, match="votes must be at least 1"):
        VotingVictim(Labels(), seed=0, **arguments)


@pytest.mark.parametrize("answer", [torch.zeros(2), torch.zeros(3, 2), torch.full((2, 2), float("nan"))])
def test_nonsense_is_refused(answer):
    with pytest.raises(InvalidAnswer):
        VotingVictim(lambda _: answer, votes=2, noise=0.1, seed=0)(images(0.1, 0.2))
