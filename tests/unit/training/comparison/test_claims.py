import json
from pathlib import Path

import pytest

from training.command.errors import UserError
from training.comparison.claims import claim, locked


def test_a_lock_is_for_one_at_a_time_and_ends_with_its_block(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    with locked(path, wait=False) as first, locked(path, wait=False) as second:
        assert (first, second) == (True, False)
    with locked(path, wait=True) as again:
        assert again


def test_a_claim_keeps_settings_apart_and_lets_only_the_images_grow(tmp_path: Path) -> None:
    path = tmp_path / "claim.json"
    claim(path, {"n": 10, "images": 5, "id": None})
    claim(path, {"n": 10, "images": 8, "id": "a"})
    claim(path, {"n": 10, "images": 8, "id": None})
    assert json.loads(path.read_bytes()) == {"n": 10, "images": 8, "id": "a"}
    for settings in ({"n": 9}, {"images": 5}, {"id": "b"}):
        with pytest.raises(UserError, match="use the same, or another --out"):
            claim(path, settings)
    assert json.loads(path.read_bytes()) == {"n": 10, "images": 8, "id": "a"}
