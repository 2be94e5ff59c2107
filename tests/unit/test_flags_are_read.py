"""A flag that is accepted does something: every field of the configuration is read by code that is not a check.

Read means: an attribute of its name is taken from something that holds its part of the configuration (``config``, the
part's name, a variable that was given such a value, a parameter with its type), outside of ``validate`` and of
functions ``_check_...``. What only a property of the configuration reads counts if the property is read itself.
"""

from __future__ import annotations

import ast
import re
import typing
from collections.abc import Iterator
from pathlib import Path

from megatron_hc.cli_options import options
from megatron_hc.config import TrainConfig, leaf_fields

ROOT = Path(__file__).parents[2]
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted((ROOT / "megatron_hc").rglob("*.py"))
    if "convert" not in path.relative_to(ROOT).parts  # which only writes flags down for others
}


def owners() -> dict[str, type]:
    """Name of a part of the configuration ("model", "residual" ...) -> its class."""
    found: dict[str, type] = {}
    for path, _ in leaf_fields(TrainConfig):
        owner: type = TrainConfig
        for name in path[:-1]:
            owner = typing.get_type_hints(owner)[name]
            found[name] = owner
    return found


OWNERS = owners()
ANY = "any"
ONE_VALUE: set[str] = set()
"""Flags with one value that is offered and others that exist to be refused with the reason."""


def class_of(annotation: ast.expr | None) -> str | None:
    """The configuration class that a parameter's annotation names."""
    text = ast.unparse(annotation) if annotation is not None else ""
    names = {owner.__name__ for owner in OWNERS.values()}
    return next((word for word in text.replace('"', "").split(" | ") if word in names), None)


def holder(node: ast.expr, known: dict[str, str]) -> str | None:
    """The configuration class whose object ``node`` is, ANY for one that is not certain, None for anything else."""
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    if ast.unparse(node) in known:
        return known[ast.unparse(node)]
    if isinstance(node, ast.Attribute) and name in OWNERS and holder(node.value, known) is not None:
        return OWNERS[name].__name__
    return ANY if name == "config" else None


def pairs(node: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    """(target, value), tuples taken apart."""
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=False)
        else:
            yield target, node.value


def names_for_parts(tree: ast.AST, known: dict[str, str]) -> dict[str, str]:
    """``known`` and what is given such a value in ``tree``: variables, parameters, and attributes of self."""
    known = dict(known)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and (kind := class_of(node.annotation)):
            known[node.arg] = kind
        elif isinstance(node, ast.AnnAssign) and (kind := class_of(node.annotation)):
            known[ast.unparse(node.target)] = kind
        elif isinstance(node, ast.Assign):
            for target, value in pairs(node):
                if isinstance(target, ast.Name | ast.Attribute) and (kind := holder(value, known)):
                    known[ast.unparse(target)] = kind
    return known


def reads_of(function: ast.AST, known: dict[str, str]) -> set[tuple[str, str]]:
    """(class or ANY, attribute) of everything that ``function`` takes from a part of the configuration."""
    known = names_for_parts(function, known)
    found: set[tuple[str, str]] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if (kind := holder(node.value, known)) is not None:
                found.add((kind, node.attr))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) >= 2:
            kind = holder(node.args[0], known)
            if kind is not None:
                found |= {(kind, name) for name in names_in(node.args[1])}
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "given":  # the command line, not yet built
            found |= {(ANY, name) for name in names_in(node.slice)}
    return found


def names_in(node: ast.expr) -> set[str]:
    """The options that a string or an f-string can name."""
    if isinstance(node, ast.Constant):
        return {str(node.value)}
    if not isinstance(node, ast.JoinedStr):
        return set()
    parts = [re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".*" for part in node.values]
    return {name for name in options() if re.fullmatch("".join(parts), name)}


def functions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """(class, function) for each function of a module that is not inside another one."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield owner, node
        else:
            yield from functions(node, node.name if isinstance(node, ast.ClassDef) else owner)


def unread(sources: dict[str, str]) -> list[str]:
    """Fields that nothing but checks reads."""
    reads: set[tuple[str, str]] = set()
    through: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for source in sources.values():
        tree = ast.parse(source)
        kept = {name: kind for name, kind in names_for_parts(tree, {}).items() if name.startswith("self.")}
        for owner, function in functions(tree):
            in_config = owner in {kind.__name__ for kind in OWNERS.values()}
            if in_config and "validate" in function.name or function.name.startswith("_check_"):
                continue
            known = {"self": owner} if in_config else kept
            (through.setdefault((owner, function.name), set()) if in_config else reads).update(
                reads_of(function, known)
            )
    while True:
        found = set().union(*(inner for member, inner in through.items() if {member, (ANY, member[1])} & reads))
        if found <= reads:
            break
        reads |= found
    names = [option.path for option in options().values()]
    return [path[-1] for path in names if not {(OWNERS[path[-2]].__name__, path[-1]), (ANY, path[-1])} & reads]


def test_every_flag_is_read() -> None:
    assert set(unread(SOURCES)) == ONE_VALUE, "flags that are accepted and do nothing"


def test_the_check_itself() -> None:
    """Code that stops reading a flag is found, also where a property of the configuration had read it for others."""
    lines = {
        "self.config.clip_grad": "clip_grad",
        "run.config.logging.log_num_zeros_in_grad": "log_num_zeros_in_grad",
        "self.kv_channels": "kv_channels",  # for the property head_size
        "config.qk_layernorm": "qk_layernorm",
    }
    changed = dict(SOURCES)
    for line in lines:
        assert any(line in source for source in SOURCES.values()), f"{line} is not in the code any more: take another"
        whole = re.compile(re.escape(line) + r"\b")  # not the beginning of a longer name
        changed = {file: whole.sub("0.0", source) for file, source in changed.items()}
    assert set(unread(changed)) == set(lines.values()) | ONE_VALUE
