import pytest
import torch
from torch import nn

from services.hospital.networks import classifier, folded, segmenter


@pytest.mark.parametrize(("channels", "classes", "size"), [(3, 2, (64, 64)), (1, 2, (32, 48)), (3, 4, (48, 32))])
def test_a_segmenter_answers_a_logit_a_class_and_pixel(channels: int, classes: int, size: tuple[int, int]) -> None:
    logits = segmenter(channels, classes, width=0.125).eval()(torch.rand(2, channels, *size))
    assert logits.shape == (2, classes, *size)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    assert (logits[:, 0] == 0).all() == (classes == 2)
    assert logits[:, 1].std() > 0


def test_width_scales_a_segmenter() -> None:
    narrow, usual = (
        sum(parameter.numel() for parameter in segmenter(3, 2, width=width).parameters()) for width in (0.125, 0.25)
    )
    assert 3 < usual / narrow < 5
    assert 280_000 < usual < 310_000


def test_an_images_answer_does_not_depend_on_its_batch() -> None:
    model = segmenter(3, 2, width=0.125).eval()
    images = torch.rand(5, 3, 32, 32)
    assert torch.allclose(model(images)[3:4], model(images[3:4]), atol=1e-5)


@pytest.mark.parametrize("kind", ["classifier", "segmenter"])
def test_folding_changes_the_layers_and_not_the_function(kind: str) -> None:
    torch.manual_seed(0)
    model = classifier(3, 4, width=0.125, depth="vgg11") if kind == "classifier" else segmenter(3, 2, width=0.125)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as training leaves it: nothing is 0 or 1
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    images = torch.rand(4, 3, 32, 32)
    before = model.eval()(images)
    after = folded(model)(images)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert before.std() > 0.01
    assert torch.allclose(after, before, rtol=1e-4, atol=1e-4 * before.abs().max().item())
