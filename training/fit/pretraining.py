"""Pre-training of denoiser and autoencoder on unlabelled images, without a victim query.

The denoiser is the zero-query baseline of denoised smoothing (Salman et al. 2020, the MSE objective).
"""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Final, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from defense.artifact import Provenance, load_artifact, save_artifact
from defense.autoencoders import LinearAutoencoder
from defense.denoisers import WienerUNetDenoiser
from defense.errors import ArtifactError
from defense.objectives import denoising_loss
from defense.sanitizer import ImageShape, Sanitizer, SanitizerConfig
from training.command.errors import UserError
from training.command.provenance import versions
from training.data.datasets import Splits
from training.fit.config import PretrainConfig, PretrainedName
from training.fit.noise import with_noise

logger = logging.getLogger(__name__)

SANITIZERS: Final[tuple[PretrainedName, ...]] = get_args(PretrainedName)
"""The two artifacts that pre-training writes, by folder name."""

_BATCH = 64
_BELOW = 0.5  # share of the images with less noise than sigma
_LEARNING_RATE = 2e-3
_COMPONENTS = 192  # of the Wiener filter, where there are enough images to tell them from noise


def pretrain(config: PretrainConfig, splits: Splits, out: Path, device: torch.device) -> None:
    """Pre-trains on the training split and writes both artifacts below `out`.

    Raises UserError if there are too few images, or the code is too large, for these models.
    """
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    images = splits.train.images
    channels, height, width = images.shape[1:]
    shape = ImageShape.model_validate({"channels": channels, "height": height, "width": width})
    try:
        sanitizer = Sanitizer(
            SanitizerConfig(
                input=shape,
                denoiser=config.denoiser,
                components=min(_COMPONENTS, len(images) // 2, torch.Size(shape.dimensions).numel() // 2),
                autoencoder=config.autoencoder,
                code=config.code,
            )
        ).to(device)
        sanitizer.to(memory_format=torch.channels_last)
        _fit_components(sanitizer, images, generator)
    except ValueError as error:
        raise UserError(f"{error}; choose a smaller --code, or --autoencoder conv") from error
    autoencoder = sanitizer.autoencoder
    assert autoencoder is not None  # the configuration names one

    sigma, steps = config.sigma, config.pretrain_steps
    minimize_squared_error(
        sanitizer.denoiser, images, lambda clean: with_noise(clean, sigma, generator, below=_BELOW), steps, generator
    )
    minimize_squared_error(autoencoder, images, lambda clean: clean, math.ceil(steps / 2), generator)
    for name in SANITIZERS:
        part = sanitizer if name != "denoiser" else sanitizer.denoiser_alone()
        psnr = _validation_psnr(part, splits.validation.images, sigma, config.seed)
        logger.info("%s: %s", name, ", ".join(f"{key} {value:.2f} dB" for key, value in psnr.items()))
        save_artifact(
            out / name,
            part,
            name=f"mse-{name}",
            labels=[],
            sigma=sigma,
            queries={},
            provenance=Provenance(
                method="mse",
                estimator=None,
                data=splits.name,
                data_fingerprint=splits.fingerprint,
                settings=config.model_dump(mode="json"),
                versions=versions(),
                validation=psnr,
            ),
        )


def load_pretrained(folder: Path, name: PretrainedName, splits: Splits, sigma: float) -> Sanitizer:
    """The sanitizer `name` that `pretrain` wrote to `folder`, to be trained on `splits` for noise of `sigma`.

    Raises ArtifactError if it is missing or was made for another image shape or sigma.
    """
    artifact = load_artifact(folder / name)
    manifest = artifact.manifest
    expected = tuple(splits.train.images.shape[1:])
    if manifest.input.dimensions != expected:
        raise ArtifactError(
            f"{folder} was pre-trained on images of shape {manifest.input.dimensions}, "
            f"these have {expected}: pre-train again, or use the same --size and --channels"
        )
    if manifest.sigma != sigma:
        raise ArtifactError(f"{folder} was pre-trained for sigma {manifest.sigma}, not {sigma}: pre-train again")
    if manifest.provenance.data_fingerprint != splits.fingerprint:
        logger.warning(
            "%s was pre-trained on other images or another split of them: it may have seen images of your test split",
            folder,
        )
    return artifact.sanitizer


def minimize_squared_error(
    module: nn.Module,
    images: Tensor,
    corrupt: Callable[[Tensor], Tensor],
    steps: int,
    generator: torch.Generator,
) -> None:
    """Trains `module` to map corrupted batches of `images` (M, C, H, W) in [0, 1] back to clean ones.

    Uses Adam with warm-up and cosine decay; the generator of the batches is on the CPU.
    """
    device = next(module.parameters()).device
    module.train()
    optimizer = torch.optim.Adam((p for p in module.parameters() if p.requires_grad), _LEARNING_RATE)
    warm_up = max(1, min(50, steps // 10))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up) * (0.01 + 0.99 * math.cos(math.pi / 2 * step / steps))
    )
    progress = tqdm(range(steps), desc=f"pre-training {type(module).__name__}", unit="step", mininterval=1)
    for _ in progress:
        clean = images[torch.randint(len(images), (_BATCH,), generator=generator)].to(device)
        loss = denoising_loss(module(corrupt(clean)), clean).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        progress.set_postfix(mse=f"{loss.item():.5f}", refresh=False)
    module.eval()


def _fit_components(sanitizer: Sanitizer, images: Tensor, generator: torch.Generator) -> None:
    if isinstance(sanitizer.denoiser, WienerUNetDenoiser):
        sanitizer.denoiser.components.fit(images, generator)
    if isinstance(sanitizer.autoencoder, LinearAutoencoder):
        sanitizer.autoencoder.fit_components(images, generator)


@torch.no_grad()
def _validation_psnr(sanitizer: nn.Module, images: Tensor, sigma: float, seed: int) -> dict[str, float]:
    device = next(sanitizer.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    errors: dict[str, list[Tensor]] = {"psnr_clean": [], f"psnr_sigma_{sigma:g}": []}
    for clean in images.split(256):
        noisy = with_noise(clean, sigma, generator)
        for key, batch in zip(errors, (clean, noisy), strict=True):
            errors[key].append(denoising_loss(sanitizer(batch.to(device)).cpu(), clean))
    return {key: -10 * torch.cat(values).mean().log10().item() for key, values in errors.items()}
