from services.protocol import errors
from services.protocol.errors import (
    AttackSuspected,
    BudgetSpent,
    CircuitOpen,
    ClientGone,
    DeadlineExceeded,
    Overloaded,
    RateLimited,
    ServiceError,
    Unauthorized,
    UpstreamInvalid,
    from_status,
)


def subclasses() -> list[type[ServiceError]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ServiceError)]


def test_the_tree_in_the_docstring_names_every_class_with_its_status() -> None:
    assert errors.__doc__ is not None
    drawn = [line.split() for line in errors.__doc__.splitlines()]
    for kind in subclasses():
        assert any(kind.__name__ in words and str(kind.status) in words for words in drawn), kind


NEVER_PASSED_ON = (
    ServiceError,
    Unauthorized,
    BudgetSpent,
    RateLimited,
    AttackSuspected,
    ClientGone,
    UpstreamInvalid,
    CircuitOpen,
    DeadlineExceeded,
)


def test_statuses_round_trip_except_second_meanings_and_what_is_between_client_and_service_alone() -> None:
    for kind in subclasses():
        if kind not in NEVER_PASSED_ON:
            assert type(from_status(kind.status, "why")) is kind


def test_a_status_without_a_class_is_an_invalid_answer() -> None:
    for status in (301, 401, 403, 418, 500):
        assert type(from_status(status, "why")) is UpstreamInvalid


def test_retry_after_is_answered_in_whole_seconds() -> None:
    assert Overloaded("busy", retry_after=0.2).headers() == {"Retry-After": "1"}
    assert Overloaded("busy").headers() == {}
    assert Overloaded("busy").body() == {"error": "busy"}
