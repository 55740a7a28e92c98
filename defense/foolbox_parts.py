"""What is used of foolbox, imported without the warning of an import that none of it needs."""

import warnings

with warnings.catch_warnings():
    # foolbox 3.3.4 imports gaussian_filter from where SciPy kept it until 1.8.
    warnings.filterwarnings("ignore", message="Please import `gaussian_filter`", category=DeprecationWarning)
    from foolbox.attacks.ddn import DDNAttack
    from foolbox.attacks.fast_gradient_method import LinfFastGradientAttack
    from foolbox.attacks.hop_skip_jump import HopSkipJumpAttack
    from foolbox.attacks.projected_gradient_descent import (
        L2ProjectedGradientDescentAttack,
        LinfProjectedGradientDescentAttack,
    )
    from foolbox.criteria import Misclassification
    from foolbox.models.pytorch import PyTorchModel
    from foolbox.types import Bounds

__all__ = [
    "Bounds",
    "DDNAttack",
    "HopSkipJumpAttack",
    "L2ProjectedGradientDescentAttack",
    "LinfFastGradientAttack",
    "LinfProjectedGradientDescentAttack",
    "Misclassification",
    "PyTorchModel",
]
