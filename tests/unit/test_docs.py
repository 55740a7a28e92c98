"""What README and docs tell people to type and to read is there: modules, flags, make targets, files, headings."""

import importlib
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {"torch", "venv", "pip"}


def blocks(document: Path) -> Iterator[str]:
    """The code blocks, and what stands in backticks in the text."""
    text = document.read_text()
    yield from re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    yield from re.findall(r"`([^`]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))


def commands(document: Path) -> Iterator[str]:
    """Every `python -m ...` or `torchrun ... -m ...`, continuations joined, without comments and what is piped."""
    for block in blocks(document):
        lines = block.replace("\\\n", " ").splitlines() if "\n" in block else [" ".join(block.split())]
        for line in lines:
            if match := re.search(r"(?:python|torchrun\b.*?) (-m .*)", re.sub(r"\s#.*", "", line)):
                yield re.split(r"[;|>]|&&", match[1])[0].strip()


def asked() -> list[tuple[str, str, tuple[str, ...]]]:
    """(document, module, flags) of every command on one of this project's modules."""
    found = {}
    for document in DOCUMENTS:
        for command in commands(document):
            try:
                words = shlex.split(command)
            except ValueError:  # a sentence, not a command
                continue
            module = words[1].rstrip(",.:)") if len(words) > 1 else ""
            if module.partition(".")[0] in {"training", "services", "benchmarks"}:
                flags = tuple(word.partition("=")[0] for word in words[2:] if re.match("--[a-z]", word))
                found[document.name, module, flags] = None
    return list(found)


@pytest.fixture(scope="module")
def help_of() -> Callable[[str, pytest.CaptureFixture[str]], str]:
    told: dict[str, str] = {}

    def get(module: str, capsys: pytest.CaptureFixture[str]) -> str:
        if module not in told:
            main = importlib.import_module(module if _is_program(module) else f"{module}.__main__").main
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.argv", [module, "--help"])
                with pytest.raises(SystemExit) as ended:
                    main()
            assert ended.value.code == 0
            told[module] = capsys.readouterr().out
        return told[module]

    return get


def _is_program(module: str) -> bool:
    return (ROOT / (module.replace(".", "/") + ".py")).exists()


def test_there_are_commands_to_check() -> None:
    assert len(asked()) > 30


@pytest.mark.parametrize(("document", "module", "flags"), asked(), ids=lambda one: str(one)[:60])
def test_every_command_names_a_program_and_flags_that_it_has(
    document: str, module: str, flags: tuple[str, ...], help_of, capsys: pytest.CaptureFixture[str]
) -> None:
    told = help_of(module, capsys)
    missing = [flag for flag in flags if not re.search(rf"{re.escape(flag)}(?![\w-])", told)]
    assert not missing, f"{document}: python -m {module} has no {', '.join(missing)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda one: one.name)
def test_every_make_target_and_link_is_there(document: Path) -> None:
    text = document.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wanted = {name for block in blocks(document) for name in re.findall(r"(?:^|\s)make ([a-z][a-z-]*)", block)}
    assert wanted <= targets
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http:", "https:")):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), f"{document.name} links to {link}"
        if anchor:
            titles = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{document.name} links to {link}, which has no such heading"
