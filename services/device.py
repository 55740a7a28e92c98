"""Which device a setting names, for services and tools alike."""

import torch

from services.protocol.errors import ServiceError


def resolve_device(name: str) -> torch.device:
    """The device that a setting names; "auto" is CUDA where there is one.

    Raises:
        ServiceError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ServiceError(f"device {name!r} cannot be used here: {error}") from error
    return device
