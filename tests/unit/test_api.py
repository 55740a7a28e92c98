"""The names that people import, and the page that shows how they go together."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import zo_gateway

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "fastapi", "httpx", "pydantic", "scipy", "torchvision", "matplotlib")


def test_the_public_names_are_these():
    assert zo_gateway.__all__ == [
        *("Artifact", "DefenseError", "FitConfig", "FunctionVictim", "HTTPVictim"),
        *("ServiceError", "Splits", "UserError"),
        *("certify", "certify_mask", "check_victim", "fit", "load", "load_splits", "split_images"),
    ]
    for name in zo_gateway.__all__:
        assert callable(getattr(zo_gateway, name)), name
    assert set(zo_gateway.__all__) <= set(dir(zo_gateway))
    with pytest.raises(AttributeError, match="has no attribute 'unfit'"):
        zo_gateway.unfit  # noqa: B018


def test_the_page_names_all_of_them():
    page = (ROOT / "docs" / "api.md").read_text()
    assert not [name for name in zo_gateway.__all__ if not re.search(rf"\b{name}\b", page)]


@pytest.mark.parametrize("statement", ["import zo_gateway", "import defense", "from zo_gateway.__main__ import VERBS"])
def test_importing_loads_nothing_heavy(statement):
    told = f"{statement}; import sys; print(*sorted(set(sys.modules) & {set(HEAVY)!r}))"
    ran = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


@pytest.mark.slow
def test_the_page_defends_a_model_given_as_a_function(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "api.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "classes: 2" in printed
    assert re.search(r"Certificate\(label=-?\d", printed)
    assert (tmp_path / "artifacts" / "mine" / "manifest.json").exists()
