"""Command lines from pydantic models: fields are flags, and their descriptions the help.

`Config` is the base of a command's configuration; `read` fills it from flags, and a `BaseSettings` also from the
environment.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, TypeVar, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, CliSettingsSource, NoDecode

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class Config(BaseModel):
    """Base of the models that decide what a command does. Reads flags, and no environment variable."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def _split(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(values))


class _Replaced:
    """Marks a list flag whose last occurrence counts, instead of all together."""


Commas = Annotated[tuple[T, ...], NoDecode, _Replaced, BeforeValidator(_split), AfterValidator(_distinct)]
"""A list typed with commas, each item once; of a flag that is typed again, the last one counts."""

Repeated = Annotated[tuple[T, ...], NoDecode, BeforeValidator(_split)]
"""A list made by repeating the flag, or typed with commas."""

Share = Annotated[float, Field(ge=0, lt=1)]
"""A number of at least 0 and below 1."""


def read(kind: type[M], argv: Sequence[str] | None, *, prog: str) -> M:
    """Reads a model from flags; a `BaseSettings` also from the environment, which flags override.

    Booleans are switches, names are in kebab case, and a positional argument is a pydantic-settings `CliPositionalArg`.
    The first paragraph of the model's docstring describes the command.

    Raises:
        SystemExit: A flag or variable is missing or wrong (code 2, one line each on stderr), or --help was asked for.
    """
    has_environment = issubclass(kind, BaseSettings)
    about = " ".join((kind.__doc__ or "").strip().partition("\n\n")[0].split())
    parser = argparse.ArgumentParser(prog=prog, description=about, allow_abbrev=False)
    flags = _Flags(kind)
    source: CliSettingsSource[Any] = CliSettingsSource(
        cast("type[BaseSettings]", kind),
        root_parser=parser,
        add_argument_method=flags.add,
        cli_kebab_case=True,
        cli_implicit_flags=True if has_environment else "toggle",  # a variable that says yes can be taken back
        cli_hide_none_type=True,
        cli_enforce_required=not has_environment,
    )
    parser.usage = " ".join(["%(prog)s", *flags.required, "[options]"])
    try:
        return kind(**source(args=list(sys.argv[1:] if argv is None else argv))())
    except ValidationError as error:
        prefix = kind.model_config.get("env_prefix")
        for line in explained(error, prefix):
            print(f"{prog}: error: {line}", file=sys.stderr)
        raise SystemExit(2) from None


def flags_of(config: Config, implied: Mapping[str, object] = MappingProxyType({})) -> list[str]:
    """The flags that `read` would turn into this configuration, without those at their default.

    `implied` holds the values that other fields imply, which replace the defaults.
    """
    flags: list[str] = []
    for name, field in type(config).model_fields.items():
        value, flag = getattr(config, name), name.replace("_", "-")
        if value == implied.get(name, field.default):
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return flags


def explained(error: ValidationError, env_prefix: object = None) -> list[str]:
    """What is wrong with a model, one line for each flag; `env_prefix` is that of the environment variables, if any."""
    told: dict[str, list[str]] = {}
    for one in error.errors():
        name = str(one["loc"][0]) if one["loc"] else ""  # none: it is about several of them together
        variable = f" (or {env_prefix}{name.upper()})" if env_prefix is not None else ""
        where = f"--{name.replace('_', '-')}{variable}: " if name else ""
        message = one["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        told.setdefault(where, []).append("is required" if one["type"] == "missing" else message)
    return [f"{where}{message}" for where, messages in told.items() for message in _joined(where, messages)]


def _joined(where: str, messages: Sequence[str]) -> Iterable[str]:
    """Joins the messages about a flag's several types into one line."""
    return [", or ".join(dict.fromkeys(messages))] if where else messages


class _Flags:
    """Adds a model's fields to an argparse parser, grouped by the class that declares them."""

    def __init__(self, kind: type[BaseModel]) -> None:
        self._kind = kind
        self._groups: dict[type[BaseModel], argparse._ArgumentGroup] = {}
        self.required: list[str] = []

    def add(self, parser: argparse.ArgumentParser, *names: str, **options: Any) -> argparse.Action:
        """As `argparse.ArgumentParser.add_argument`."""
        name = options.get("dest", names[0])
        field = self._kind.model_fields.get(name)
        if field is None:
            return parser.add_argument(*names, **options)
        if not names[0].startswith("-"):
            self.required.append(name)
        elif options.get("required"):
            self.required.append(f"{names[0]} {name.upper()}")
        if _Replaced in field.metadata:
            options.pop("action", None)
        if not options.get("metavar", "{").startswith("{"):  # a type's name
            options.pop("metavar")
        options["help"] = _help(field).replace("%", "%%")
        flags = (f"-{one}" if re.fullmatch("-[a-z]", one) else one for one in names)  # --n, and not -n
        return self._group(parser, name).add_argument(*flags, **options)

    def _group(self, parser: argparse.ArgumentParser, name: str) -> argparse.ArgumentParser | argparse._ArgumentGroup:
        """The group of the mixin that declares the field; the model's own fields are in none."""
        bases = self._kind.__mro__[1:]
        owner = next((base for base in reversed(bases) if name in getattr(base, "model_fields", ())), None)
        title = "" if owner is None else (owner.__doc__ or "").partition("\n")[0].rstrip(".")
        if owner is None or not title:
            return parser
        if owner not in self._groups:
            self._groups[owner] = parser.add_argument_group(title)
        return self._groups[owner]


def _help(field: FieldInfo) -> str:
    """The field's description and its default, unless that is none or a switch."""
    about, default = field.description or "", field.default
    if isinstance(default, bool) or default in (None, ()) or field.is_required():
        return about
    parts = default if isinstance(default, tuple) else (default,)
    return f"{about} (default {','.join(f'{one:g}' if isinstance(one, float) else str(one) for one in parts)})"
