"""The house's import rules, checked on the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FORBIDDEN = [
    ("defense", ("services", "training")),
    ("services/protocol", ("services.hospital", "services.gateway", "training", "defense")),
    ("services/hospital", ("services.gateway", "training", "defense")),
    ("services/gateway", ("services.hospital", "training")),
    ("services", ("training",)),
    ("training", ("services.gateway", "services.hospital.app", "services.hospital.config")),
    *((package, ("zo_gateway",)) for package in ("defense", "services", "training")),
]
ROOMS = (
    "command",
    "data",
    "measure",
    "victim",
    "fit",
    "certificates",
    "attack",
    "comparison",
    "reporting",
    "demonstration",
)
"""The rooms of training, from the ground up: each may import those before it, and the verbs on top import them all."""

THIN = 130
"""Lines that a verb has at most: it reads its configuration, calls, and prints."""

# in_process: the comparison's white-box rows need the victim's gradient, and its other rows a victim without sockets.
MAY_KNOW_THE_VICTIM = {"victim_fit.py", "files.py", "in_process.py"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(("package", "forbidden"), FORBIDDEN)
def test_imports_run_one_way(package, forbidden):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        for name in imports(path):
            assert not any(name == other or name.startswith(f"{other}.") for other in forbidden), f"{path}: {name}"


def test_the_rooms_of_training_are_all_in_their_order():
    assert {path.name for path in (ROOT / "training").iterdir() if (path / "__init__.py").exists()} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_of_training_imports_one_above_it_or_a_verb(room):
    below = ROOMS[: ROOMS.index(room) + 1]
    for path in (ROOT / "training" / room).rglob("*.py"):
        for name in imports(path):
            if name.startswith("training."):
                assert name.split(".")[1] in below, f"{path}: {name}"


def test_verbs_are_thin_and_import_no_other_verb():
    verbs = {path.stem for path in (ROOT / "training").glob("*.py")} - {"__init__"}
    for path in (ROOT / "training").glob("*.py"):
        for name in imports(path):
            assert not name.startswith("training.") or name.split(".")[1] not in verbs, f"{path}: {name}"
        assert len(path.read_text().splitlines()) <= THIN, path


def test_only_the_victims_trainer_and_the_attacker_know_the_victim():
    for path in (ROOT / "training").rglob("*.py"):
        knows = any(name.startswith("services.hospital") for name in imports(path))
        assert not knows or path.name in MAY_KNOW_THE_VICTIM, path


def test_monai_is_imported_where_it_is_used_and_nowhere_else():
    """Its import takes seconds, which a classifier's hospital, the gateway and `zo_fit` need not wait."""
    users = set()
    for package in ("defense", "services", "training"):
        for path in (ROOT / package).rglob("*.py"):
            tree = ast.parse(path.read_text())
            found = {
                node
                for node in ast.walk(tree)
                if (isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "monai")
                or (isinstance(node, ast.Import) and any(name.name.startswith("monai") for name in node.names))
            }
            assert not found & set(tree.body), f"{path}: import MONAI inside the function that needs it"
            if found:
                users.add(path.relative_to(ROOT).as_posix())
    assert "services/hospital/networks.py" in users


def test_modules_stay_short():
    for package in ("defense", "services", "training", "zo_gateway"):
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 300, path
