import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from defense.artifact import MANIFEST_FILE, Provenance, load_artifact, save_artifact
from defense.errors import ArtifactError
from defense.files import replace_file
from defense.sanitizer import ImageShape, Sanitizer, SanitizerConfig

PROVENANCE = Provenance(
    method="zo-ae-ds",
    estimator={"name": "rge", "directions": 20},
    data="phantom",
    data_fingerprint="0" * 64,
    settings={"batch": 32},
    versions={"torch": "2"},
    validation={"agreement": 0.9},
)


@pytest.fixture
def sanitizer() -> Sanitizer:
    torch.manual_seed(0)
    shape = ImageShape(channels=1, height=16, width=16)
    module = Sanitizer(
        SanitizerConfig(input=shape, denoiser="wiener-unet", components=20, autoencoder="linear", code=8)
    )
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return module


@pytest.fixture
def saved(tmp_path, sanitizer):
    save(tmp_path / "artifact", sanitizer)
    return tmp_path / "artifact"


def save(folder, sanitizer, **changes):
    details = {"name": "ours", "labels": ["a", "b"], "sigma": 0.25, "queries": {"training": 7, "probe": 3}}
    return save_artifact(folder, sanitizer, provenance=PROVENANCE, **{**details, **changes})


def files_of(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def weights_of(folder):
    (path,) = folder.glob("model-*.safetensors")
    return path


def rewrite_manifest(folder, **changes):
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_loaded_is_what_was_saved(tmp_path, sanitizer):
    manifest = save(tmp_path, sanitizer)
    artifact = load_artifact(tmp_path)
    images = torch.rand(3, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(artifact.sanitizer(images), sanitizer.eval()(images))
    assert artifact.manifest == manifest
    assert artifact.manifest.queries_spent == 10
    assert artifact.manifest.input.dimensions == (1, 16, 16)
    assert not artifact.sanitizer.training
    assert not any(parameter.requires_grad for parameter in artifact.sanitizer.parameters())
    assert artifact.manifest.input.range == (0, 1)
    assert files_of(tmp_path) == [MANIFEST_FILE, manifest.weights_file]


def test_the_id_follows_the_content(tmp_path, sanitizer):
    first, again = save(tmp_path, sanitizer), save(tmp_path, sanitizer)
    other_labels = save(tmp_path, sanitizer, labels=["a", "c"])
    with torch.no_grad():
        next(sanitizer.parameters()).add_(1)
    other_weights = save(tmp_path, sanitizer)
    assert first.id == again.id
    assert len({first.id, other_labels.id, other_weights.id}) == 3


@pytest.mark.parametrize("written", [0, 1])
def test_a_save_that_fails_leaves_the_old_artifact(saved, sanitizer, monkeypatch, written):
    before, files = load_artifact(saved).manifest, files_of(saved)
    with torch.no_grad():
        next(sanitizer.parameters()).add_(1)
    calls = []

    def fails_in_the_end(path, data):
        calls.append(path)
        if len(calls) > written:
            raise OSError("disk full")
        replace_file(path, data)

    monkeypatch.setattr("defense.artifact.replace_file", fails_in_the_end)
    with pytest.raises(OSError, match="disk full"):
        save(saved, sanitizer)
    assert load_artifact(saved).manifest == before
    assert set(files) <= set(files_of(saved))
    assert len(files_of(saved)) == len(files) + written  # the new weights, which the next save removes


def test_a_new_artifact_replaces_the_old_one_and_its_weights(saved, sanitizer):
    with torch.no_grad():
        next(sanitizer.parameters()).add_(1)
    manifest = save(saved, sanitizer)
    assert load_artifact(saved).manifest == manifest
    assert files_of(saved) == [MANIFEST_FILE, manifest.weights_file]


def flip_a_byte(folder):
    data = bytearray(weights_of(folder).read_bytes())
    data[-1] ^= 1
    weights_of(folder).write_bytes(data)


def weights_of_nan(folder):
    import hashlib

    from defense.artifact import Manifest, _content_id

    path = weights_of(folder)
    state = load_file(path)
    state["denoiser.body.tail.bias"][0] = float("nan")
    save_file(state, path)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = Manifest.model_validate_json((folder / MANIFEST_FILE).read_text()).model_copy(
        update={"weights_sha256": sha}
    )
    path.rename(folder / manifest.weights_file)
    rewrite_manifest(folder, weights_sha256=sha, id=_content_id(manifest))


def other_architecture(folder):
    from defense.artifact import Manifest, _content_id

    manifest = Manifest.model_validate_json((folder / MANIFEST_FILE).read_text())
    manifest = manifest.model_copy(update={"architecture": manifest.architecture.model_copy(update={"code": 9})})
    rewrite_manifest(folder, architecture=manifest.architecture.model_dump(), id=_content_id(manifest))


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (flip_a_byte, "was altered: its SHA-256"),
        (lambda folder: rewrite_manifest(folder, labels=["b", "a"]), "was altered: its id"),
        (lambda folder: rewrite_manifest(folder, queries={"training": 0}), "was altered: its id"),
        (lambda folder: rewrite_manifest(folder, sigma=-1), "malformed at sigma"),
        (lambda folder: rewrite_manifest(folder, surprise=1), "malformed at surprise"),
        (lambda folder: rewrite_manifest(folder, format="zo-gateway-artifact-0"), "malformed at format"),
        (lambda folder: (folder / MANIFEST_FILE).write_text("[]"), "malformed at the whole"),
        (lambda folder: (folder / MANIFEST_FILE).write_text("{"), "is no JSON"),
        (lambda folder: (folder / MANIFEST_FILE).write_text("[" * 100_000), "is no JSON"),
        (lambda folder: (folder / MANIFEST_FILE).write_bytes(b"\xff\xfe"), "holds no readable artifact"),
        (lambda folder: (folder / MANIFEST_FILE).unlink(), "holds no readable artifact"),
        (lambda folder: weights_of(folder).unlink(), "lacks the weights that its manifest names"),
        (lambda folder: weights_of(folder).write_bytes(pickle.dumps({})), "was altered"),
        (weights_of_nan, r"not finite, in denoiser\.body\.tail\.bias"),
        (other_architecture, "does not fit the manifest's architecture"),
    ],
)
def test_tampering_is_found_and_named(saved, tamper, message):
    tamper(saved)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(saved)
