"""Dataclass <- YAML <- `key=value`: the one door between what a person writes and what a program reads (P10).

Each component has a frozen dataclass in its own file; a program composes them. A field's comment is its documentation:
`--help` prints it, so it cannot drift. No other file sees a DictConfig.
Rejected: argparse or pydantic next to the dataclasses, which would spell out every field twice.
"""

import dataclasses
import difflib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from train.config_layers import as_expanded, as_list, each, expanded, lay_over, parse, read_yaml
from train.distributed.launcher import report_to_torchrun
from train.nested import leaves
from train.streams import open_streams

Config = TypeVar("Config")

RESOLVE, CHECK = "--resolve", "--check"  # print the resolved config and exit; first also check the input
SIGNAL_DELAY = "TRANSFUSION_SIGNAL_DELAY_S"  # environment: seconds from the stop signal to the kill, if known
REFUSED = 2  # exit status of a program that refused its config or its input
RULES = """A single value stands for a list of one. NAME=null removes the entry NAME that config=FILE put into a
mapping, such as a data source. A whole mapping, 'key={NAME: 1}' in quotes, replaces that of config=FILE; key.NAME=1
changes an entry. In paths ~ and $NAME are expanded."""


def load_config(schema: type[Config], argv: list[str], *, expand: bool = True) -> Config:
    """Return `schema` filled from `config=FILE` arguments (any number, later ones win), then `key=value` arguments.

    `expand` replaces `~` and `$NAME` in paths; not for a config that a run wrote, whose paths are final. Raises
    ValueError naming the key, the value and what was expected; FileNotFoundError for a missing file.
    """
    files = [expanded("config", a.removeprefix("config=")) for a in argv if a.startswith("config=")]
    overrides = [argument for argument in argv if not argument.startswith("config=")]
    for argument in overrides:
        if "=" not in argument or argument.startswith("-"):
            raise ValueError(
                f"argument {argument!r} is not of the form key=value; --help lists the keys, and a value with spaces "
                "or braces needs quotes: 'key={NAME: 1}'"
            )
    layers = [(f"config={path}", read_yaml(path)) for path in files]
    for argument in overrides:
        key, layer = argument.partition("=")[0], _override(argument, schema)
        if (_expected(schema, key) or "").startswith("dict") and isinstance(_at(layer, key), dict):
            layers.append(("command line", _nested(key, None)))  # what it replaces
        layers.append(("command line", layer))
    layers = [(origin, each(layer, schema, as_list)) for origin, layer in layers]
    given: dict = {}
    for origin, layer in layers:
        lay_over(given, layer, schema, f"{origin}: ")
    if expand:
        given = each(given, schema, as_expanded)
    merged = OmegaConf.structured(schema)
    OmegaConf.set_readonly(merged, False)
    try:
        merged = OmegaConf.merge(merged, given)
    except (OmegaConfBaseException, TypeError):
        merged = _merge_one_by_one(merged, layers, schema)
    _refuse_extreme_numbers(merged)
    try:
        return cast(Config, OmegaConf.to_object(merged))
    except MissingMandatoryValue as error:
        key = str(error.full_key)
        raise ValueError(f"{key} is required: give {key}=VALUE or set it in config=FILE") from None
    except OmegaConfBaseException as error:  # an interpolation of something that does not exist
        remedy = "; an environment variable is written $NAME in a path, ${oc.env:NAME} elsewhere"
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}{remedy}") from None


def _refuse_extreme_numbers(merged: Any) -> None:
    """Raise ValueError for a number that is not finite, or beyond float32 or int64."""
    for key, value in leaves(cast(dict, OmegaConf.to_container(merged))):
        for number in value if isinstance(value, (list, tuple)) else [value]:
            too_large = isinstance(number, float) and not abs(number) < 3.4e38  # nan compares false
            too_large |= isinstance(number, int) and not -(1 << 63) <= number < 1 << 63
            if too_large:
                raise ValueError(f"{key}={number}: expected a finite number of ordinary size")


def to_yaml(config: Any) -> str:
    """Render a resolved config for `config=` to read back; raise ValueError for a name that is not UTF-8."""
    try:
        return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))
    except UnicodeEncodeError as error:
        raise ValueError(f"{error.object!a}: expected a name in UTF-8, as configs are; rename it") from None


def run_program(main: Callable[[list[str]], int | None], *, lasting: bool = False) -> None:
    """Run a program's `main(argv)` and exit; a user's mistake is printed as one message, without a traceback.

    Exit status: main's own (None is 0), 2 for a refusal, 130 for Ctrl-C. `TRACEBACK=1` shows where a refusal arose. If
    the module sets `GROUP = True`, its ranks work together: a refusal by one rank is sent to the others. `--resolve`
    prints the resolved config instead of running; `--check` first calls the module's `check(config)`, if any, which
    looks at the program's input: slurm.launch asks before it queues. A `lasting` program continues when its output is
    no longer read (train/streams.py).
    """
    module: Any = inspect.getmodule(main)
    name = f"{module.__package__ or 'train'}.{Path(module.__file__).stem}"
    is_group = getattr(module, "GROUP", False)
    argv = sys.argv[1:]
    asked = {RESOLVE, CHECK} & set(argv)
    open_streams(lasting=lasting and not asked)
    if {"--help", "-h", "help"} & set(argv):
        print(help_text(f"python -m {name}", inspect.getdoc(module) or "", module.CONFIG))
        sys.exit(0)
    try:
        if asked:
            resolved = _resolved(module, [argument for argument in argv if argument not in asked], CHECK in asked)
            sys.stdout.buffer.write(resolved.encode())  # always UTF-8, for programs to read
        status = 0 if asked else main(argv) or 0
        sys.stdout.flush()
        sys.exit(status)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command continues from here", file=sys.stderr)
        status = 130
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            traceback.print_exc()
        _print_refusal(f"{name}: {error}")
        if is_group:
            from train.distributed.rendezvous import tell_peers  # imports torch, as only programs of ranks do

            tell_peers(error)
        status = REFUSED
    except Exception as error:  # raised again, unless a peer has said why it left
        reason = None
        if is_group:
            from train.distributed.rendezvous import refusal_of_peer  # as above

            reason = refusal_of_peer(error)
        if reason is None:
            report_to_torchrun(traceback.format_exc())
            raise
        _print_refusal(f"{name}: {reason}")
        status = REFUSED
    sys.stdout.flush()
    sys.stderr.flush()
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        os._exit(status)  # an orderly shutdown would wait for peers that may be inside a collective
    sys.exit(status)


def _print_refusal(message: str) -> None:
    """Print why this rank ends, and leave it for torchrun's report."""
    rank = os.environ.get("RANK", "0")
    print(f"[rank {rank}] {message}" if rank not in ("", "0") else message, file=sys.stderr, flush=True)
    report_to_torchrun(message)


def _resolved(module: Any, argv: list[str], check: bool) -> str:
    """Return the resolved config as YAML, preceded by comments on the paths that were expanded."""
    argv = getattr(module, "gathered", list)(argv)  # where a key may be given several times
    fill = getattr(module, "fill", lambda config: config)  # from files that the config names
    config = fill(load_config(module.CONFIG, argv))
    if check and hasattr(module, "check"):
        with redirect_stdout(sys.stderr):
            module.check(config)
    written = fill(load_config(module.CONFIG, argv, expand=False))
    expansions = [
        f"# {key}: {value} stood for {now}\n"
        for (key, value), (_, now) in zip(*(leaves(dataclasses.asdict(c)) for c in (written, config)), strict=True)
        if value != now
    ]
    return "".join(expansions) + to_yaml(config)


def help_text(command: str, purpose: str, schema: type) -> str:
    """Return the usage and every option of `schema` with its type, default and comment."""
    usage = f"usage: {command} [--help | --resolve] [config=FILE.yaml] [key=value ...]"
    lines = [usage, "", purpose, "", RULES, "", "options (key: type = default):"]
    for key, type_name, default, comment in options(schema):
        lines.append(f"  {key}: {type_name} = {default}")
        if comment:
            lines.append(f"      {comment}")
    return "\n".join(lines)


def options(schema: type, prefix: str = "", defaults: Any = None) -> Iterator[tuple[str, str, str, str]]:
    """Yield (dotted key, type, default, comment) of each leaf field, including those of nested dataclasses.

    `defaults` is the composing config's default instance; None: the schema's own defaults.
    """
    for owner, name, key, type_name, default in _leaf_fields(schema, prefix, defaults):
        yield key, type_name, default, _field_comments(owner).get(name, "")


def _leaf_fields(schema: type, prefix: str = "", defaults: Any = None) -> Iterator[tuple[type, str, str, str, str]]:
    """Yield (dataclass, field, dotted key, type, default): options but for comments, which are read from sources."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint, key = hints[field.name], prefix + field.name
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _leaf_fields(hint, f"{key}.", _value(field, defaults))
            continue
        if get_origin(hint) is dict and dataclasses.is_dataclass(get_args(hint)[1]):
            yield schema, field.name, key, "name: settings", "{}"
            yield from _leaf_fields(get_args(hint)[1], f"{key}.NAME.")
            continue
        value = _value(field, defaults)
        shown = "(required)" if value is dataclasses.MISSING or value == MISSING else str(value)
        yield schema, field.name, key, _type_name(hint), shown


def _override(argument: str, schema: type) -> dict:
    """Return one `key=value` as a mapping. The value is YAML, except for strings, which are taken literally."""
    key, _, value = argument.partition("=")
    expected, parent = (_expected(schema, name) for name in (key, key.rpartition(".")[0]))
    in_mapping = expected == parent == "dict[str, str]"
    is_text = expected in ("str", "str | None") or in_mapping or (expected == "list[str]" and value[:1] != "[")
    if is_text and value != "null" and (value or in_mapping):
        return _nested(key, value)
    return _nested(key, parse(f"command line: {argument}", value))


def _at(layer: dict, key: str) -> Any:
    """Return what `_nested` put under a dotted key."""
    value: Any = layer
    for part in key.split("."):
        value = value[part]
    return value


def _nested(key: str, value: Any) -> dict:
    """Return the mapping that holds one value under a dotted key."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge_one_by_one(merged: Any, layers: list[tuple[str, dict]], schema: type) -> Any:
    """Return `merged` with the layers' values; raise ValueError for the first unknown key or value of another type."""
    for origin, key, value in ((origin, *leaf) for origin, layer in layers for leaf in leaves(layer)):
        try:
            merged = OmegaConf.merge(merged, _nested(key, value))
        except (OmegaConfBaseException, TypeError):
            expected = _expected(schema, key)
            problem = f"{key}={value!r}: expected {_in_words(expected)}" if expected else _unknown_key(schema, key)
            raise ValueError(f"{origin}: {problem}") from None
    return merged


def _in_words(type_name: str) -> str:
    """Return a type for people: the choices of a Literal, the form of a mapping."""
    said = re.sub(r"Literal\[(.*?)\]", lambda choices: f"one of {choices[1].replace(chr(39), '')}", type_name)
    said = re.sub(r"dict\[str, (\w+)\]", r"a mapping of names to \1, such as {NAME: ...}", said)
    return said.replace(" | None", ", or null")


def _expected(schema: type, key: str) -> str | None:
    """Return the type that a key expects; None for an unknown key."""
    parts = key.split(".")
    for name, type_name in _types(schema):
        names = name.split(".")
        if all(mine in (theirs, "NAME") for mine, theirs in zip(names, parts, strict=False)):
            if len(names) > len(parts):
                return f"a group of keys, such as {name}"
            if len(names) == len(parts) or type_name.startswith("dict"):
                return type_name
    return None


@cache
def _types(schema: type) -> list[tuple[str, str]]:
    """Return (dotted key, type) of each option; cached, as every argument looks it up."""
    return [(key, type_name) for _, _, key, type_name, _ in _leaf_fields(schema)]


def _unknown_key(schema: type, key: str) -> str:
    known = [name for name, _ in _types(schema)]
    known += sorted({name.rsplit(".", depth)[0] for name in known for depth in range(1, name.count(".") + 1)})
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else "") + " (--help lists the keys)"


@cache
def _field_comments(schema: type) -> dict[str, str]:
    """Return each field's comment: the trailing one, or the comment lines directly above it."""
    comments: dict[str, str] = {}
    above: list[str] = []
    for base in reversed([c for c in schema.__mro__ if dataclasses.is_dataclass(c)]):
        for line in inspect.getsource(base).splitlines():
            field = re.match(r"    (\w+):[^#]*?(?:#\s*(.*))?$", line)
            if comment := re.match(r"    #\s*(.*)$", line):
                above.append(comment[1])
                continue
            if field:
                comments[field[1]] = " ".join([*above, field[2] or ""]).strip()
            above = []
    return comments


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Union:
        return " | ".join("None" if part is type(None) else _type_name(part) for part in get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def _value(field: dataclasses.Field, defaults: Any) -> Any:
    if defaults is not None:
        return getattr(defaults, field.name)
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
