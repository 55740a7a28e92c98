"""The command `zo-gateway VERB ...`, also `python -m zo_gateway`. A verb's module is loaded when it is called."""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

VERBS: Final = {
    "check-victim": ("see whether a model can be defended, in seconds", "training.check_victim"),
    "pretrain": ("learn denoiser and autoencoder from images, without a query", "training.pretrain"),
    "fit": ("learn a defense from a model's answers", "training.zo_fit"),
    "serve": ("run the gateway in front of a model", "services.gateway.__main__"),
    "certify": ("certify a running gateway, or a model", "training.certify"),
    "attack": ("attack a defense: from outside, or with everything known", "training.redteam"),
    "evaluate": ("measure a defense and the baselines under attack", "training.evaluate"),
    "compare": ("compare methods at equal numbers of queries", "training.compare"),
    "report": ("write what was measured as one HTML file", "training.report"),
    "hospital": ("serve a model as a black box", "services.hospital.__main__"),
    "keys": ("make a client's key", "services.keys"),
}
"""Each verb's help and module, whose `main` takes the arguments after the verb, and the program's name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb that the first argument names.

    Args:
        argv: The arguments; `sys.argv[1:]` when None.

    Returns:
        The verb's exit code; 2 where there is no such verb.
    """
    verb, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help"):
        print("usage: zo-gateway VERB [flags]\n\nverbs (zo-gateway VERB --help lists a verb's flags):")
        print("\n".join(f"  {name:14}{about}" for name, (about, _) in VERBS.items()))
        return 0
    if verb not in VERBS:
        print(f"zo-gateway: error: there is no verb {verb!r}; there are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    module = VERBS[verb][1]
    if module.endswith(".__main__"):  # a service, whose imports take seconds
        print(f"{module.split('.')[1]}: loading ...", file=sys.stderr, flush=True)
    code: int = import_module(module).main(arguments, prog=f"zo-gateway {verb}")
    return code


if __name__ == "__main__":
    sys.exit(main())
