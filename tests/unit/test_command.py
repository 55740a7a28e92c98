"""The installed command: one table of verbs, of which only the one that is called is loaded."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from zo_gateway.__main__ import VERBS, main

ROOT = Path(__file__).parents[2]


def test_the_installed_command_is_this_one():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"zo-gateway": "zo_gateway.__main__:main"}


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_its_help_lists_the_verbs(argv, capsys):
    assert main(argv) == 0
    told = capsys.readouterr().out
    assert [line.split()[0] for line in told.splitlines() if line.startswith("  ")] == list(VERBS)


def test_an_unknown_verb_is_refused(capsys):
    assert main(["defend"]) == 2
    assert "there is no verb 'defend'" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_own_help(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert f"usage: zo-gateway {verb} " in capsys.readouterr().out


@pytest.mark.parametrize(("verb", "name"), [("serve", "gateway"), ("hospital", "hospital")])
def test_services_say_that_they_are_loading(verb, name, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--port", "none"])
    told = capsys.readouterr().err.splitlines()
    assert told[0] == f"{name}: loading ..."
    assert told[1].startswith(f"zo-gateway {verb}: error: ")


def test_a_verb_loads_its_own_module_and_passes_the_arguments_on(monkeypatch):
    seen = []
    keys = importlib.import_module("services.keys")
    monkeypatch.setattr(keys, "main", lambda argv, prog: seen.append([*argv, prog]) or 3)
    assert main(["keys", "clinic-a", "--help"]) == 3
    assert seen == [["clinic-a", "--help", "zo-gateway keys"]]


def test_a_verb_does_not_wait_for_the_modules_of_others():
    told = (
        "import sys; from zo_gateway.__main__ import main\n"
        "try: main(['keys', '--help'])\n"
        "except SystemExit: print(*(name for name in ('torch', 'training', 'services.gateway') if name in sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == ""
