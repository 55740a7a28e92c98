"""What a person runs: `python -m training.<verb>`, one module a verb."""

import services  # noqa: F401 - sets up OpenMP, which must happen before torch is loaded
