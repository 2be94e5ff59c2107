"""From command line, YAML files and a checkpoint's arguments to a ``TrainConfig``, with each value's origin.

Every field of ``TrainConfig`` is one flag (dashes) and one YAML key (dashes or underscores). Order, the last one wins:
defaults, the checkpoint's arguments, YAML files in the order given, command line. All mistakes are reported at once.
This module imports no torch, so that a wrong flag is refused before torch is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from megatron_hc.cli_help import help_text
from megatron_hc.cli_megatron import ALIASES, NOT_NEEDED, UNDERSCORED, VALUE, VALUES, NotNeeded, instead_of
from megatron_hc.cli_options import (
    CHECKPOINT,
    COMMAND_LINE,
    DEFAULT,
    Option,
    UsageError,
    checkpoint_values,
    coerce,
    describe,
    dump,
    from_flat,
    nearest,
    options,
    show,
    to_flat,
)
from megatron_hc.config import TrainConfig, flag, leaf_fields

__all__ = [
    "Parsed",
    "UsageError",
    "checkpoint_values",
    "describe",
    "dump",
    "exit_on_user_error",
    "from_flat",
    "parse",
    "parse_with_checkpoint",
    "to_flat",
]

Base = Mapping[str, object] | Callable[[dict[str, Any]], Mapping[str, object]]


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What ``parse`` found."""

    config: TrainConfig
    origins: dict[str, str]
    """Field name -> "default", "checkpoint", "yaml FILE" or "command line"."""


@dataclasses.dataclass
class _Found:
    """Values and mistakes while parsing."""

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    origins: dict[str, str] = dataclasses.field(default_factory=dict)
    errors: list[str] = dataclasses.field(default_factory=list)
    not_needed: dict[str, str] = dataclasses.field(default_factory=dict)
    """As written -> why."""
    dropped: set[str] = dataclasses.field(default_factory=set)
    """Flags (as written, without values) that the cleaned command line leaves out."""
    beside: dict[str, tuple[str, tuple[str, ...]]] = dataclasses.field(default_factory=dict)
    """Flag or key that is not needed, as written -> the field and the values of it that make it so."""
    tried: set[str] = dataclasses.field(default_factory=set)
    """Fields that were given, well or badly."""
    spelled: dict[str, str] = dataclasses.field(default_factory=dict)
    """Field -> the flag of the command line that gave its value, as written."""
    in_file: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Field that the YAML file being read has given -> groups and key that gave it."""

    def take(self, option: Option, raw: object, origin: str, spelled: str) -> None:
        self.tried.add(option.name)
        try:
            _refuse_others(option, raw)
            value = coerce(option, raw)
            # A variable of a script that is not set: a folder "" would be the current one.
            if origin != CHECKPOINT and "" in (value if option.many else (value,)):
                raise ValueError("takes text, and this is empty: leave the flag out")
        except ValueError as error:
            where = f" ({origin})" if origin != COMMAND_LINE else ""
            self.errors.append(f"{spelled}{where}: {error}")
        else:
            if origin == COMMAND_LINE:
                self._note_spelling(option, value, spelled)
            self.values[option.name], self.origins[option.name] = value, origin

    def take_key(self, option: Option, raw: object, where: str, group: tuple[str, ...], key: str) -> None:
        """A key of a YAML file, which can name a setting flat, below a group, by its ``no_`` and by another name."""
        earlier = self.values.get(option.name)
        self.take(option, raw, where, key)
        place = (*group, key.replace("-", "_"))
        # The same key in the same place has been reported when the file was read.
        if self.in_file.setdefault(option.name, place) != place and self.values.get(option.name) != earlier:
            self.errors.append(f"{key} ({where}): {option.name} is given twice, with different values")

    def _note_spelling(self, option: Option, value: object, spelled: str) -> None:
        """Of a flag that is given twice the last one counts; a switch must not undo what its field's flag says."""
        earlier = self.spelled.setdefault(option.name, spelled)
        switches = [name for name, targets in ALIASES.items() if VALUE not in targets.values()]
        has_switch = any(_field_name(name) in switches for name in (earlier, spelled))
        if has_switch and earlier != spelled and value != self.values[option.name]:
            self.errors.append(
                f"{spelled} ({value}) contradicts {earlier} ({self.values[option.name]}): both say "
                f"{flag(option.name)}, give one of them"
            )
        self.spelled[option.name] = spelled


def _refuse_others(option: Option, raw: object) -> None:
    """ValueError for a value that Megatron-LM has, or a program made of it, with what to do instead."""
    known = VALUES.get(option.name, {})
    for word in raw if isinstance(raw, list | tuple) else [raw]:
        if isinstance(word, str) and word in known:
            raise ValueError(f"{word} is not offered: {known[word]}")


def _words(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Split into (words before the first flag, [(flag as written, its words)]); ``--flag=value`` is one word of it."""
    stray: list[str] = []
    flags: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            flags.append((name, [value] if equals else []))
        elif _is_flag(word):
            flags.append((word, []))
        else:
            (flags[-1][1] if flags else stray).append(word)
    return stray, flags


def _is_flag(word: str) -> bool:
    """Whether ``word`` is a flag's name; -1, -1e-3, -inf, -nan and a lone dash are values."""
    return bool(re.match(r"--.|-[A-Za-z]", word)) and word.lower() not in ("-inf", "-infinity", "-nan")


def _of_launcher(spelled: str, words: list[str]) -> bool:
    """Whether a flag is what the deepspeed launcher adds to a script's own: LOCAL_RANK once more."""
    return spelled in ("--local_rank", "--local-rank") and words == [os.environ.get("LOCAL_RANK")]


def _field_name(spelled: str) -> str:
    """The field that a flag would be of; a word that is no flag stays as it is."""
    return spelled[2:].replace("-", "_") if spelled.startswith("--") and "_" not in spelled else spelled


def _known_names() -> list[str]:
    negative = [f"no_{option.name}" for option in options().values() if option.kind is bool]
    return [*options(), *negative, *ALIASES, "yaml_cfg", "help"]


def _switch(name: str) -> tuple[Option, bool] | None:
    """The boolean option that ``name`` sets, and to what: ``bf16`` or ``no_bf16``."""
    for stem, value in ((name, True), (name.removeprefix("no_"), False)):
        option = options().get(stem)
        if option is not None and option.kind is bool:
            return option, value
    return None


def _read_flag(found: _Found, spelled: str, words: list[str]) -> None:
    """One flag of the command line with its words, into ``found``."""
    name = _field_name(spelled)
    option, switch = options().get(name), _switch(name)
    if switch is not None and words:
        found.errors.append(f"{spelled} takes no value, but {show(' '.join(words))} follows it")
    elif switch is not None:
        found.take(switch[0], switch[1], COMMAND_LINE, spelled)
    elif option is not None:
        _read_values(found, option, spelled, words)
    elif name in ALIASES:
        _read_alias(found, name, spelled, words)
    elif name in NOT_NEEDED:
        _read_not_needed(found, name, spelled, words)
    elif (instead := instead_of(name)) is not None:
        found.errors.append(f"{spelled} is not offered: {instead}")
    else:
        near = nearest(name.lstrip("-").replace("-", "_"), _known_names(), flag)
        found.errors.append(f"{spelled} is not a flag{near}")


def _read_values(found: _Found, option: Option, spelled: str, words: list[str]) -> None:
    found.tried.add(option.name)
    if not words:
        found.errors.append(f"{spelled} takes {'one or more values' if option.many else 'a value'}, and none follows")
    elif option.many:
        found.take(option, words, COMMAND_LINE, spelled)
    elif len(words) > 1:
        found.errors.append(f"{spelled} takes one value, but {show(' '.join(words))} follows")
    else:
        found.take(option, words[0], COMMAND_LINE, spelled)


def _read_alias(found: _Found, name: str, spelled: str, words: list[str]) -> None:
    for target, fixed in ALIASES[name].items():
        option = options()[target]
        if fixed is VALUE:
            _read_values(found, option, spelled, words)
        elif words and VALUE not in ALIASES[name].values():
            found.errors.append(f"{spelled} takes no value, but {show(' '.join(words))} follows it")
        else:
            found.take(option, _fixed(option, fixed), COMMAND_LINE, spelled)


def _fixed(option: Option, fixed: str) -> object:
    return fixed == "true" if option.kind is bool else fixed


def _read_not_needed(found: _Found, name: str, spelled: str, words: list[str]) -> None:
    entry = NOT_NEEDED[name]
    if entry.takes is not None and len(words) != entry.takes:
        found.errors.append(f"{spelled} takes {entry.takes or 'no'} value{'s' * (entry.takes > 1)}, not {len(words)}")
    elif _refused(entry, words):
        found.errors.append(f"{' '.join([spelled, *words])} is not offered: {entry.why}")
    else:
        found.not_needed[" ".join([spelled, *words])] = entry.why
        found.dropped.add(spelled)
        if entry.beside is not None:
            found.beside[spelled] = entry.beside


def _refused(entry: NotNeeded, words: Sequence[object]) -> bool:
    return bool(entry.values) and not all(str(word) in entry.values for word in words)


def _check_beside(found: _Found, base_values: Mapping[str, Any]) -> None:
    """Refuse what only the value of another flag would make unneeded."""
    for spelled, (name, values) in found.beside.items():
        value = found.values.get(name, base_values.get(name, options()[name].default))
        if value not in values and not (name in found.tried and name not in found.values):
            found.errors.append(f"{spelled} is not offered: give {flag(name)} {' or '.join(values)}, not {value}")
            found.not_needed.pop(spelled)
            found.dropped.discard(spelled)


def _read_yaml(found: _Found, file: str) -> None:
    """The keys of one YAML file, flat or below the names of the groups, into ``found``."""
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few lines of them can stand for more than memory holds
                self._refuse("names of other values (*name) are not taken")
            self.depth += 1
            if self.depth > 20:
                self._refuse("it is nested too deeply")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def _refuse(self, why: str) -> None:
            raise yaml.composer.ComposerError(None, None, why, self.peek_event().start_mark)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            seen: set[str] = set()
            for key_node, _ in node.value:
                key = str(key_node.value).replace("-", "_")
                if key in seen:
                    found.errors.append(f"{key_node.value} (yaml {file}): is given twice")
                seen.add(key)
            return super().construct_mapping(node, deep)

        def construct_number(self, node: Any) -> Any:
            """Refuse what YAML 1.1 takes for another number than its reader: octal 010, and 1:30, ninety."""
            value = (self.construct_yaml_int if node.tag.endswith("int") else self.construct_yaml_float)(node)
            if ":" in node.value or re.fullmatch(r"[-+]?0[0-7_]+", node.value):
                found.errors.append(f"--yaml-cfg {file}: {node.value} is {value} in YAML: write {value}, or quote it")
            return value

    for kind in ("int", "float"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", Loader.construct_number)
    found.in_file.clear()
    try:
        with open(file, encoding="utf-8") as stream:
            content = yaml.load(stream, Loader)
    except (OSError, UnicodeDecodeError) as error:
        found.errors.append(f"--yaml-cfg {file}: cannot be read ({getattr(error, 'strerror', None) or error})")
    # The library raises more than YAMLError: for dates and numbers that are none, and for tags on the wrong values.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        found.errors.append(f"--yaml-cfg {file}: is not YAML ({' '.join(str(error).split())})")
    else:
        if content is not None and not isinstance(content, dict):
            found.errors.append(f"--yaml-cfg {file}: must hold 'name: value' lines, not {show(content)}")
        for key, value in (content or {}).items() if isinstance(content, dict) else ():
            _read_key(found, file, (), str(key), value)


def _groups() -> dict[str, tuple[str, ...]]:
    """Group name -> its path: model, parallel, ..., and groups in groups (residual)."""
    paths = {path[:depth] for path, _ in leaf_fields(TrainConfig) for depth in range(1, len(path))}
    return {path[-1]: path for path in sorted(paths)}


def _read_key(found: _Found, file: str, group: tuple[str, ...], key: str, value: object) -> None:
    name, where = key.replace("-", "_"), f"yaml {file}"
    groups = _groups()
    if name in groups and groups[name][: len(group)] == group:
        if not isinstance(value, dict):
            found.errors.append(f"{key} ({where}): is a group of settings and takes 'name: value' lines below it")
            return
        for inner, inner_value in value.items():
            _read_key(found, file, groups[name], str(inner), inner_value)
        return
    option, switch = options().get(name), _switch(name)
    if switch is not None and not switch[1]:  # no_load_optim: true
        option, value = switch[0], not value if isinstance(value, bool) else value
    if option is not None and option.path[: len(group)] != group:
        found.errors.append(f"{key} ({where}): belongs to {option.path[-2]}, not to {group[-1]}")
    elif option is not None:
        found.take_key(option, value, where, group, key)
    elif name in ALIASES:
        _read_alias_key(found, name, group, key, value, where)
    elif name in NOT_NEEDED and _refused(NOT_NEEDED[name], [value]):
        found.errors.append(f"{key} ({where}): {show(value)} is not offered: {NOT_NEEDED[name].why}")
    elif name in NOT_NEEDED:
        entry = NOT_NEEDED[name]
        found.not_needed[f"{key} ({where})"] = entry.why
        if entry.beside is not None and value is not False:
            found.beside[f"{key} ({where})"] = entry.beside
    elif (instead := instead_of(name)) is not None:
        found.errors.append(f"{key} ({where}): is not offered: {instead}")
    else:
        found.errors.append(f"{key} ({where}): is not a setting{nearest(name, [*_known_names(), *groups])}")


def _read_alias_key(found: _Found, name: str, group: tuple[str, ...], key: str, value: object, where: str) -> None:
    if VALUE not in ALIASES[name].values():
        if not isinstance(value, bool):
            found.errors.append(f"{key} ({where}): takes true or false, not {show(value)}")
            return
        if not value:
            return
    for target, fixed in ALIASES[name].items():
        option = options()[target]
        found.take_key(option, value if fixed is VALUE else _fixed(option, fixed), where, group, key)


def parse(argv: Sequence[str], *, base: Base | None = None, prog: str = "pretrain_gpt.py") -> Parsed:
    """Read ``argv`` (without the program's name) into a configuration.

    ``base`` holds a checkpoint's arguments (see ``checkpoint_values``), which lie just above the defaults: either the
    values by field name, or a function that is called with what was given (all fields, defaults filled in) if that has
    --use-checkpoint-args, and returns them. ``--help`` prints and ends the program.

    The configuration is not yet validated against itself: ``parsed.config.validate(data_parallel_size)`` does that.

    Raises:
        UsageError: everything that is wrong, one line each.
    """
    stray, flags = _words(argv)
    if any(spelled in ("--help", "-h") for spelled, _ in flags):
        print(help_text(prog))
        raise SystemExit(0)
    flags = [(UNDERSCORED.get(spelled, spelled), words) for spelled, words in flags if not _of_launcher(spelled, words)]
    found = _Found()
    if stray:
        found.errors.append(f"{show(' '.join(stray))} stands before any flag")
    for spelled, words in flags:
        if spelled == "--yaml-cfg":
            if len(words) != 1:
                found.errors.append(f"--yaml-cfg takes one file, not {len(words)}; give it once per file")
            for file in words[:1]:
                _read_yaml(found, file)
    for spelled, words in flags:
        if spelled != "--yaml-cfg":
            _read_flag(found, spelled, words)
    base_values = _base_values(base, found)
    _check_beside(found, base_values)
    missing = [name for name, option in options().items() if option.required]
    missing = [flag(name) for name in missing if name not in found.tried and name not in base_values]
    if missing and not (callable(base) and found.errors and found.values.get("use_checkpoint_args")):
        folder = found.values.get("load")
        is_empty = callable(base) and not base_values and folder and found.values.get("use_checkpoint_args")
        why = f": --load {folder} holds no checkpoint to take them from" if is_empty else ""
        found.errors.append(f"{', '.join(missing)} must be given{why}")
    if found.errors or found.not_needed:
        raise UsageError(_report(found, argv, prog))
    origins = dict.fromkeys(options(), DEFAULT) | dict.fromkeys(base_values, CHECKPOINT) | found.origins
    return Parsed(from_flat(base_values | found.values), origins)


def parse_with_checkpoint(argv: Sequence[str], *, prog: str = "pretrain_gpt.py") -> Parsed:
    """``parse``, where --use-checkpoint-args reads the arguments that lie beside the checkpoint under --load.

    A folder without a checkpoint gives none, unless --ckpt-step or --exit-on-missing-checkpoint ask for one.
    """
    return parse(argv, base=_arguments_of_checkpoint, prog=prog)


def _arguments_of_checkpoint(given: Mapping[str, Any]) -> dict[str, Any]:
    from megatron_hc.checkpoint_folder import find, find_if_any

    if given["load"] is None:
        return {}  # refused by config.validate
    must_exist = given["ckpt_step"] is not None or given["exit_on_missing_checkpoint"]
    folder = find(given["load"], given["ckpt_step"]) if must_exist else find_if_any(given["load"])
    if folder is None:
        return {}
    file = folder / "arguments.json"
    try:
        return checkpoint_values(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} cannot be read ({error!r}): leave out --use-checkpoint-args") from error


def _base_values(base: Base | None, found: _Found) -> dict[str, Any]:
    if callable(base):
        given = {name: found.values.get(name, option.default) for name, option in options().items()}
        base = base(given) if given["use_checkpoint_args"] and not found.errors else None
    below = _Found()
    for name, raw in (base or {}).items():
        if name in options():
            below.take(options()[name], raw, CHECKPOINT, flag(name))
        else:
            below.errors.append(f"{name} (checkpoint): is not a setting of this version")
    found.errors += below.errors
    return below.values


def _report(found: _Found, argv: Sequence[str], prog: str) -> str:
    lines = found.errors + [f"{spelled} is not needed here: {why}" for spelled, why in found.not_needed.items()]
    if len(lines) > 1:
        lines.insert(0, f"{len(lines)} arguments to mend")
    if found.dropped:
        lines.append(f"the command line without what is not needed:\n{shlex.join([prog, *_cleaned(found, argv)])}")
    return "\n  ".join(lines)


def _cleaned(found: _Found, argv: Sequence[str]) -> list[str]:
    kept: list[str] = []
    dropping = False
    for word in argv:
        if _is_flag(word):
            spelled = word.partition("=")[0]
            dropping = UNDERSCORED.get(spelled, spelled) in found.dropped
        if not dropping:
            kept.append(word)
    return kept


@contextlib.contextmanager
def exit_on_user_error(prog: str) -> Iterator[None]:
    """Turn a ``ValueError`` into ``PROG: error: MESSAGE`` on stderr and exit code 2; anything else passes.

    Where what reads the output has seen enough (``| head``), the tool ends without a word, exit code 1; after Ctrl-C
    with one, exit code 130.
    ``MEGATRON_HC_TRACEBACK=1`` in the environment prints the traceback as well.
    """
    try:
        yield
    except ValueError as error:
        if os.environ.get("MEGATRON_HC_TRACEBACK"):
            traceback.print_exception(error)
        print(f"{prog}: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        print(f"{prog}: interrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from error
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        raise SystemExit(1) from error
