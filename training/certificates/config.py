"""The configuration of certificates."""

import logging
from typing import Annotated, ClassVar, TypeVar

from pydantic import AliasChoices, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from defense.segmentation_smoothing import TAU, mask_radius
from defense.smoothing import largest_radius
from services.settings import Commas, Config
from training.command.errors import UserError
from training.data.datasets import ImageSet

logger = logging.getLogger(__name__)

_CLASS_N0, _CLASS_N, _CLASS_RADII = 100, 10_000, (0.0, 0.25, 0.5, 0.75)
COMPARED_N, COMPARED_RADII = 1000, (0.0, 0.25, 0.5)
"""Defaults of `training.compare` for images with one class each."""
_MASK_N0, _MASK_N = 10, 100  # suffice for tau = 0.75: unanimous pixels pass Holm's test by far


def _listed(radii: tuple[float, ...]) -> str:
    return ",".join(f"{radius:g}" for radius in radii)


class CertificateConfig(Config):
    """The certificates."""

    class_n: ClassVar[int] = _CLASS_N
    class_radii: ClassVar[tuple[float, ...]] = _CLASS_RADII
    """Defaults of `n` and `radii` for images with one class each."""

    sigma: PositiveFloat = Field(0.25, description="noise, in units of [0,1]")
    n0: PositiveInt | None = Field(
        None, description=f"samples that choose the class (default {_CLASS_N0}; of pixels {_MASK_N0})"
    )
    n: PositiveInt | None = Field(
        None,
        validation_alias=AliasChoices("n", "samples"),  # torchrun takes --n for the beginning of flags of its own
        description=f"samples that bound it (default {_CLASS_N}, to compare {COMPARED_N}; of pixels {_MASK_N})",
    )
    alpha: Annotated[float, Field(gt=0, lt=1)] = Field(0.001, description="failure probability")
    tau: Annotated[float, Field(ge=0.5, lt=1)] | None = Field(
        None, description=f"of masks: share of the samples that must agree on a pixel (default {TAU})"
    )
    radii: Commas[NonNegativeFloat] = Field(
        (),
        description=f"comma-separated L2 radii (default {_listed(_CLASS_RADII)}, to compare {_listed(COMPARED_RADII)}; "
        "of masks the one that tau gives)",
    )

    def radii_at(self, reach: float, tau: float | None) -> tuple[float, ...]:
        """The radii to report, where `reach` is the largest one, of masks (with `tau`) the only one."""
        return self.radii or (self.class_radii if tau is None else (reach,))


K = TypeVar("K", bound=CertificateConfig)


def settled_certificate(config: K, chosen: ImageSet) -> K:
    """Fills in the defaults that depend on the images, and warns of radii that no image can reach.

    Raises UserError if --tau is given for images with one class each.
    """
    if chosen.labels.ndim == 1:
        if config.tau is not None:
            raise UserError("--tau means nothing for images with one class each: leave it out")
        n0, n, tau = config.n0 or _CLASS_N0, config.n or config.class_n, None
    else:
        n0, n, tau = config.n0 or _MASK_N0, config.n or _MASK_N, config.tau or TAU
    reach = furthest(n, config.alpha, config.sigma, tau)
    radii = config.radii_at(reach, tau)
    if tau is None:
        print(f"The largest radius that n = {n} and alpha = {config.alpha:g} can certify is {reach:.3f}")
    else:
        print(f"With tau = {tau:g}, whatever is certified of a mask is certified at radius {reach:.3f}")
    if beyond := [radius for radius in radii if radius > reach]:
        how = "--n" if tau is None else "--tau"
        logger.warning("never certified, however robust: radius %s; raise %s", ", ".join(f"{r:g}" for r in beyond), how)
    return config.model_copy(update={"n0": n0, "n": n, "tau": tau, "radii": radii})


def furthest(n: int, alpha: float, sigma: float, tau: float | None) -> float:
    """The largest L2 radius that can be certified; of masks, with `tau`, the only one."""
    return largest_radius(n, alpha, sigma) if tau is None else mask_radius(tau, sigma)
