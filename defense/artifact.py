"""The sanitizer on disk: `model-<hash>.safetensors` and `manifest.json`, whole or absent, checked when read.

The manifest is renamed into place last, which switches from an old artifact to a new one. Weights are raw tensors and
the manifest is validated JSON: nothing can execute code.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from defense.errors import ArtifactError
from defense.files import replace_file
from defense.sanitizer import ImageShape, Sanitizer, SanitizerConfig

MANIFEST_FILE: Final = "manifest.json"
FORMAT: Final = "zo-gateway-artifact-1"


MethodName = Literal["mse", "zo-ds", "zo-ae-ds", "fo-ds", "fo-ae-ds"]


class Provenance(BaseModel):
    """How a sanitizer came to be.

    Attributes:
        method: "mse" (no queries), "zo-ds" or "zo-ae-ds" (queries, without or with an autoencoder, by whichever
            estimator), or, with an open model, "fo-ds" or "fo-ae-ds".
        estimator: The estimator and its settings; None where no gradient was estimated.
        data_fingerprint: SHA-256 of the images and their splits.
        validation: The figures by which this state was chosen.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: MethodName
    estimator: JsonValue
    data: str
    data_fingerprint: str
    settings: dict[str, JsonValue]
    versions: dict[str, str]
    validation: dict[str, float]


class Manifest(BaseModel):
    """The content of `manifest.json`.

    Attributes:
        id: First 16 hexadecimal digits of the SHA-256 over all else in the manifest, the weights' hash included.
        labels: The victim's classes in the order of its scores; empty where the victim was never asked.
        sigma: Standard deviation of the noise it was trained for, in units of [0,1].
        queries: Victim queries spent, in images, by purpose.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    name: str
    task: Literal["classification"]
    labels: list[str]
    architecture: SanitizerConfig
    sigma: float = Field(ge=0)
    queries: dict[str, int]
    provenance: Provenance
    weights_sha256: str
    format: Literal["zo-gateway-artifact-1"] = FORMAT

    @property
    def input(self) -> ImageShape:
        """Shape of the images it takes and returns; their range is [0, 1]."""
        return self.architecture.input

    @property
    def weights_file(self) -> str:
        """Name of the file that holds the weights."""
        return f"model-{self.weights_sha256[:16]}.safetensors"

    @property
    def queries_spent(self) -> int:
        """All victim queries spent to learn it, in images."""
        return sum(self.queries.values())


@dataclass(frozen=True)
class Artifact:
    """A sanitizer, ready to serve, and what is known of it."""

    sanitizer: Sanitizer
    manifest: Manifest


def save_artifact(
    path: str | Path,
    sanitizer: Sanitizer,
    *,
    name: str,
    labels: list[str],
    sigma: float,
    queries: dict[str, int],
    provenance: Provenance,
) -> Manifest:
    """Writes an artifact; an older one in the folder is replaced only when the new one is complete; see `Manifest`."""
    folder = Path(path)
    weights = save_tensors({key: value.detach().cpu().contiguous() for key, value in sanitizer.state_dict().items()})
    draft = Manifest(
        id="",
        name=name,
        task="classification",
        labels=labels,
        architecture=sanitizer.config,
        sigma=sigma,
        queries=queries,
        provenance=provenance,
        weights_sha256=hashlib.sha256(weights).hexdigest(),
    )
    manifest = draft.model_copy(update={"id": _content_id(draft)})
    replace_file(folder / manifest.weights_file, weights)
    replace_file(folder / MANIFEST_FILE, (manifest.model_dump_json(indent=2) + "\n").encode())
    for older in folder.glob("model-*.safetensors"):
        if older.name != manifest.weights_file:
            older.unlink()
    return manifest


def load_artifact(path: str | Path) -> Artifact:
    """Reads an artifact in evaluation mode on the CPU; checks layout, hashes, architecture and every tensor.

    Raises ArtifactError, which says what is missing, malformed or altered.
    """
    folder = Path(path)
    try:
        manifest_text = (folder / MANIFEST_FILE).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{folder} holds no readable artifact: {error}") from error
    try:
        manifest = Manifest.model_validate(json.loads(manifest_text))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ArtifactError(f"{folder / MANIFEST_FILE} is malformed at {where}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{folder / MANIFEST_FILE} is no JSON: {error}") from error
    weights_path = folder / manifest.weights_file
    try:
        weights = weights_path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{folder} lacks the weights that its manifest names: {error}") from error
    if hashlib.sha256(weights).hexdigest() != manifest.weights_sha256:
        raise ArtifactError(f"{weights_path} was altered: its SHA-256 is not the one in the manifest")
    if _content_id(manifest) != manifest.id:
        raise ArtifactError(f"{folder / MANIFEST_FILE} was altered: its id does not match its content")
    try:
        state = load_tensors(weights)
        sanitizer = Sanitizer(manifest.architecture)
        sanitizer.load_state_dict(state)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{weights_path} does not fit the manifest's architecture: {error}") from error
    _refuse_non_finite(state, weights_path)
    return Artifact(sanitizer.eval().requires_grad_(False), manifest)


def _content_id(manifest: Manifest) -> str:
    content = json.dumps(manifest.model_dump(mode="json", exclude={"id"}), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _refuse_non_finite(state: dict[str, Tensor], path: Path) -> None:
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ArtifactError(f"{path} holds values that are not finite, in {key}")
