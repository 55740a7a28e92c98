"""Errors of the numerical core, all of them `DefenseError`s."""


class DefenseError(Exception):
    """Root of all errors that `defense` raises; the message says what was wrong and what to do."""


class ArtifactError(DefenseError):
    """An artifact on disk is missing, malformed or altered."""


class BudgetExhausted(DefenseError):  # noqa: N818 - an event of the query budget, not a fault
    """The next batch would spend more queries than the budget allows; nothing was sent."""


class InvalidAnswer(DefenseError):  # noqa: N818 - names the answer that is at fault
    """The victim's answer has the wrong shape, is not finite, or is no distribution."""
