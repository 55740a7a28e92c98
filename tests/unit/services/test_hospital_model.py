import json
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from services.hospital.model import FORMAT, VictimConfig, VictimFileError, build_victim, load_victim
from services.protocol.errors import ServiceError
from training.victim.files import save_victim

LABELS = ("a", "b", "c")


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (50, 97)])
@pytest.mark.parametrize("depth", ["vgg11", "vgg16"])
def test_answers_one_logit_a_class_for_any_shape(channels: int, size: tuple[int, int], depth: str) -> None:
    config = VictimConfig.model_validate(
        {"labels": LABELS, "channels": channels, "size": size, "depth": depth, "width": 0.125}
    )
    logits = build_victim(config).eval()(torch.rand(2, channels, *size))
    assert logits.shape == (2, 3)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()


def test_every_weight_is_allocated_and_width_scales_them() -> None:
    narrow, wide = (build_victim(VictimConfig(labels=LABELS, width=width)) for width in (0.125, 0.25))
    assert not any(parameter.is_meta for parameter in narrow.parameters())
    assert 3 < parameters(wide) / parameters(narrow) < 5
    assert parameters(narrow) < 300_000


def test_an_images_answer_does_not_depend_on_its_batch() -> None:
    model = build_victim(VictimConfig(labels=LABELS, width=0.125)).eval()
    images = torch.rand(5, 1, 64, 64)
    assert torch.allclose(model(images)[3:4], model(images[3:4]), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": (31, 64)}, "at least 32 x 32"),
        ({"labels": ("a", "a")}, "differ"),
        ({"labels": ("a",)}, "at least 2"),
        ({"width": 0.0}, "greater than 0"),
        ({"channels": 2}, "1 or 3"),
        ({"depth": "vgg12"}, "vgg11"),
        ({"surprise": 1}, "Extra inputs"),
        ({"depth": None}, "needs a depth"),
        ({"task": "detection"}, "classification"),
        ({"task": "segmentation", "size": (64, 40)}, "multiples of 16, at least 32 x 32, got 64 x 40"),
        ({"task": "segmentation", "size": (16, 64)}, "multiples of 16, at least 32 x 32, got 16 x 64"),
        ({"task": "segmentation", "depth": "vgg11"}, "a segmenter takes none"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        VictimConfig.model_validate({"labels": LABELS, **changes})


def test_saved_and_loaded_victims_answer_alike(tmp_path: Path) -> None:
    config = VictimConfig(labels=LABELS, channels=3, size=(40, 48), width=0.125)
    model = build_victim(config).to(memory_format=torch.channels_last)
    model(torch.rand(4, 3, 40, 48))  # moves the running statistics
    path = save_victim(tmp_path / "new" / "victim", model, config)
    loaded, loaded_config = load_victim(tmp_path / "new" / "victim")
    images = torch.rand(3, 3, 40, 48)
    assert loaded_config == config
    assert not loaded.training
    assert torch.allclose(loaded(images), model.eval()(images), atol=1e-5)
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("labels", [LABELS, ("background", "polyp")])
def test_saved_and_loaded_segmenters_answer_alike(tmp_path: Path, labels: tuple[str, ...]) -> None:
    config = VictimConfig(task="segmentation", labels=labels, channels=3, size=(32, 48), width=0.125)
    model = build_victim(config)
    model(torch.rand(4, 3, 32, 48))  # moves the running statistics
    save_victim(tmp_path, model, config)
    loaded, loaded_config = load_victim(tmp_path)
    images = torch.rand(3, 3, 32, 48)
    assert loaded_config == config
    assert loaded(images).shape == (3, len(labels), 32, 48)
    assert torch.allclose(loaded(images), model.eval()(images), atol=1e-5)


def test_a_file_from_before_there_were_two_tasks_is_a_classifiers(tmp_path: Path) -> None:
    config = VictimConfig(labels=LABELS, width=0.125)
    old = {name: value for name, value in config.model_dump(mode="json").items() if name != "task"}
    state = {name: tensor.contiguous() for name, tensor in build_victim(config).state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": FORMAT, "config": json.dumps(old)})
    assert load_victim(tmp_path)[1] == config
    assert config.task == "classification"
    assert config.depth == "vgg11"


def test_a_hospital_without_monai_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = VictimConfig(task="segmentation", labels=LABELS, width=0.125)
    save_victim(tmp_path, build_victim(config), config)
    monkeypatch.setitem(sys.modules, "monai.networks.nets", None)  # as if it were not there
    with pytest.raises(ServiceError, match=r"pip install 'zo-gateway\[segmentation\]'"):
        load_victim(tmp_path)


def test_a_missing_victim_is_told_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(VictimFileError, match=r"no victim at .*victim_fit"):
        load_victim(tmp_path)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x10\0\0\0\0\0\0\0{}"])
def test_a_file_that_is_no_safetensors_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(VictimFileError, match="cannot be read"):
        load_victim(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (None, "no victim"),
        ({"format": "other"}, "format 'other'"),
        ({"format": FORMAT}, "malformed configuration"),
        ({"format": FORMAT, "config": '{"labels": ["a"]}'}, "malformed configuration: labels"),
        ({"format": FORMAT, "config": '{"labels": ["a", "b"]}'}, "do not fit"),
    ],
)
def test_a_file_of_something_else_is_told(tmp_path: Path, metadata: dict[str, str] | None, words: str) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(VictimFileError, match=words) as caught:
        load_victim(tmp_path)
    assert isinstance(caught.value, ServiceError)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = VictimConfig(labels=LABELS, width=0.125)
    path = save_victim(tmp_path, build_victim(config), config)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("defense.files.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_victim(tmp_path, build_victim(config), config)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
