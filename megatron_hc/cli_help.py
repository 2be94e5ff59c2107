"""What every flag means, group by group: the text of ``--help``, and the source of docs/configuration.md. No torch."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator
from typing import NamedTuple

from megatron_hc.cli_options import Option, options
from megatron_hc.config import TrainConfig, flag


class Group(NamedTuple):
    """The flags of one dataclass."""

    path: tuple[str, ...]
    """Attribute names from ``TrainConfig`` down to it: where its settings lie in a nested YAML file."""
    title: str
    """The first line of its docstring."""
    flags: tuple[tuple[Option, str], ...]
    """(option, the string under its field) in order of declaration."""


def groups() -> list[Group]:
    """All groups that hold flags, in order of declaration, a group before the groups in it."""
    return [group for path, owner in _owners(TrainConfig, ()) if (group := _group(path, owner)).flags]


def _owners(owner: type, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], type]]:
    yield path, owner
    hints = typing.get_type_hints(owner)
    for item in dataclasses.fields(owner):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _owners(hints[item.name], (*path, item.name))


def _group(path: tuple[str, ...], owner: type) -> Group:
    docs = _field_docs(owner)
    flags = tuple((options()[name], text) for name, text in docs.items() if name in options())
    return Group(path, (owner.__doc__ or "").strip().split("\n")[0], flags)


def _field_docs(owner: type) -> dict[str, str]:
    """Field name -> the string under it in the source of ``owner``."""
    body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            assert isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant), statement.target.id
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def help_text(prog: str) -> str:
    """The text of --help: all flags by group, with type, default and meaning."""
    lines = [f"usage: {prog} --flag value ... [--yaml-cfg FILE ...]", ""]
    lines += ["  --yaml-cfg FILE", "      Settings in YAML, below the command line; later files win."]
    for group in groups():
        lines += ["", group.title]
        for option, text in group.flags:
            if option.required:
                text += " Required."
            elif option.kind is not bool and option.default not in (None, ()):
                text += f" [{default_of(option)}]"
            elif option.kind is bool and option.default:
                text += " [on]"
            lines.append(f"  {_spelling(option)}")
            lines += textwrap.wrap(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _spelling(option: Option) -> str:
    if option.kind is bool:
        return f"{flag(option.name)}, {flag('no_' + option.name)}"
    value = "{" + ",".join(option.choices) + "}" if option.choices else option.kind.__name__.upper()
    return f"{flag(option.name)} {value}{' ...' if option.many else ''}"


def default_of(option: Option) -> str:
    """The default as one would write it on the command line."""
    value = option.default
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
