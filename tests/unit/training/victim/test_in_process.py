import asyncio
import json

import pytest
import torch
from service_fakes import scores_of, serving, tensor_request

from services.hospital.app import make_hospital
from services.hospital.config import HospitalSettings
from services.hospital.model import FILE_NAME, VictimConfig, build_victim, load_victim, victim_bytes
from services.protocol.images import encode_png
from training.command.errors import UserError
from training.data.datasets import ImageSet, Splits
from training.victim.in_process import in_process, refuse_another_victim

CONFIG = VictimConfig(labels=("a", "b", "c"), size=(32, 32), width=0.125)
CPU = torch.device("cpu")


def splits(size: int = 32) -> Splits:
    part = ImageSet(torch.rand(4, 1, size, size), torch.zeros(4, dtype=torch.int64), tuple("wxyz"))
    return Splits("d", CONFIG.labels, part, part, part, "f")


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    (tmp_path / FILE_NAME).write_bytes(victim_bytes(build_victim(CONFIG), CONFIG))
    return tmp_path


def test_it_answers_what_the_hospital_answers(folder):
    images = 0.5 + torch.randn(3, 1, 32, 32)

    async def ask():
        settings = HospitalSettings(model=folder, device="cpu", max_delay_ms=0)
        async with serving(make_hospital(*load_victim(folder), settings)) as http:
            one = {"content": encode_png(images[0].clamp(0, 1).numpy()), "headers": {"Content-Type": "image/png"}}
            tensors = await http.post("/predict", **tensor_request(images.numpy()))
            return scores_of(tensors), (await http.post("/predict", **one)).json()

    scores, told = asyncio.run(ask())
    with in_process(folder, CPU, splits()) as victim:
        assert victim.ready()
        torch.testing.assert_close(victim(images), torch.from_numpy(scores.copy()))
        answer = victim.describe(images[0])
    assert answer["labels"] == told["labels"] == list(CONFIG.labels)
    assert answer["label"] == told["label"]
    assert answer["probabilities"] == pytest.approx(told["probabilities"], abs=1e-2)  # of an 8-bit image


def test_a_segmenter_says_how_much_of_the_image_is_lesion(tmp_path):
    config = VictimConfig(task="segmentation", labels=("background", "polyp"), channels=3, size=(32, 32), width=0.125)
    torch.manual_seed(0)
    (tmp_path / FILE_NAME).write_bytes(victim_bytes(build_victim(config), config))
    images = torch.rand(3, 3, 32, 32)
    part = ImageSet(images, torch.zeros(3, 32, 32, dtype=torch.int64), tuple("xyz"))
    with in_process(tmp_path, CPU, Splits("d", config.labels, part, part, part, "f")) as victim:
        scores = victim(images)
        answer = victim.describe(images[1])
    assert scores.shape == (3, 2, 32, 32)
    torch.testing.assert_close(scores.sum(1), torch.ones(3, 32, 32))
    share = (scores[1, 1] > scores[1, 0]).float().mean().item()
    assert answer == {"labels": ["background", "polyp"], "lesion_fraction": pytest.approx(share)}


def test_images_of_any_range_and_number_are_answered_with_distributions(folder):
    with in_process(folder, CPU, splits()) as victim:
        images = 3 * torch.randn(130, 1, 32, 32)
        scores = victim(images)
        torch.testing.assert_close(scores, victim(images.clamp(0, 1)))
        assert scores.shape == (130, 3)
        torch.testing.assert_close(scores.sum(1), torch.ones(130))


def test_the_images_get_a_gradient_and_the_weights_never(folder):
    with in_process(folder, CPU, splits()) as victim:
        images = torch.rand(2, 1, 32, 32, requires_grad=True)
        victim(images)[:, 0].sum().backward()
        assert images.grad is not None
        assert images.grad.abs().sum() > 0
        assert not victim(images.detach()).requires_grad


def test_images_that_it_does_not_take_are_told(folder):
    with pytest.raises(UserError, match="use --size 32 --channels 1"), in_process(folder, CPU, splits(16)):
        pass


def test_a_victim_that_may_have_seen_the_test_images_is_told(folder, caplog):
    (folder / "report.json").write_text(json.dumps({"fingerprint": "other"}))
    with in_process(folder, CPU, splits()):
        assert "may have seen images of this test split" in caplog.text


def test_a_victim_is_known_again_and_another_one_refused(tmp_path):
    images = torch.rand(12, 1, 4, 4)
    path = tmp_path / "victim.json"

    def answering(shift: float):
        return lambda images: torch.stack([images.mean((1, 2, 3)) + shift, images.mean((1, 2, 3))], dim=1).softmax(1)

    refuse_another_victim(path, answering(0.0), images)
    refuse_another_victim(path, answering(0.01), images)
    refuse_another_victim(path, answering(0.0), images[:3])
    with pytest.raises(UserError, match="another victim"):
        refuse_another_victim(path, answering(1.0), images)
