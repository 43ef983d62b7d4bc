"""Seeded damage and malice: what becomes of real shards, indices, manifests and raw files on the way to a reader.

A mutation is drawn from a `random.Random` alone, so a seed replays it. It says which records it may have changed in a
way that a reader without checksums cannot notice; all others must come out as they were, or be counted.
"""

import io
import json
import random
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.arrays import hostile_array, npy, zipped
from tests.damage import Mutation, any_damage, cut, flip, overwrite
from tests.raw_files import hostile_raw
from tests.tars import BLOCK, Part, Shard, header, member, pax, tar

HOSTILE_NAMES = [
    *(b"../x.txt", b"/etc/x.txt", b"a/../../x.txt", b"..", b"x\0y.txt", b"\xff\xfe.txt", b"\xed\xa0\x80.txt"),
    *(b"x\n.txt", b"", b".", b"/", b"//.x", b".x", b"a.", b"__meta__/x.txt", b"x.__key__", b"\x1b[31m.txt"),
    *(b"C:\\x.txt", b"x" * 100),
]
LONG_NAMES = [b"a/" * 32_000, b"/." * 32_000, b"." * 65_000, b"a" * 65_000, b"__" * 30_000 + b"a", b"\xff" * 60_000]
HOSTILE_SIZES = [
    *(b"77777777777\0", b"00000000001\0", b"-0000000001\0", b"7777777777777", b"            ", b"0_7        \0"),
    *(b"\xff" * 12, b"\x80" + bytes(10) + b"\1", b"\x80" + b"\xff" * 11, b"\xff" + bytes(11), b"\0" * 12, b"9" * 12),
]
HOSTILE_PAX = [
    *(b"path=../../x.txt", b"path=/x.txt", b"path=", b"path=x\0.txt", b"path=x\n.txt", b"size=99999999999", b"size=-1"),
    *(b"path=\xff.txt", b"GNU.sparse.major=1", b"GNU.sparse.size=1", b"hdrcharset=BINARY", b"linkpath=/etc/passwd"),
]


# ---- shards ----


def flipped_shard(rng: random.Random, shard: Shard, _: Shard) -> Mutation:
    what, data, places = flip(rng, shard.data)
    return Mutation(f"flip {what}", data, shard.keys_at(places))


def cut_shard(rng: random.Random, shard: Shard, _: Shard) -> Mutation:
    return Mutation(*cut(rng, shard.data))


def overwritten_shard(rng: random.Random, shard: Shard, _: Shard) -> Mutation:
    return Mutation(*overwrite(rng, shard.data), touched=None)


def rearranged_shard(rng: random.Random, shard: Shard, _: Shard) -> Mutation:
    """Drop, double, swap or shuffle members: a record of fewer or other members is one all the same."""
    parts, (a, b) = list(shard.parts), (rng.randrange(len(shard.parts)) for _ in range(2))
    match rng.randrange(4):
        case 0:
            what, touched = f"drop member {a}", frozenset([parts.pop(a).key])
        case 1:
            what, touched = f"double member {a} before {b}", frozenset([parts[a].key, parts[b].key, parts[b - 1].key])
            parts.insert(b, parts[a])
        case 2:
            what, touched = f"swap members {a} and {b}", None
            parts[a], parts[b] = parts[b], parts[a]
        case _:
            what, touched = "shuffle members", None
            rng.shuffle(parts)
    return Mutation(what, tar(parts), touched)


def rearranged_records(rng: random.Random, shard: Shard, _: Shard) -> Mutation:
    """Drop, double and shuffle whole records: all that is left is as it was."""
    records: dict[str, list[Part]] = {}
    for part in shard.parts:
        records.setdefault(part.key, []).append(part)
    order = rng.choices(list(records), k=rng.randrange(1, 2 * len(records)))
    order = [key for key, before in zip(order, [None, *order], strict=False) if key != before]
    data = tar([part for key in order for part in records[key]])
    return Mutation(f"records {order}", data, dropped=frozenset(records) - frozenset(order))


def spliced_shard(rng: random.Random, shard: Shard, other: Shard) -> Mutation:
    """The head of one shard and the tail of another, at members' borders, at blocks or anywhere."""
    heads, tails = [start for start, _ in shard.spans], [start for start, _ in other.spans]
    match rng.randrange(3):
        case 0:
            head, tail = rng.choice(heads), rng.choice(tails)
        case 1:
            head, tail = (rng.randrange(len(s.data) // BLOCK) * BLOCK for s in (shard, other))
        case _:
            head, tail = rng.randrange(len(shard.data)), rng.randrange(len(other.data))
    return Mutation(f"splice {head} bytes and another from {tail}", shard.data[:head] + other.data[tail:], None)


def odd_member(rng: random.Random, shard: Shard, _: Shard) -> Mutation:
    """Put a hostile member between two: odd names, kinds, sizes, long-name and pax headers."""
    place = rng.randrange(len(shard.parts) + 1)
    after = shard.parts[min(place, len(shard.parts) - 1)]
    key = rng.choice([after.key, "x"])
    name, refused = f"{key}.evil".encode(), frozenset([key])
    touched: frozenset[str] | None = frozenset([key, after.key, shard.parts[place - 1].key])
    match rng.randrange(7):
        case 0:
            name = rng.choice(HOSTILE_NAMES)
            what, blocks, refused = f"name {name!r}", member(name, b"1"), frozenset()
        case 1:
            kind = rng.choice([b"1", b"2", b"3", b"4", b"6", b"S", b"D", b"M", b"V", b"X", b"\x99"])
            what, blocks = f"kind {kind!r}", member(name, b"", kind, link=b"/etc/passwd")
        case 2:
            size = rng.choice([*HOSTILE_SIZES, b"%011o\0" % rng.randrange(1 << 20)])
            what, blocks, touched, refused = f"size {size!r}", header(name, size) + bytes(BLOCK), None, frozenset()
        case 3:
            name = rng.choice([*LONG_NAMES, *(n + b".x" for n in LONG_NAMES), *HOSTILE_NAMES])
            what, blocks, refused = f"long name {name[:20]!r}", member(b"L", name + b"\0", b"L"), frozenset()
            touched = None  # it is the name of the member that follows
        case 4:
            records = rng.sample([*HOSTILE_PAX, *(b"path=" + n for n in LONG_NAMES)], rng.randrange(1, 4))
            what = f"pax {[record[:20] for record in records]}"
            blocks, touched, refused = pax(*records, kind=rng.choice([b"x", b"x", b"g"])), None, frozenset()
        case 5:
            broken = rng.choice([b"7 path=x.txt\n", b"0 path=x\n", b"99999 path=x.txt\n", b"9" * 30, b"12 path=x.t"])
            what, blocks, touched = f"broken pax {broken!r}", pax(broken), None
        case _:
            what, touched, refused = "a header of noise", None, frozenset()
            noise = bytearray(header(name, 0))
            noise[rng.randrange(BLOCK)] = rng.randrange(256)
            blocks = bytes(noise)
    data = tar([*shard.parts[:place], blocks, *shard.parts[place:]])
    return Mutation(f"{what} before member {place}", data, touched, refused)


def hostile_contents(rng: random.Random, shard: Shard, _: Shard) -> Mutation:
    """Put what is no such array where an array of an encoded record belongs; headers and sizes are right."""
    number, part = rng.choice([(i, p) for i, p in enumerate(shard.parts) if p.extension.endswith("npy")])
    whole = np.load(io.BytesIO(part.data))
    if whole.dtype == np.float16:
        values = (np.nan, np.inf, -np.inf, -65504, 65504)
        cases = [(f"moments of {value}", _with(rng, whole, value)) for value in values]
        cases += [("odd channels", npy(whole[:-1])), ("more channels", npy(np.concatenate([whole, whole])))]
        cases += [("no cells", npy(whole[:, :0]))]
    elif part.extension == "segments.npy":
        lists = [[], [0], [-2], [2**31 - 1], [-(2**31)], [-1] * 50, [*whole, 1], [*whole, -1]]
        lists += [[1] * (1 << 20), whole + 1]
        cases = [(f"segments {np.array(values)[:5].tolist()}", npy(np.array(values, np.int32))) for values in lists]
    elif part.extension == "roles.npy":
        lists = [[], [1] * len(whole), [2, *whole[1:]], [*whole[1:], 255], [*whole, 0], whole[1:], [1] * (1 << 20)]
        cases = [(f"roles {np.array(values)[:5].tolist()}", npy(np.array(values, np.uint8))) for values in lists]
    else:
        ids = (2**31 - 1, -1, -(2**31), 100_000)
        cases = [(f"token {value}", _with(rng, whole, value)) for value in ids if whole.size]
    what, data = hostile_array(rng) if rng.randrange(2) else rng.choice(cases)
    parts = [*shard.parts[:number], part._replace(data=data), *shard.parts[number + 1 :]]
    key = frozenset([part.key])
    return Mutation(f"{what} in {part.key}.{part.extension}", tar(parts), key, key)


def _with(rng: random.Random, array: np.ndarray, value: float) -> bytes:
    """Put a value somewhere in an array; of moments, in the log variances."""
    changed = array.copy().ravel()
    changed[rng.randrange(len(changed) // 2 if array.ndim == 3 else 0, len(changed))] = value
    return npy(changed.reshape(array.shape))


def doubly_damaged_shard(rng: random.Random, shard: Shard, other: Shard) -> Mutation:
    is_encoded = any(part.extension.endswith("npy") for part in shard.parts)
    contents = hostile_contents if is_encoded else hostile_raw
    first = rng.choice([odd_member, rearranged_shard, contents, spliced_shard])(rng, shard, other)
    what, data = any_damage(rng, first.data or b"\0")
    return Mutation(f"{first.what}, then {what}", data, None)


SHARD_MUTATIONS = [
    *(flipped_shard, flipped_shard, cut_shard, overwritten_shard, rearranged_shard, rearranged_records, spliced_shard),
    *(odd_member, odd_member, hostile_contents, hostile_contents, doubly_damaged_shard),
]
RAW_MUTATIONS = [m for m in SHARD_MUTATIONS if m is not hostile_contents] + [hostile_raw] * 8


# ---- indices ----


def flipped_index(rng: random.Random, data: bytes) -> Mutation:
    return Mutation(*any_damage(rng, data))


def hostile_index(rng: random.Random, data: bytes) -> Mutation:
    """A whole zip of arrays that are none of an index, or contradict each other."""
    arrays = dict(np.load(io.BytesIO(data)))
    name = rng.choice(list(arrays))
    array = arrays[name].copy()
    form, files = rng.choice([zipfile.ZIP_STORED] * 6 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2]), {}
    match rng.randrange(6):
        case 0:
            what, files[name] = hostile_array(rng)
        case 1:
            values = [-1, 0, 1, 1 << 20, 1 << 30, (1 << 31) - 1, 1 << 31, 1 << 61, (1 << 63) - 1, -(1 << 63)]
            value = rng.choice([v for v in values if np.iinfo(array.dtype).min <= v <= np.iinfo(array.dtype).max])
            place = rng.randrange(array.size)
            array.ravel()[place] = value
            what, files[name] = f"{name}[{place}]={value}", npy(array)
        case 2:
            what, files[name] = f"{name} doubled", npy(np.concatenate([array, array]))
        case 3:
            what, files[name] = f"{name} shuffled", npy(np.array(rng.sample(array.tolist(), len(array)), array.dtype))
        case 4:
            what, files[name] = f"a bomb in {name}", npy(np.zeros((4_000_000, *array.shape[1:]), array.dtype))
            form = zipfile.ZIP_DEFLATED
        case _:
            what, files["../x"] = f"no {name}", b""
            del arrays[name]
    contents = zipped({**{n: npy(a) for n, a in arrays.items()}, **files}, form)
    if rng.randrange(6) == 0:  # a central directory that points far away
        place = contents.rindex(b"PK\1\2")
        contents = contents[: place + 42] + b"\xff" * 4 + contents[place + 46 :]
        what += ", far away"
    return Mutation(f"{what}, form {form}", contents, None)


INDEX_MUTATIONS: list[Callable[[random.Random, bytes], Mutation]] = [flipped_index, hostile_index, hostile_index]


# ---- JSON ----

HOSTILE_VALUES = [
    *(None, True, False, -1, 0, 1, 3.5, float("nan"), float("inf"), 1e308, 1 << 31, 1 << 60, 1 << 63, 10**30, 10**400),
    *("", "x", ".", "..", "../00000.tar", "/etc/passwd", "a\0b", "\ud800", "a" * 200, "00000.tar", "8x8", "0x0"),
    *([], {}, [[0.0], [0.0]], ["x"], {"8x8": 1}, {"9" * 30 + "x1": 1}, {"9" * 5000 + "x1": 1}, {"4x4": 1 << 58}),
]


def damaged_json(rng: random.Random, data: bytes) -> Mutation:
    if rng.randrange(3) == 0:
        return Mutation(*any_damage(rng, data), touched=None)
    tree = json.loads(data)
    what = [_replace_a_value(rng, tree) for _ in range(rng.choice([1, 1, 2]))]
    text = json.dumps(tree)
    if rng.randrange(8) == 0:
        bomb = rng.choice(["[" * 100_000, '{"a":' * 100_000, "1" * 100_000, '"' * 99_999, "\ufeff{}", "-" * 1000])
        text, what = rng.choice([bomb, text[:-1] + ', "x": ' + bomb]), [*what, f"bomb {bomb[:5]}"]
    return Mutation("; ".join(what), text.encode(errors="surrogatepass"), None)


def _replace_a_value(rng: random.Random, tree: Any) -> str:
    """Replace, remove or double something in nested dicts and lists, in place."""
    places: list[tuple[Any, Any]] = []
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        keys = list(node if isinstance(node, dict) else range(len(node)))
        places += [(node, key) for key in keys]
        nodes += [node[key] for key in keys if isinstance(node[key], dict | list)]
    if not places:
        return "nothing"
    node, key = rng.choice(places)
    match rng.randrange(5):
        case 0:
            del node[key]
            return f"no {key!r}"
        case 1 if isinstance(node, list):
            node.append(node[key])
            return f"{key!r} doubled"
        case 1:
            node[rng.choice(["x", "format_version", "store", "", "records"])] = node[key]
            return f"more than {key!r}"
    value = rng.choice(HOSTILE_VALUES)
    node[key] = value
    return f"{key!r}: {str(value)[:30] if not isinstance(value, int) or value < 1 << 64 else 'huge'!r}"
