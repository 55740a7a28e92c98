import pytest
from pydantic import Field

from defense.errors import DefenseError
from services.protocol.errors import InvalidInput
from services.settings import Config
from training.command.errors import UserError
from training.command.verb import run


class Settings(Config):
    """Does a thing."""

    size: int = Field(1, gt=0, description="how large")


def fails(error: BaseException):
    def body(config: Settings) -> int:
        raise error

    return body


def test_the_verb_gets_its_configuration_and_its_code_is_the_commands():
    assert run(lambda config: config.size, Settings, ["--size", "7"], prog="verb") == 7


@pytest.mark.parametrize("kind", [UserError, DefenseError, InvalidInput, OSError])
def test_a_known_error_is_one_line(kind, capsys):
    assert run(fails(kind("what was wrong")), Settings, [], prog="verb") == 2
    assert capsys.readouterr().err == "verb: error: what was wrong\n"


def test_a_configuration_that_the_verb_made_is_told_by_its_flags(capsys):
    assert run(lambda _: Settings(size=-1).size, Settings, [], prog="verb") == 2
    assert capsys.readouterr().err == "verb: error: --size: must be greater than 0\n"


def test_ctrl_c_ends_with_its_own_code(capsys):
    assert run(fails(KeyboardInterrupt()), Settings, [], prog="verb") == 130
    assert capsys.readouterr().err == "verb: interrupted\n"


def test_other_errors_are_faults_of_the_program():
    with pytest.raises(ZeroDivisionError):
        run(fails(ZeroDivisionError()), Settings, [], prog="verb")
