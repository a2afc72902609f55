"""From dataclass fields to flags and YAML keys: the machinery behind `config.py`, which knows no setting by name.

A setting is one dataclass field. Its annotation gives the type (`int`, `float | None`, `tuple[float, float]`, ...),
`setting(...)` the default, the help text, the choices and the range; the flag, its `--no-x` twin, the YAML key, the
line in `--help` and every check follow from these. argparse only splits the command line into words: `convert` alone
turns words into values and checks them, so that a flag, a YAML key and a Python argument cannot be judged differently,
and each error can name the place where the value came from.
"""
from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import math
import os
import re
import shutil
import types
import typing
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError

_KINDS = {int: "a whole number", float: "a finite number", str: "text (in YAML: in quotes)"}
_METAVARS = {int: "N", float: "X", str: "NAME"}


def setting(default: Any, help: str, *, choices: Sequence[str] = (), within: str = "", pattern: str = "",
            flags: Sequence[str] = (), metavar: str = "", bare: str | None = None) -> Any:
    """A dataclass field that is also a flag and a YAML key.

    within: an interval such as "[0, 1)" or "(0, inf)". pattern: what a free text must match in full.
    flags: further names. bare: the value of the flag given without one.
    """
    return dataclasses.field(default=default, metadata={
        "help": help, "choices": tuple(choices), "within": within, "pattern": pattern, "flags": tuple(flags),
        "metavar": metavar, "bare": bare})


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of a section, read: its type taken apart and its metadata."""

    name: str
    kind: type  # bool, int, float or str
    length: int  # 0 for a scalar, n for a tuple of n
    optional: bool  # None is allowed; the word for it on a command line is `none`
    default: Any
    help: str
    choices: tuple[str, ...]
    within: str
    pattern: str
    flags: tuple[str, ...]
    metavar: str
    bare: str | None

    @property
    def flag(self) -> str:
        """The flag's main spelling."""
        return "--" + self.name.replace("_", "-")

    @property
    def keys(self) -> list[str]:
        """Every name that a YAML file may use, with `_`: the field's own and the long aliases."""
        return [self.name] + [f[2:].replace("-", "_") for f in self.flags if f.startswith("--")]

    def range_text(self) -> str:
        """The interval in words: '>= 1', '> 0' or 'in [0, 1)'."""
        low, high = self.within[1:-1].split(", ")
        if high == "inf":
            return (">= " if self.within[0] == "[" else "> ") + low
        return "in " + self.within

    def in_range(self, value: float) -> bool:
        """Whether the value lies in the interval."""
        low, high = map(float, self.within[1:-1].split(", "))
        above = low <= value if self.within[0] == "[" else low < value
        return above and (value <= high if self.within[-1] == "]" else value < high)

    def help_text(self) -> str:
        """The line in --help: what it is, its range where both ends are limited, its default."""
        default = self.default
        if self.kind is bool:
            default = "on" if default else "off"
        elif self.length and default is not None:
            default = " ".join(map(str, default))
        notes = [self.range_text()] if self.within and "inf" not in self.within else []
        notes += [f"default {default}"] if default is not None else []
        return (f"{self.help} [{'; '.join(notes)}]" if notes else self.help).replace("%", "%%")


@functools.cache
def settings(section: type) -> tuple[Setting, ...]:
    """The settings of a dataclass, in the order of its fields."""
    hints = typing.get_type_hints(section)
    found = []
    for field in dataclasses.fields(section):
        kind, optional, length = hints[field.name], False, 0
        if isinstance(kind, types.UnionType):
            kind, optional = typing.get_args(kind)[0], True
        if typing.get_origin(kind) is tuple:
            length, kind = len(typing.get_args(kind)), typing.get_args(kind)[0]
        found.append(Setting(field.name, kind, length, optional, field.default, **field.metadata))
    return tuple(found)


class Section:
    """Base of the configuration dataclasses: converts and checks every field, however the object was made."""

    def __post_init__(self) -> None:
        for s in settings(type(self)):
            object.__setattr__(self, s.name, convert(s, getattr(self, s.name), s.flag))


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence that offers the most similar known names, or all of them when none is similar."""
    known = list(known)
    folded = {k.lower(): k for k in known}
    close = difflib.get_close_matches(word.lower(), list(folded), n=3, cutoff=0.5)
    if close:
        return f"Nearest: {', '.join(folded[c] for c in close)}."
    return f"Known: {', '.join(known)}." if len(known) <= 12 else "`--help` lists them all."


def convert(s: Setting, value: Any, place: str) -> Any:
    """The value as the setting's type; ConfigError, naming `place`, if it is of another type, choice or range."""
    if s.optional and (value is None or (isinstance(value, str) and value.lower() == "none") or value == ["none"]):
        return None
    if s.length:
        if not isinstance(value, (list, tuple)) or len(value) != s.length:
            raise ConfigError(f"{place} takes {s.length} numbers, got {value!r:.80}.")
        return tuple(_scalar(s, v, place) for v in value)
    return _scalar(s, value, place)


def _scalar(s: Setting, value: Any, place: str) -> Any:
    if s.kind is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{place} must be true or false, got {value!r:.80}.")
        return value
    result = None
    if s.kind is str:
        if isinstance(value, (str, os.PathLike)) and str(value):
            result = os.fspath(value)
    elif isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            # PyYAML reads 1e-3 (no dot) as text, and 20.0 is as good an epoch count as 20.
            result = int(value) if isinstance(value, str) and s.kind is int else s.kind(value)
            if not math.isfinite(result) or (isinstance(value, float) and result != value):
                result = None
        except (ValueError, OverflowError):
            result = None
    if result is None:
        raise ConfigError(f"{place} must be {_KINDS[s.kind]}, got {value!r:.80}.")
    if s.choices:
        by_fold = {c.lower(): c for c in s.choices}  # DeiT writes CIFAR10, torchvision DEFAULT
        if result.lower() not in by_fold:
            raise ConfigError(f"{place} must be one of {', '.join(s.choices)}, got {result!r:.80}. "
                              + nearest(result, s.choices))
        return by_fold[result.lower()]
    if s.within and not s.in_range(result):
        raise ConfigError(f"{place} must be {s.range_text()}, got {result}.")
    if s.pattern and not re.fullmatch(s.pattern, result):
        raise ConfigError(f"{place} does not understand {result!r:.80}. It takes: {s.help}.")
    return result


class _Formatter(argparse.HelpFormatter):
    """One line per flag where it fits: `--[no-]amp` for a switch, the value's name once after all spellings."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=38, width=min(118, shutil.get_terminal_size((100, 24)).columns))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return "--[no-]" + action.option_strings[0][2:]
        value = "" if action.nargs == 0 else f" {action.metavar}"
        return ", ".join(action.option_strings) + value


class Parser(argparse.ArgumentParser):
    """argparse with the sections' flags, whose complaints are ConfigError.

    presets: the names that --preset takes; without any there is neither --preset nor --config. omit: settings that get
    no flag.
    """

    def __init__(self, sections: Iterable[type], presets: Collection[str], prog: str, description: str,
                 omit: Collection[str] = ()) -> None:
        sources = "[--preset NAME] [-c FILE] " if presets else ""
        super().__init__(prog=prog, usage=f"{prog} {sources}[flags]", description=description,
                         formatter_class=_Formatter, allow_abbrev=False, add_help=False,
                         argument_default=argparse.SUPPRESS)
        order = "Later wins: defaults, --preset, --config, flags. " if presets else ""
        top = self.add_argument_group("Where settings come from", f"{order}In flags - and _ are alike; the value "
                                      "none unsets what may be unset.")
        top.add_argument("-h", "--help", action="help", help="show this page")
        if presets:
            top.add_argument("--preset", metavar="NAME", help=f"one of {', '.join(presets)}")
            top.add_argument("-c", "--config", metavar="FILE",
                             help="YAML file of settings, such as a run's config.yaml")
        for section in sections:
            group = self.add_argument_group(section.__doc__.splitlines()[0].rstrip("."))
            for s in settings(section):
                if s.name not in omit:
                    self._add(group, s)

    @staticmethod
    def _add(group: argparse._ArgumentGroup, s: Setting) -> None:
        names = [f for f in s.flags if not f.startswith("--")] + [s.flag] + [f for f in s.flags if f.startswith("--")]
        if s.kind is bool:
            group.add_argument(*names, dest=s.name, action=argparse.BooleanOptionalAction, help=s.help_text())
            return
        metavar = f"{{{','.join(s.choices)}}}" if s.choices else s.metavar or _METAVARS[s.kind]
        extra: dict[str, Any] = {"nargs": "+"} if s.length else {}
        if s.bare is not None:
            extra, metavar = {"nargs": "?", "const": s.bare}, f"[{metavar}]"
        group.add_argument(*names, dest=s.name, metavar=metavar, help=s.help_text(), **extra)

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message.removeprefix("argument ") + ". `--help` shows what each flag takes.")

    def words(self, argv: Sequence[str]) -> dict[str, Any]:
        """The settings that the command line names, unconverted (text, lists of text, booleans)."""
        folded = [re.sub(r"^--[^=]+", lambda m: m[0].replace("_", "-"), word) for word in argv]
        known, rest = self.parse_known_args(folded)
        unknown = [word.split("=")[0] for word in rest if word.startswith("-")]
        if unknown:
            flags = [f for f in self._option_string_actions if f.startswith("--")]
            raise ConfigError(" ".join(f"Unknown flag {u}. " + nearest(u, [
                f for f in flags if f.startswith("--no-") == u.startswith("--no-")]) for u in unknown))
        if rest:
            raise ConfigError(f"Unexpected argument {rest[0]!r}. Every setting is a --flag with its value behind it; "
                              "a switch takes no value: --x turns it on, --no-x off.")
        return vars(known)


def read_yaml(path: str) -> dict[Any, Any]:
    """The mapping in a YAML file; ConfigError if it cannot be read or holds something else."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration {path}: {error.strerror}. "
                          "Give -c an existing YAML file.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date or number that YAML cannot hold
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, found a {type(content).__name__}.")
    return content


def from_mapping(mapping: dict[Any, Any], known: dict[str, Setting], source: str) -> dict[str, Any]:
    """The mapping's values converted, under the settings' own names; `source` begins every complaint."""
    by_key = {key: s for s in known.values() for key in s.keys}
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        place = f"{source}: {key}"
        s = by_key.get(str(key).replace("-", "_"))
        if s is None:
            hint = "Keys are flat, without sections." if isinstance(value, dict) else nearest(str(key), by_key)
            raise ConfigError(f"{source}: unknown key {key!r:.80}. {hint}")
        if s.name in values:
            raise ConfigError(f"{place} is given twice ({s.flag} has the keys {', '.join(s.keys)}). Keep one.")
        values[s.name] = convert(s, value, place)
    return values
