"""What nobody means: each kind stays in range, repeats, and grows with its severity."""

import pytest
import torch

from defense.corruptions import CORRUPTIONS, SEVERITIES, corrupt


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_grows_with_its_severity(name: str, channels: int) -> None:
    rows = 0.5 + 0.4 * torch.linspace(0, 9, 32).sin()
    image = 0.5 * (rows[:, None] + rows).expand(2, channels, 32, 32)
    images = image + 0.01 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    images = images.clamp(0, 1)
    sizes = []
    for severity in SEVERITIES:
        changed = corrupt(name, images, severity)
        assert changed.shape == images.shape
        assert changed.dtype == torch.float32
        assert changed.min() >= 0
        assert changed.max() <= 1
        assert torch.equal(changed, corrupt(name, images, severity))
        sizes.append(float((changed - images).abs().mean()))
    assert 0 < sizes[0] < sizes[1] < sizes[2]


def test_unknown_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="no corruption 'rain'"):
        corrupt("rain", torch.zeros(1, 1, 8, 8), 1)
    with pytest.raises(ValueError, match="severity 4"):
        corrupt("blur", torch.zeros(1, 1, 8, 8), 4)
