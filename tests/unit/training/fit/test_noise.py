import pytest
import torch

from training.fit.noise import with_noise


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def levels(below: float) -> torch.Tensor:
    clean = torch.full((2000, 1, 16, 16), 0.5)
    return (with_noise(clean, 0.25, generator(), below) - clean).flatten(1).std(1)


def test_all_images_get_the_full_level_unless_told():
    found = levels(0.0)
    assert ((found - 0.25).abs() < 0.06).all()
    clean = torch.zeros(2, 1, 4, 4)
    torch.testing.assert_close(
        with_noise(clean, 0.25, generator()), 0.25 * torch.randn(2, 1, 4, 4, generator=generator())
    )


@pytest.mark.parametrize("below", [0.25, 0.5, 1.0])
def test_a_share_gets_any_level_below(below):
    """Of that share, levels are uniform: half of it lies below half of sigma, a tenth below a tenth."""
    found = levels(below)
    for part in (0.1, 0.5):
        assert (found < part * 0.25).float().mean().item() == pytest.approx(part * below, abs=0.04)
