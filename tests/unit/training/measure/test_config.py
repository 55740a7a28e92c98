import pytest
from pydantic import TypeAdapter, ValidationError

from training.measure.config import DefenseName

NAME = TypeAdapter(DefenseName)


def test_defense_names_are_kept() -> None:
    assert NAME.validate_python("zo-ae_ds.2") == "zo-ae_ds.2"


@pytest.mark.parametrize("text", ["", "a/b", "../x", "a b", ".hidden"])
def test_defense_names_are_safe_file_names(text: str) -> None:
    with pytest.raises(ValidationError, match="is no name"):
        NAME.validate_python(text)
