"""What the checks say of attacks that work, and of attacks that fail in each of the ways that are known."""

from copy import deepcopy

import pytest

from training.attack.checks import SURE, checks, describe

INSIDER = {
    ("linf", 1 / 255): {
        "fgsm": 0.9,
        "pgd": 0.8,
        "pgd-twice": 0.79,
        "pgd-bpda": 0.85,
        "pgd-transfer": 0.9,
        "worst": 0.78,
        "held": 0.78,
    },
    ("linf", 8 / 255): {
        "fgsm": 0.5,
        "pgd": 0.1,
        "pgd-twice": 0.1,
        "pgd-bpda": 0.2,
        "pgd-transfer": 0.4,
        "worst": 0.1,
        "held": 0.1,
    },
    ("linf", SURE): {
        "fgsm": 0.2,
        "pgd": 0.0,
        "pgd-twice": 0.0,
        "pgd-bpda": 0.0,
        "pgd-transfer": 0.1,
        "worst": 0.0,
        "held": 0.0,
    },
    ("l2", 0.5): {"pgd": 0.6, "pgd-twice": 0.6, "worst": 0.6},
}
OUTSIDER = {
    ("linf", 1 / 255): {"square": 0.92, "student": 0.95, "worst": 0.9},
    ("linf", 8 / 255): {"square": 0.4, "student": 0.6, "worst": 0.4},
    ("linf", SURE): {"square": 0.1, "student": 0.3, "worst": 0.1},
    ("l2", 0.5): {"hopskipjump": 0.9, "worst": 0.9},
}


def test_attacks_that_work_pass_all_checks() -> None:
    assert len(checks(INSIDER, OUTSIDER)) == 7
    assert len(checks(INSIDER, {})) == 5
    assert len(checks({}, OUTSIDER)) == 1
    assert all(line.endswith(": holds") for line in checks(INSIDER, OUTSIDER))


def test_the_bare_victim_has_no_gradients_to_be_hidden() -> None:
    bare = {
        size: {name: value for name, value in one.items() if "transfer" not in name} for size, one in INSIDER.items()
    }
    assert len(checks(bare, {})) == 4


@pytest.mark.parametrize(
    ("who", "size", "change", "which"),
    [
        ("insider", ("linf", 1 / 255), {"fgsm": 0.5}, 0),
        ("insider", ("linf", 8 / 255), {"pgd-twice": 0.0, "pgd": 0.1}, 1),
        ("insider", ("linf", 8 / 255), {"pgd-transfer": 0.0}, 2),
        ("outsider", ("l2", 0.5), {"worst": 0.5}, 3),
        ("insider", ("linf", 8 / 255), {"worst": 0.9}, 4),
        ("outsider", ("linf", SURE), {"worst": 0.5}, 5),
        ("insider", ("linf", SURE), {"held": 0.1}, 6),
    ],
)
def test_each_check_fails_on_what_it_is_for(who: str, size: tuple[str, float], change: dict, which: int) -> None:
    both = {"insider": deepcopy(INSIDER), "outsider": deepcopy(OUTSIDER)}
    if which == 4:  # else the outsider would be better as well
        both["outsider"][size]["worst"] = 0.9
    both[who][size] |= change
    told = checks(both["insider"], both["outsider"])
    failed = [place for place, line in enumerate(told) if "FAILS at" in line]
    assert failed == [which]
    assert describe(size) in told[which]
