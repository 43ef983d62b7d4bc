"""The layers of a config, YAML files and `key=value` arguments, before they are merged and typed.

At this stage null removes an entry, a single value becomes a list of one, and paths are expanded: a field that holds
a path has the type `Annotated[str, "path"]` (data.storage.Location).
"""

import dataclasses
import io
import os
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Union, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, OmegaConf

PATH = "path"  # marks the type of a path
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(//|:)|pipe:")
STR, MAP, MERGE = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "map", "merge"))


def expanded(key: str, value: str) -> str:
    """Return a path with a leading `~` and each `$NAME` replaced; a URL is returned unchanged.

    Raises ValueError for an unknown user or a variable that is not set.
    """
    if URL.match(value):
        return value
    for name in re.findall(r"\$(\w+)", value):
        if not os.environ.get(name):
            raise ValueError(f"{key}={value}: ${name} is not set in the environment; set it, or write the path out")
    path = re.sub(r"\$(\w+)", lambda match: os.environ[match[1]], value)
    if (path := os.path.expanduser(path)).startswith("~"):
        raise ValueError(f"{key}={value}: no such user here; write the path out (./~NAME for a file called ~NAME)")
    return path


def read_yaml(path: str) -> dict:
    if not Path(path).is_file():
        raise FileNotFoundError(f"config={path}: no such file")
    layer = parse(f"config={path}", Path(path).read_bytes())
    if not isinstance(layer, dict | None):
        raise ValueError(f"config={path}: expected a mapping of keys to values")
    return layer or {}


def parse(origin: str, text: str | bytes) -> Any:
    """Parse YAML by OmegaConf's rules; raise ValueError, prefixed by `origin`, for text that is not YAML."""
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        for key in _keys(node, set()):
            key.tag = STR  # a source named no, on or 1 keeps its name
        names = [] if node is None else [(yaml.ScalarNode(STR, "value"), node)]
        document = yaml.serialize(yaml.MappingNode(MAP, names), allow_unicode=True)
        return cast(dict, OmegaConf.to_container(OmegaConf.load(io.StringIO(document)))).get("value")
    except Exception as error:  # yaml and OmegaConf have no common base class of errors
        raise ValueError(f"{origin}: not readable as YAML: {' '.join(str(error).split())}") from None


def _keys(node: yaml.Node | None, seen: set[int]) -> Iterator[yaml.Node]:
    """Yield the keys of all mappings below a node, except the merge key `<<`."""
    if node is None or isinstance(node, yaml.ScalarNode) or id(node) in seen:
        return
    seen.add(id(node))  # an alias leads to the same node
    for item in node.value:
        for child in item if isinstance(item, tuple) else [item]:
            yield from _keys(child, seen)
        if isinstance(item, tuple) and item[0].tag != MERGE:
            yield item[0]


def _child(hint: Any, name: str) -> Any:
    """Return the type of the field or entry `name` of a dataclass or mapping; None if it has none."""
    hint = _bare(hint)
    if dataclasses.is_dataclass(hint):
        return get_type_hints(hint, include_extras=True).get(name)
    return get_args(hint)[1] if get_origin(hint) is dict else None


def _bare(hint: Any) -> Any:
    """Return a type without `| None` and without the mark of a path."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def each(value: Any, hint: Any, change: Callable[[Any, Any, str], Any], key: str = "") -> Any:
    """Return a value with `change(value, type, dotted key)` applied to it and to everything it contains."""
    value = change(value, hint, key)
    if isinstance(value, dict):
        parts = {name: (_child(hint, name), f"{key}.{name}".lstrip(".")) for name in value}
        return {name: each(value[name], child, change, place) for name, (child, place) in parts.items()}
    if isinstance(value, list | tuple) and get_origin(_bare(hint)) in (list, tuple):
        return [each(part, get_args(_bare(hint))[0], change, key) for part in value]
    return value


def as_list(value: Any, hint: Any, _key: str) -> Any:
    """Return a single value as a list of one if the type allows any number."""
    bare = _bare(hint)
    is_list = get_origin(bare) is list or (get_origin(bare) is tuple and get_args(bare)[-1] is ...)
    is_single = not isinstance(value, list | tuple | dict | None) and not str(value).startswith("${")
    return [value] if is_list and is_single else value


def as_expanded(value: Any, hint: Any, key: str) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    is_path = get_origin(hint) is Annotated and PATH in hint.__metadata__
    return expanded(key, value) if is_path and isinstance(value, str) and value != MISSING else value


def lay_over(below: dict, above: dict, hint: Any, where: str) -> None:
    """Change the layers `below` by the one `above`, in which a null removes an entry, or all entries, of a mapping.

    Raises ValueError, prefixed by `where`, if there is no such entry.
    """
    for name, value in above.items():
        if value is None and get_origin(_bare(hint)) is dict:
            if name not in below:
                present = ", ".join(below) or "nothing"
                raise ValueError(f"{where}{name}=null removes an entry that does not exist; there is {present}")
            del below[name]
        elif value is None and get_origin(_bare(_child(hint, name))) is dict:
            below[name] = {}
        elif isinstance(value, dict):
            if not isinstance(below.get(name), dict):
                below[name] = {}
            lay_over(below[name], value, _child(hint, name), f"{where}{name}.")
        else:
            below[name] = value
