import torch

from defense.estimators import Points
from defense.sanitizer import ImageShape, Sanitizer, SanitizerConfig
from defense.surrogates import Surrogate, SurrogateSettings
from defense.victims import MeteredVictim, QueryLedger
from training.fit.loss import loss_behind_border

SHAPE = (1, 8, 8)


def test_the_surrogate_learns_from_the_answers_at_the_centers():
    shape = ImageShape.model_validate(dict(zip(("channels", "height", "width"), SHAPE, strict=True)))
    sanitizer = Sanitizer(SanitizerConfig(input=shape, denoiser="unet", autoencoder=None))
    surrogate = Surrogate(SHAPE, 2, SurrogateSettings(), seed=0, device=torch.device("cpu"))

    def victim(images: torch.Tensor) -> torch.Tensor:
        bright = images.mean((1, 2, 3))
        return torch.stack([bright, 1 - bright], 1)

    metered = MeteredVictim(victim, QueryLedger(), kind="probabilities")
    loss = loss_behind_border(torch.tensor([0, 1, 0]), sanitizer, metered, surrogate)
    around = torch.rand(3, 5, *SHAPE, generator=torch.Generator().manual_seed(0))
    values = loss.black_box(Points.around(around, center=4))
    assert values.shape == (15,)
    assert metered.ledger.spent == {"training": 15}
    torch.testing.assert_close(values[4], -victim(around[0, 4:])[0, 0].log())
    rows = surrogate.values.rows()
    torch.testing.assert_close(rows["images"].float() / 255, around[:, 4], atol=0.003, rtol=0)
    torch.testing.assert_close(rows["answers"], victim(around[:, 4]).log(), atol=1e-4, rtol=0)
