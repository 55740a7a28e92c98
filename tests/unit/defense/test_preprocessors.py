import pytest
import torch

from defense.preprocessors import BLUR_SIGMA, PREPROCESSORS, blur, jpeg, median


@pytest.mark.parametrize("name", PREPROCESSORS)
@pytest.mark.parametrize("channels", [1, 3])
def test_shape_and_type_stay_whatever_the_range(name, channels):
    images = 2 * torch.randn(3, channels, 16, 24)
    out = PREPROCESSORS[name](images)
    assert out.shape == images.shape
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", PREPROCESSORS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_flat_image_stays(name, channels):
    images = torch.full((2, channels, 16, 16), 128 / 255)
    torch.testing.assert_close(PREPROCESSORS[name](images), images, atol=1 / 255, rtol=0)


@pytest.mark.parametrize("name", PREPROCESSORS)
def test_images_do_not_see_each_other(name):
    images = torch.rand(4, 1, 16, 16)
    torch.testing.assert_close(PREPROCESSORS[name](images)[2:3], PREPROCESSORS[name](images[2:3]))


def test_jpeg_clamps_rounds_and_loses():
    images = torch.rand(2, 1, 32, 32) * 1.5 - 0.25
    out = jpeg(images)
    assert 0 <= out.min() <= out.max() <= 1
    torch.testing.assert_close(out * 255, (out * 255).round())
    error = (out - images.clamp(0, 1)).abs().mean()
    assert 0.001 < error < 0.1


def test_blur_spreads_a_point_as_a_gaussian():
    images = torch.zeros(1, 1, 15, 15)
    images[..., 7, 7] = 1
    out = blur(images)[0, 0]
    assert out.sum() == pytest.approx(1)
    assert (out[7, 8] / out[7, 7]).item() == pytest.approx(torch.exp(torch.tensor(-0.5 / BLUR_SIGMA**2)).item())
    assert out[7, 10] == 0


def test_median_removes_a_point_and_keeps_an_edge():
    images = torch.zeros(1, 1, 9, 9)
    images[..., 5:] = 1
    spotted = images.clone()
    spotted[..., 4, 1] = 1
    assert torch.equal(median(spotted), images)


def test_median_is_that_of_the_nine_neighbours():
    images = torch.arange(9.0)[torch.randperm(9)].view(1, 1, 3, 3)
    assert median(images)[0, 0, 1, 1] == 4
