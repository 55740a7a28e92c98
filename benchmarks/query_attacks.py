"""Attacks by queries through the gateway, and what its detection makes of them and of ordinary traffic.

    python -m benchmarks.query_attacks --data ../shared/data/brain_mri --victim artifacts/brain_mri/victim \
        --artifact artifacts/brain_mri/zo-ds

The gateway reports but does not refuse, so that attacks go on to their end; each attacked image has a client key of its
own. Attacks are those of `defense.query_attacks`, HopSkipJump from an image of another label. Ordinary traffic is every
image of the split from one key, in random order, some followed by the same again, recompressed, cropped, shifted,
turned, brighter or darker. The table for other thresholds replays the images through the gateway's own `History`.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Final

import httpx
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import functional as warp
from tqdm import tqdm

from benchmarks import cli
from benchmarks.running import add_image_arguments, add_model_arguments, defended
from defense.preprocessors import jpeg
from defense.query_attacks import Inquiry, hop_skip_jump, square
from services.gateway.accounting import Accounts, Budget
from services.gateway.config import GatewaySettings
from services.gateway.fingerprints import History, digests, fingerprints
from services.protocol import oip
from training.command.errors import UserError
from training.data.datasets import load_data
from training.measure.results import align
from training.measure.selection import chosen_images

_NEAR: Final = (10, 15, 25, 50, 100)
_RADII: Final = (0.02, 0.04, 0.06)
_VARIANTS: Final = 0.25  # probability of each kind of second sending, for each image


@dataclass
class Client:
    """One client of the gateway, who keeps the images that it sent, in order."""

    http: httpx.Client
    url: str
    key: str
    sent: list[npt.NDArray[np.float32]] = field(default_factory=list)

    def scores(self, images: Tensor) -> Tensor:
        """The gateway's scores, (N,K) or (N,K,H,W), for images (N,C,H,W)."""
        batch = images.detach().float().numpy()
        self.sent.extend(batch)
        body, headers = oip.encode_request([oip.Tensor(oip.INPUT, batch)])
        response = self.http.post(f"{self.url}/predict", content=body, headers={**headers, "X-API-Key": self.key})
        length = oip.header_length(response.raise_for_status().headers.get(oip.HEADER))
        return torch.tensor(oip.decode_response(response.content, length)[oip.OUTPUT])

    def suspected(self) -> int:
        """How many of its images the gateway suspects."""
        keys = self.http.get(f"{self.url}/queries").json()["keys"]
        return int(keys[Accounts(Budget()).name(self.key)]["suspected"])


def ordinary(images: Tensor, generator: np.random.Generator) -> list[Tensor]:
    """What a client sends who has these images (N,C,H,W): each, and some of them again in other forms."""
    side = images.shape[-1]

    def cropped(image: Tensor) -> Tensor:
        cut = max(side // 32, 1)
        return functional.interpolate(image[None, :, cut:-cut, cut:-cut], size=image.shape[1:], mode="bilinear")[0]

    forms: list[Callable[[Tensor], Tensor]] = [
        lambda image: image,
        lambda image: jpeg(image[None], quality=75)[0],
        lambda image: jpeg(image[None], quality=90)[0],
        cropped,
        lambda image: image.roll(1, dims=2),
        lambda image: warp.rotate(image, float(generator.uniform(-3, 3))),
        lambda image: (image * float(generator.uniform(0.95, 1.05))).clamp(0, 1),
    ]
    sent = []
    for image in images:
        sent.append(image)
        sent += [form(image) for form in forms if generator.random() < _VARIANTS]
    return sent


def first_suspected(sent: list[npt.NDArray[np.float32]], near: int, radius: float) -> tuple[int | None, int]:
    """After how many images a stream is suspected first (None: never), and how many of its images are."""
    history = History(radius, window_s=float("inf"))
    images = np.stack(sent)
    seen = enumerate(zip(fingerprints(images), digests(images), strict=True))
    flags = [history.meet(its_print, digest, float(place)).near >= near for place, (its_print, digest) in seen]
    return (flags.index(True) + 1 if any(flags) else None), sum(flags)


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    cli.add_data_arguments(parser)
    add_model_arguments(parser)
    add_image_arguments(parser, 20)
    add = parser.add_argument
    add("--queries", type=cli.positive_int, default=500, help="most queries an attacked image (default 500)")
    add("--epsilon", type=cli.positive_float, default=8.0, help="of Square, in 1/255 (default 8)")
    return cli.run(_measure, parser, None)


def _measure(arguments: argparse.Namespace) -> int:
    splits = load_data(cli.data_config(arguments))
    _, everything = chosen_images(splits, arguments.split, None, arguments.seed)
    _, attacked = chosen_images(splits, arguments.split, arguments.images, arguments.seed)
    starts = [labelled_otherwise(everything.labels, index, len(attacked)) for index in range(len(attacked))]
    traffic = ordinary(everything.images, np.random.default_rng(arguments.seed))
    streams: dict[str, list[list[npt.NDArray[np.float32]]]] = {"square": [], "hopskipjump": []}
    succeeded = dict.fromkeys(streams, 0)
    counted = dict.fromkeys(streams, 0)
    with defended(arguments, ["--usage"]) as urls, httpx.Client(timeout=600) as http:
        client = Client(http, urls.gateway, "ordinary")
        begun = time.perf_counter()
        for image in tqdm(traffic, "ordinary traffic", unit="image"):
            client.scores(image[None])
        answering = time.perf_counter() - begun
        false_alarms = client.suspected()
        for name in streams:
            for index, image in enumerate(tqdm(attacked.images, name, unit="image")):
                one = Client(http, urls.gateway, f"{name}-{index}")
                answer = one.scores(image[None]).argmax(dim=1)
                inquiry = Inquiry(one.scores, image[None], answer, arguments.queries - 1)  # that was one
                if name == "square":
                    square(inquiry, arguments.epsilon / 255, seed=arguments.seed)
                else:
                    other = everything.images[starts[index]]
                    hop_skip_jump(inquiry, other[None], seed=arguments.seed)
                succeeded[name] += int(inquiry.nearest().isfinite().sum())
                streams[name].append(one.sent)
                counted[name] += one.suspected() > 0
    settings = GatewaySettings.model_fields
    near, radius = settings["detection_near"].default, settings["detection_radius"].default
    print(
        f"{splits.name}, {arguments.split}: {len(traffic)} ordinary images ({len(everything)} different ones), "
        f"{false_alarms} suspected; attacks of at most {arguments.queries} queries, Square at {arguments.epsilon:g}/255"
    )
    for name, sent in streams.items():
        print(
            f"{name}: the gateway suspected {counted[name]} of {len(sent)} runs (near {near}, radius {radius:g}); "
            f"{median(map(len, sent)):.0f} queries (median)"
            + (f"; {succeeded[name]} succeeded" if name == "square" else "")
        )
    begun = time.perf_counter()
    first_suspected(client.sent, near, radius)
    looking = time.perf_counter() - begun
    lines = [["near", "radius", "ordinary images suspected", "square: runs", "after", "hopskipjump: runs", "after"]]
    for one_radius in _RADII:
        for one_near in _NEAR:
            row = [str(one_near), f"{one_radius:g}", str(first_suspected(client.sent, one_near, one_radius)[1])]
            for sent in streams.values():
                found = [first for run in sent if (first := first_suspected(run, one_near, one_radius)[0]) is not None]
                row += [f"{len(found)} of {len(sent)}", f"{median(found):.0f}" if found else "-"]
            lines.append(row)
    print(align(lines))
    print(f"Looking at an image takes {looking / answering:.3f} of the time in which its client has the answer.")
    return 0


def labelled_otherwise(labels: Tensor, index: int, chosen: int) -> int:
    """The next of the first `chosen` images whose label is not that of `index`; of all images where there is none.

    Raises UserError if all labels are equal.
    """
    places: list[int] = [*((index + step) % chosen for step in range(1, chosen)), *range(chosen, len(labels))]
    for place in places:
        if not torch.equal(labels[place], labels[index]):
            return place
    raise UserError("all images of the split have the same label: HopSkipJump has nowhere to start from")


if __name__ == "__main__":
    sys.exit(main())
