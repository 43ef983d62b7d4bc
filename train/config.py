"""Dataclass <- YAML <- `key=value`: the one door between what a person writes and what a program reads.

Each component owns a frozen dataclass in its own file; a program composes them. A field's comment is its
documentation: `--help` prints it, so it cannot drift. Nothing past this file sees a DictConfig.
Rejected: argparse or pydantic beside the dataclasses, which would spell every field twice.
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
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from train.config_layers import as_expanded, as_list, each, expanded, lay, parse, read_yaml
from train.distributed.launcher import report_to_torchrun
from train.nested import leaves
from train.streams import open_streams

Config = TypeVar("Config")

RESOLVE, CHECK = "--resolve", "--check"  # print the resolved config instead; and look at the input before
SIGNAL_DELAY = "TRANSFUSION_SIGNAL_DELAY_S"  # environment: seconds from the stop signal to the kill, if known
HELP = {"--help", "-h", "help"}
REFUSED = 2  # exit status of a program that refused its config or its input before working
RULES = """A lone value stands for a list of one. NAME=null leaves out what config=FILE calls NAME in a mapping, such as
a data source. In paths ~ and $NAME are expanded."""


def load_config(schema: type[Config], argv: list[str], *, expand: bool = True) -> Config:
    """Return `schema` filled from `config=FILE` (any number, later wins) and then `key=value` arguments.

    `expand` replaces `~` and `$NAME` in paths; a config that a run wrote holds none, and is not to read this machine's.
    Raises ValueError naming the key, the value and what was expected; FileNotFoundError for a missing file.
    """
    files = [expanded("config", a.removeprefix("config=")) for a in argv if a.startswith("config=")]
    overrides = [argument for argument in argv if not argument.startswith("config=")]
    for argument in overrides:
        if "=" not in argument or argument.startswith("-"):
            raise ValueError(f"argument {argument!r} is not of the form key=value; --help lists the keys")
    layers = [(f"config={path}", read_yaml(path)) for path in files]
    layers += [("command line", _override(argument, schema)) for argument in overrides]
    layers = [(origin, each(layer, schema, as_list)) for origin, layer in layers]
    given = lay(layers, schema)
    if expand:
        given = each(given, schema, as_expanded)
    merged = OmegaConf.structured(schema)
    OmegaConf.set_readonly(merged, False)
    try:
        merged = OmegaConf.merge(merged, given)
    except (OmegaConfBaseException, TypeError):
        for origin, layer in layers:
            for key, value in leaves(layer):  # one by one, slowly, so that the error can name its key
                merged = _merge(merged, key, value, schema, origin)
    _refuse_extreme_numbers(merged)
    try:
        return OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        key = error.full_key
        raise ValueError(f"{key} is required: give {key}=VALUE or set it in config=FILE") from None
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        remedy = "; an environment variable is written $NAME in a path, ${oc.env:NAME} elsewhere"
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}{remedy}") from None


def _refuse_extreme_numbers(merged: Any) -> None:
    """Raise ValueError for a number that is not finite, or that neither float32 nor int64 can hold."""
    for key, value in leaves(OmegaConf.to_container(merged)):
        for number in value if isinstance(value, (list, tuple)) else [value]:
            too_large = isinstance(number, float) and not abs(number) < 3.4e38  # nan compares false
            too_large |= isinstance(number, int) and not -(1 << 63) <= number < 1 << 63
            if too_large:
                raise ValueError(f"{key}={number}: expected a finite number of ordinary size")


def to_yaml(config: Any) -> str:
    """Render a resolved config so that `config=` reads it back; raise ValueError for a name that is not UTF-8."""
    try:
        return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))
    except UnicodeEncodeError as error:
        raise ValueError(f"{error.object!a}: a config is UTF-8, this name is not; rename what it names") from None


def run_program(main: Callable[[list[str]], int | None], *, lasting: bool = False) -> None:
    """Run a program's `main(argv)` and exit; print a user's mistake as one message, without a traceback.

    Exit status: main's own (0 when None), 2 for a refusal, 130 for Ctrl-C. `TRACEBACK=1` shows where a refusal arose.
    Where the module says `GROUP = True`, its ranks work together: a refusal of one before they met reaches the others.
    `--resolve` prints the resolved config in place of running; `--check` also lets the module's `check(config)`, where
    there is one, look at what the program would read: slurm.launch asks before it queues. `lasting` work goes on when
    nobody reads its output any more (train/streams.py).
    """
    module = inspect.getmodule(main)
    name = f"{module.__package__ or 'train'}.{Path(module.__file__).stem}"
    argv = sys.argv[1:]
    asked = {RESOLVE, CHECK} & set(argv)
    open_streams(lasting=lasting and not asked)
    if HELP & set(argv):
        print(help_text(f"python -m {name}", inspect.getdoc(module) or "", module.CONFIG))
        sys.exit(0)
    try:
        if asked:
            resolved = _resolved(module, [argument for argument in argv if argument not in asked], CHECK in asked)
            sys.stdout.buffer.write(resolved.encode())  # for programs to read, wherever it is printed
        status = 0 if asked else main(argv) or 0
        sys.stdout.flush()
        sys.exit(status)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on from here", file=sys.stderr)
        status = 130
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            traceback.print_exc()
        _say_refusal(f"{name}: {error}")
        if getattr(module, "GROUP", False):
            _tell_peers(error)
        status = REFUSED
    except Exception as error:  # raised again, unless a peer has said why it left
        reason = _refusal_of_peer(error) if getattr(module, "GROUP", False) else None
        if reason is None:
            report_to_torchrun(traceback.format_exc())
            raise
        _say_refusal(f"{name}: {reason}")
        status = REFUSED
    sys.stdout.flush()
    sys.stderr.flush()
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        os._exit(status)  # peers may be inside a collective: a tidy shutdown would wait for them
    sys.exit(status)


def _say_refusal(words: str) -> None:
    """Print why this rank ends, and leave it for torchrun's report."""
    rank = os.environ.get("RANK", "0")
    print(f"[rank {rank}] {words}" if rank not in ("", "0") else words, file=sys.stderr, flush=True)
    report_to_torchrun(words)


def _tell_peers(error: Exception) -> None:
    from train.distributed.rendezvous import (
        tell_peers,  # imports torch, as a program whose ranks work together has done
    )

    tell_peers(error)


def _refusal_of_peer(error: Exception) -> str | None:
    from train.distributed.rendezvous import refusal_of_peer  # as above

    return refusal_of_peer(error)


def _resolved(module: Any, argv: list[str], check: bool) -> str:
    config = load_config(module.CONFIG, argv)
    if check and hasattr(module, "check"):
        with redirect_stdout(sys.stderr):
            module.check(config)
    written = load_config(module.CONFIG, argv, expand=False)
    expansions = [
        f"# {key}: {value} stood for {now}\n"
        for (key, value), (_, now) in zip(*(leaves(dataclasses.asdict(c)) for c in (written, config)), strict=True)
        if value != now
    ]
    return "".join(expansions) + to_yaml(config)


def help_text(command: str, purpose: str, schema: type) -> str:
    """List every option of `schema` with its type, default and comment."""
    usage = f"usage: {command} [config=FILE.yaml] [key=value ...]"
    lines = [usage, "", purpose, "", RULES, "", "options (key: type = default):"]
    for key, type_name, default, comment in options(schema):
        lines.append(f"  {key}: {type_name} = {default}")
        if comment:
            lines.append(f"      {comment}")
    return "\n".join(lines)


def options(schema: type, prefix: str = "", defaults: Any = None) -> Iterator[tuple[str, str, str, str]]:
    """Yield (dotted key, type, default, comment) of each leaf field, nested dataclasses included.

    `defaults` is the instance that the composing config starts from; None: the schema's own defaults.
    """
    hints, comments = get_type_hints(schema), _field_comments(schema)
    for field in dataclasses.fields(schema):
        hint, key = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint):
            yield from options(hint, f"{key}.", _value(field, defaults))
            continue
        if get_origin(hint) is dict and dataclasses.is_dataclass(get_args(hint)[1]):
            yield key, "name: settings", "{}", comments.get(field.name, "")
            yield from options(get_args(hint)[1], f"{key}.NAME.")
            continue
        value = _value(field, defaults)
        shown = "(required)" if value is dataclasses.MISSING or value == MISSING else str(value)
        yield key, _type_name(hint), shown, comments.get(field.name, "")


def _override(argument: str, schema: type) -> dict:
    """Return one `key=value` as a mapping: YAML, but for texts, which are taken as they stand."""
    key, _, value = argument.partition("=")
    expected, parent = (_expected(schema, name) for name in (key, key.rpartition(".")[0]))
    in_mapping = expected == parent == "dict[str, str]"
    is_text = expected in ("str", "str | None") or in_mapping or (expected == "list[str]" and value[:1] != "[")
    if is_text and value != "null" and (value or in_mapping):
        return _nested(key, value)
    return _nested(key, parse(f"command line: {argument}", value))


def _nested(key: str, value: Any) -> dict:
    """Return the mapping that holds one value under a dotted key."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(merged: Any, key: str, value: Any, schema: type, origin: str) -> Any:
    """Return `merged` with one value set; raise ValueError for an unknown key or a value of another type."""
    try:
        return OmegaConf.merge(merged, _nested(key, value))
    except (OmegaConfBaseException, TypeError):
        expected = _expected(schema, key)
        problem = f"{key}={value!r}: expected {expected}" if expected else _unknown_key(schema, key)
        raise ValueError(f"{origin}: {problem}") from None


def _expected(schema: type, key: str) -> str | None:
    """Return what a key takes, None for an unknown key."""
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
    """Return (dotted key, type) of each option; asked for each argument of a command line."""
    return [(name, type_name) for name, type_name, *_ in options(schema)]


def _unknown_key(schema: type, key: str) -> str:
    known = [name for name, *_ in options(schema)]
    known += sorted({name.rsplit(".", depth)[0] for name in known for depth in range(1, name.count(".") + 1)})
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else "") + " (--help lists the keys)"


@cache
def _field_comments(schema: type) -> dict[str, str]:
    """Return each field's comment: the trailing one, or the comment lines right above it."""
    comments, above = {}, []
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
