"""What the OpenAPI documents of both services say of errors."""

from collections.abc import Mapping
from typing import Any, Final

_ERROR: Final[dict[str, Any]] = {
    "content": {
        "application/json": {
            "schema": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}},
            "example": {"error": "the form needs a file in the field 'file'"},
        }
    }
}
_RETRY_AFTER: Final[dict[str, Any]] = {
    "headers": {"Retry-After": {"description": "seconds, where waiting helps", "schema": {"type": "integer"}}}
}


def error_responses(words: Mapping[int, str]) -> dict[int | str, dict[str, Any]]:
    """The responses of a path that are errors.

    Args:
        words: what each status means there.
    """
    told: dict[int | str, dict[str, Any]] = {
        status: {"description": meaning, **_ERROR, **(_RETRY_AFTER if status in (429, 503) else {})}
        for status, meaning in words.items()
    }
    # Also keeps FastAPI from announcing its own 422, which is never answered.
    return told | {"default": {"description": "any other error", **_ERROR}}
