"""Where artifacts come from: one folder, or a folder of numbered versions as in Triton's model repositories.

    defense/manifest.json ...          a single artifact, which is version 1
    defense/1/manifest.json ...        versions: folders numbered from 1; the highest is the newest
    defense/2/manifest.json ...

An incompletely copied version is refused, as hashes do not match; `training.zo_fit` writes the manifest last.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from defense.artifact import MANIFEST_FILE, Artifact, load_artifact
from defense.errors import ArtifactError
from services.upstream import Array

SINGLE: Final = "1"
"""The version of an artifact that has no number."""

_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_CLOSE = 1e-3  # two passes on one device may differ in the last digits


@dataclass(frozen=True)
class Version:
    """An artifact, loaded and tried, and its number."""

    number: str
    artifact: Artifact


class Repository:
    """The versions in `path`, an artifact's folder or one of numbered versions. Methods read the disk each time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def numbers(self) -> tuple[str, ...]:
        """The numbers of all versions that have a manifest, ascending; empty where there is none."""
        if (self._path / MANIFEST_FILE).exists():
            return (SINGLE,)
        try:
            folders = [one for one in self._path.iterdir() if _NUMBER.fullmatch(one.name)]
        except OSError:
            return ()
        return tuple(sorted((one.name for one in folders if (one / MANIFEST_FILE).exists()), key=int))

    def load(self, number: str | None = None) -> Version:
        """Loads a version (None: the newest) and tries its sanitizer on synthetic images.

        Raises:
            ArtifactError: the version is missing or incomplete, or its output is not an image.
        """
        numbers = self.numbers()
        if not numbers:
            raise ArtifactError(f"{self._path} holds neither an artifact nor folders 1, 2, ... that do")
        if number is not None and number not in numbers:
            raise ArtifactError(f"there is no version {number[:20]!r}; there are {', '.join(numbers)}")
        chosen = number or numbers[-1]
        single = (self._path / MANIFEST_FILE).exists()
        artifact = load_artifact(self._path if single else self._path / chosen)
        _try(artifact, chosen)
        return Version(chosen, artifact)


def probes(shape: tuple[int, int, int]) -> Array:
    """Four synthetic images (4,C,H,W) in [0,1]: black, grey, a gradient, and fixed noise."""
    slope = np.linspace(0, 1, shape[-1], dtype=np.float32)
    noise = np.random.default_rng(0).random(shape, np.float32)
    flat = [np.full(shape, level, np.float32) for level in (0.0, 0.5)]
    return np.stack([*flat, np.broadcast_to(slope, shape), noise])


@torch.inference_mode()
def _try(artifact: Artifact, number: str) -> None:
    """Passes the probes through twice. Raises ArtifactError if shape or range is wrong, or the outputs differ."""
    shape = artifact.manifest.input
    images = torch.from_numpy(probes((shape.channels, shape.height, shape.width)))
    first, second = artifact.sanitizer(images), artifact.sanitizer(images)
    if first.shape != images.shape or not bool(((first >= 0) & (first <= 1)).all()):
        raise ArtifactError(f"version {number} failed its self-test: what its sanitizer returns are no images in [0,1]")
    if not torch.allclose(first, second, atol=_CLOSE):
        raise ArtifactError(f"version {number} failed its self-test: its sanitizer is not the same function twice")
