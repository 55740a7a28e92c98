"""Which device a setting names, for services and tools alike."""

import torch

from services.protocol.errors import ServiceError


def resolve_device(name: str) -> torch.device:
    """The device that a setting names; "auto" is CUDA where there is one. Raises ServiceError if it is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        told = str(error).partition("\n")[0]  # torch adds lines about debugging CUDA
        raise ServiceError(f"device {name!r} cannot be used here: {told}") from error
    return device
