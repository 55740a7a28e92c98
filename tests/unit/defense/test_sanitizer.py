import pytest
import torch
from torch import Tensor

from defense.autoencoders import LinearAutoencoder, build_autoencoder
from defense.components import PrincipalComponents
from defense.denoisers import WienerUNetDenoiser, build_denoiser
from defense.layers import FoldedUNet
from defense.sanitizer import ImageShape, Sanitizer, SanitizerConfig

SHAPES = [(1, 16, 16), (3, 13, 21)]


def low_rank_images(count: int, shape: tuple[int, int, int], rank: int, seed: int = 0) -> Tensor:
    """Images that live exactly in a `rank`-dimensional subspace around a mean, with falling variances."""
    generator = torch.Generator().manual_seed(seed)
    dimension = torch.Size(shape).numel()
    basis = torch.linalg.qr(torch.randn(dimension, rank, generator=torch.Generator().manual_seed(99))).Q
    scales = torch.arange(rank, 0, -1.0)
    return (torch.randn(count, rank, generator=generator) * scales @ basis.T + 0.5).view(count, *shape)


def test_components_recover_a_subspace_and_its_variances():
    images = low_rank_images(3000, (1, 8, 8), rank=4)
    components = PrincipalComponents((1, 8, 8), 4)
    components.fit(images, torch.Generator().manual_seed(0))
    torch.testing.assert_close(components.variance, torch.tensor([16.0, 9.0, 4.0, 1.0]), rtol=0.1, atol=0)
    torch.testing.assert_close(components.basis @ components.basis.T, torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(components.expand(components.project(images)), images, atol=1e-4, rtol=0)


def test_components_agree_with_the_full_decomposition():
    images = torch.rand(200, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    components = PrincipalComponents((1, 6, 6), 5)
    components.fit(images, torch.Generator().manual_seed(0))
    flat = images.flatten(1) - images.flatten(1).mean(0)
    exact = torch.linalg.svdvals(flat)[:5].square() / len(images)
    torch.testing.assert_close(components.variance, exact, rtol=0.05, atol=0)


def test_too_few_images_for_the_components_are_refused():
    with pytest.raises(ValueError, match="4 principal components need more than 4 images, got 4"):
        PrincipalComponents((1, 8, 8), 4).fit(torch.rand(4, 1, 8, 8), torch.Generator())


@pytest.mark.parametrize("count", [0, 65])
def test_an_impossible_number_of_components_is_refused(count):
    with pytest.raises(ValueError, match="between 1 and 64"):
        PrincipalComponents((1, 8, 8), count)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["wiener-unet", "unet", "dncnn-small"])
def test_denoisers_keep_the_shape_and_do_not_mix_images(name, shape):
    denoiser = build_denoiser(name, shape, 20).eval()
    images = torch.rand(3, *shape)
    with torch.no_grad():
        together, alone = denoiser(images), denoiser(images[1:2])
    assert together.shape == images.shape
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)


def test_the_published_denoiser_has_17_layers_of_64_features():
    convolutions = [m for m in build_denoiser("dncnn", (1, 8, 8), 4).modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 17
    assert {m.out_channels for m in convolutions[:-1]} == {64}


def test_the_wiener_filter_is_nearly_the_best_linear_denoiser():
    """Where images are Gaussian in a known subspace, the filter's error is the closed form's: sum v s^2 / (v + s^2)."""
    shape, sigma = (1, 16, 16), 0.8
    denoiser = WienerUNetDenoiser(shape, components=4)
    denoiser.components.fit(low_rank_images(4000, shape, rank=4), torch.Generator().manual_seed(0))
    clean = low_rank_images(2000, shape, rank=4, seed=1)
    noisy = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    error = (denoiser.filter(noisy) - clean).square().flatten(1).sum(1).mean().item()
    variances = torch.tensor([16.0, 9.0, 4.0, 1.0])
    assert error == pytest.approx((variances * sigma**2 / (variances + sigma**2)).sum().item(), rel=0.1)


def test_an_untrained_folded_u_net_answers_zeros():
    assert FoldedUNet(2, 1, 8)(torch.rand(2, 2, 13, 21)).abs().max() == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["linear", "conv"])
def test_autoencoders_have_the_code_they_announce(name, shape):
    autoencoder = build_autoencoder(name, shape, 12)
    codes = autoencoder.encode(torch.rand(3, *shape))
    assert codes.shape == (3, *autoencoder.code_shape)
    assert autoencoder.code_dimension == codes[0].numel() >= 12
    assert autoencoder.decode(codes).shape == (3, *shape)
    assert autoencoder(torch.rand(3, *shape)).shape == (3, *shape)


def test_a_fitted_linear_autoencoder_reconstructs_what_its_code_can_hold_and_whitens():
    shape = (1, 16, 16)
    images = low_rank_images(2000, shape, rank=6)
    autoencoder = LinearAutoencoder(shape, 6)
    autoencoder.fit_components(images, torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(autoencoder(images), images, atol=1e-3, rtol=0)
        torch.testing.assert_close(autoencoder.encode(images).std(0), torch.ones(6), atol=0.05, rtol=0)


@pytest.mark.parametrize("code", [0, 256])
def test_a_code_that_is_no_reduction_is_refused(code):
    with pytest.raises(ValueError, match=r"fewer numbers than the image \(256\)"):
        build_autoencoder("conv", (1, 16, 16), code)


@pytest.mark.parametrize("autoencoder", [None, "linear", "conv"])
def test_a_sanitizer_is_its_two_halves_and_answers_images(autoencoder):
    config = SanitizerConfig(
        input=ImageShape(channels=1, height=16, width=16), denoiser="unet", autoencoder=autoencoder, code=8
    )
    sanitizer = Sanitizer(config).eval()
    noisy = 3 * torch.randn(4, 1, 16, 16)
    with torch.no_grad():
        points = sanitizer.encode(noisy)
        sanitized = sanitizer(noisy)
        assert torch.equal(sanitized, sanitizer.decode(points))
    assert points[0].numel() == sanitizer.border_dimension == (256 if autoencoder is None else 8)
    assert 0 <= sanitized.min() <= sanitized.max() <= 1


@pytest.mark.parametrize("autoencoder", ["linear", "conv"])
def test_a_frozen_decoder_gets_no_gradient_and_the_encoder_does(autoencoder):
    config = SanitizerConfig(
        input=ImageShape(channels=1, height=16, width=16), denoiser="unet", autoencoder=autoencoder, code=8
    )
    sanitizer = Sanitizer(config)
    sanitizer.freeze_decoder()
    points = sanitizer.encode(torch.rand(2, 1, 16, 16))
    points.sum().backward()
    frozen = {id(p) for p in sanitizer.autoencoder.decoder_parameters()}
    assert frozen
    for parameter in sanitizer.parameters():
        assert (parameter.grad is None) == (id(parameter) in frozen)
