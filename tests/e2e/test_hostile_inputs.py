"""The corpus of hostile inputs, over a socket: each is told why, none ends a service or makes it grow."""

from pathlib import Path

import httpx
import psutil
import pytest
import torch
from hostile import CORPUS
from service_processes import Start, images, stop

from defense.sanitizer import Sanitizer
from services.protocol.images import encode_png

BOUND_MB = 4
GROWTH_MB = 64
ROUNDS = 3


def test_the_corpus_names_each_input_once() -> None:
    names = [one.name for one in CORPUS]
    assert len(set(names)) == len(names) > 100


@pytest.mark.parametrize("which", ["hospital", "gateway"])
def test_every_hostile_input_is_told_why_and_none_ends_the_service_or_makes_it_grow(
    which: str, start: Start, victim: tuple[Path, torch.nn.Module], artifact: tuple[Path, Sanitizer]
) -> None:
    bound = ["--max-body-mb", str(BOUND_MB)]
    process, url = start("services.hospital", "--model", str(victim[0]), *bound)
    if which == "gateway":
        process, url = start("services.gateway", "--artifact", str(artifact[0]), "--victim-url", url, *bound)
    memory = []
    with httpx.Client(timeout=60) as http:
        for _ in range(ROUNDS):
            for one in CORPUS:
                response = http.post(f"{url}{one.path}", content=one.body, headers=one.headers)
                assert response.status_code in one.statuses, (one.name, response.status_code, response.text[:300])
                if response.status_code != 200:
                    told = response.json()
                    assert set(told) == {"error"}, one.name
                    assert 0 < len(told["error"]) < 2000, one.name
                    assert "Traceback" not in told["error"], one.name
            memory.append(psutil.Process(process.pid).memory_info().rss / 2**20)
        good = http.post(f"{url}/predict", files={"file": encode_png(images(1)[0].numpy())})
        assert good.status_code == 200
    assert memory[-1] - memory[0] < GROWTH_MB, memory
    # Starlette leaves the files of forms that end early to the garbage collector, of which -W error tells, harmlessly.
    assert " ERROR " not in stop(process)
