"""Command lines from dataclasses: a field is a flag, a class a group of the help. Loads nothing that takes time."""

import argparse
import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import recurrent_drafter
from recurrent_drafter.training.options import check_least

METAVARS = {int: "N", float: "X"}
TRUTH = dict.fromkeys(("true", "t", "yes", "y", "1"), True) | dict.fromkeys(("false", "f", "no", "n", "0"), False)


class OptionParser(argparse.ArgumentParser):
    """Flags for every field of some dataclasses, by its name, which may also be spelled with hyphens.

    A field's metadata may hold ``help``, ``aliases``, ``least``, which a number is held to, and ``positional`` (a
    place, shown by this name, and no flag).
    """

    def __init__(self, *kinds: Any, prog: str | None = None, description: str = "", more: str = "") -> None:
        super().__init__(
            prog=prog, description=description, epilog=more, allow_abbrev=False, argument_default=argparse.SUPPRESS,
            formatter_class=_Formatter,
        )  # fmt: skip
        self.kinds = kinds
        self.add_argument("--version", action="version", help="show it and exit",
                          version=f"recurrent-drafter {recurrent_drafter.__version__}")  # fmt: skip
        for kind in kinds:
            hints = get_type_hints(kind)
            for owner, members in by_class(kind):
                group = self.add_argument_group(title(owner))
                for member in members:
                    add(group, member, hints[member.name])
        places = [str(action.metavar) for action in self._actions if not action.option_strings]
        self.usage = " ".join(["%(prog)s", *places, "[flags]"])

    def error(self, message: str) -> NoReturn:
        """Leave it to the caller to say it in one line."""
        raise ValueError(f"{message} (--help lists the flags)")

    def options(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """An instance of each dataclass. Raises ValueError for an unknown flag, then for a value that does not fit."""
        for word in argv:
            is_flag = word.startswith("--") and word != "--" and " " not in word
            if is_flag and word.split("=")[0] not in self._option_string_actions:
                raise unknown_argument(word)
        options, unknown = self.known_options(argv)
        if unknown:
            raise unknown_argument(unknown[0])
        return options

    def known_options(self, argv: Sequence[str]) -> tuple[tuple[Any, ...], list[str]]:
        """As `options`, and the words that belong to none of these flags, in their order."""
        found, rest = self.parse_known_args(list(argv))
        names = [{field.name for field in dataclasses.fields(kind)} for kind in self.kinds]
        given = [{name: value for name, value in vars(found).items() if name in own} for own in names]
        options = tuple(kind(**values) for kind, values in zip(self.kinds, given, strict=True))
        for one in options:
            check_least(one)
        return options, rest


def unknown_argument(word: str) -> ValueError:
    """What to raise for it; what follows an equals sign may be a token, and is left out."""
    return ValueError(f"unknown argument {word.split('=')[0]} (--help lists the flags)")


def title(owner: Any) -> str:
    """``data`` for ``DataOptions``; the package's name for a class that is not ours."""
    package, name = owner.__module__.partition(".")[0], owner.__name__.removesuffix("Options").lower()
    return str(name if package == "recurrent_drafter" else package)


def by_class(kind: Any) -> Iterator[tuple[Any, list[dataclasses.Field[Any]]]]:
    """The fields of a dataclass that are flags; those of one that declares none itself by the bases that do."""
    flags = {field.name: field for field in dataclasses.fields(kind) if field.init and not field.name.startswith("_")}
    if inspect.get_annotations(kind):
        yield kind, list(flags.values())
        return
    for base in kind.__mro__:
        if own := [flags.pop(name) for name in inspect.get_annotations(base) if name in flags]:
            yield base, own


def add(group: Any, field: dataclasses.Field[Any], hint: Any) -> None:
    """A field as a flag, or as a place; a truth that is the default, or may be, also as ``--no_...``."""
    name, metadata = field.name, field.metadata
    settings: dict[str, Any] = {"help": explained(field), **typed(hint)}
    if "positional" in metadata:
        group.add_argument(name, **settings | {"metavar": metadata["positional"]})
        return
    required = field.default is field.default_factory is dataclasses.MISSING
    names = *spelled(name), *metadata.get("aliases", ())
    flag = group.add_argument(*names, dest=name, required=required, **settings)
    if field.default in (True, None) and flag.type is truth:
        flag.metavar = f"--no_{name}"
        unsaid = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        group.add_argument(*spelled(f"no_{name}"), dest=name, action="store_false", **unsaid)


def spelled(name: str) -> dict[str, None]:
    return dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))


def typed(hint: Any) -> dict[str, Any]:
    """How argparse reads a value of a type; of a union's members an Enum, a bool and a str go before others."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        members = [member for member in get_args(hint) if member is not NoneType]
        return typed(min(members, key=lambda member: (not is_enum(member), member is not bool, member is not str)))
    if origin is Literal:
        return {"choices": get_args(hint)}
    if is_enum(hint):
        return {"choices": [member.value for member in hint]}
    if hint is bool:
        return {"type": truth, "nargs": "?", "const": True}
    if origin is list:
        return {**typed(get_args(hint)[0]), "nargs": "+"}
    return {"type": hint, "metavar": METAVARS.get(hint, "TEXT")}


def is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def truth(word: str) -> bool:
    """Of a word. Raises argparse's error for others."""
    if word.lower() not in TRUTH:
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return TRUTH[word.lower()]


def explained(field: dataclasses.Field[Any]) -> str:
    """A field's help, with its default unless that goes without saying."""
    text = str(field.metadata.get("help", "")).replace("%", "%%")
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    unsaid = default is dataclasses.MISSING or isinstance(default, bool) or default in (None, "", [])
    if unsaid or "default" in text:
        return text
    shown = " ".join(map(str, default)) if isinstance(default, list) else getattr(default, "value", default)
    return f"{text} (default: {shown})"


class _Formatter(argparse.HelpFormatter):
    """One spelling of every flag."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name[2:]] or action.option_strings
        if not names or action.nargs == 0:
            return ", ".join(names) or str(action.metavar)
        if action.type is truth:
            return ", ".join([*names, *([str(action.metavar)] if action.metavar else [])])
        return f"{', '.join(names)} {self._format_args(action, 'TEXT')}"
