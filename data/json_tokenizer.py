"""The vocabulary of a pretrained language model: a tokenizer.json, read by the `tokenizers` library.

What a document needs beyond it, BOS, EOS, BOI, EOI and PAD, is decided once and kept with it in one file:

    {"special": {"bos": 1, "eos": 2, "boi": 32000, "eoi": 32001, "pad": 32002}, "vocab_size": 32003, "tokenizer": {...}}

BOS and EOS are the model's own, by config.json, generation_config.json or tokenizer_config.json beside it. A model
without BOS begins a document with EOS, as GPT-2 and Qwen do. Of several ends the first counts. BOI, EOI and PAD are
appended after its vocabulary, or are unused tokens of it, by name.

No text can spell these, nor a token that its file marks as special. Other added tokens (Qwen's <think>) are words like
any other: texts spell them, and they are decoded.

A chat template beside it is kept there too, under "chat", with the tokens that it names (data/chat.py renders it).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.strict_json import dumps

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

TOKENIZER = "tokenizer.json"
LIMIT = 1 << 31  # of token ids
APPENDED = ("boi", "eoi", "pad")


class JsonVocabulary:
    def __init__(self, content: dict[str, Any], name: str) -> None:
        """Take a self-contained file's content; raise ValueError if `name`, where it is from, does not hold one."""
        try:
            self._content: dict[str, Any] = content["tokenizer"]
            self.special: dict[str, int] = {key: int(content["special"][key]) for key in ("bos", "eos", *APPENDED)}
            self.vocab_size = int(content["vocab_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"tokenizer {name} lacks its special ids: {error!r}; make it again") from None
        self.chat: dict[str, Any] | None = content.get("chat")
        self._name, self._library = name, _library(self._content, name)
        self.size = 1 + max(self._library.get_vocab(with_added_tokens=True).values(), default=-1)
        ids = self.special.values()
        if min(ids) < 0 or not max(self.size, 1 + max(ids)) <= self.vocab_size < LIMIT:
            raise ValueError(
                f"tokenizer {name}: {self.size} tokens, {self.special}, vocab_size {self.vocab_size}: expected ids "
                "below vocab_size, and that below 2^31; fetch it again"
            )
        model = self._content["model"]
        unknown = model.get("unk_token")
        self.unknown: int | None = model.get("unk_id") if unknown is None else self._library.token_to_id(unknown)
        added = self._library.get_added_tokens_decoder()
        self._control = {i for i, token in added.items() if token.special} | set(self.special.values())
        spelled = {i: piece for i in self._control - {self.unknown} if i in self.encode(piece := self.piece(i))}
        if spelled:
            raise ValueError(
                f"tokenizer {name}: a text can spell {', '.join(spelled.values())}, which must not be text: expected "
                "special tokens outside the reach of its model, as those of BPE are; use another"
            )

    @property
    def model(self) -> bytes:
        """Return the tokenizer.json."""
        return dumps(self._content, ensure_ascii=False).encode()

    def encode(self, text: str) -> list[int]:
        return self._encoding(text).ids

    def encode_parsed(self, pieces: Sequence[tuple[str, bool]]) -> list[int]:
        """Return the ids of a text in pieces: special tokens spelled in those marked True become ids, others stay text.

        The pieces are encoded as one text, as transformers does, unless one of the others spells a special token.
        """
        control = self._control - {self.unknown}
        ids = self._parsed("".join(text for text, _ in pieces))
        wanted = [i for text, is_parsed in pieces if is_parsed for i in self._parsed(text) if i in control]
        unknown = None if self.unknown is None else self.piece(self.unknown)  # texts may become it without spelling it
        spell_it = unknown and any(unknown in text for text, is_parsed in pieces if not is_parsed)
        if [i for i in ids if i in control] == wanted and not spell_it:
            return ids
        return [i for text, is_parsed in pieces for i in (self._parsed if is_parsed else self.encode)(text)]

    def _parsed(self, text: str) -> list[int]:
        return self._parsing.encode(text, add_special_tokens=False).ids

    def after_special(self, text: str) -> int:
        """Return where the first special token that a text spells ends, 0 if it spells none."""
        found = self._parsing.encode(text, add_special_tokens=False)
        control = self._control - {self.unknown}
        return next((end for i, (_, end) in zip(found.ids, found.offsets, strict=True) if i in control), 0)

    @cached_property
    def _parsing(self) -> "Library":
        """The library's tokenizer to which texts spell special tokens."""
        library = _library(self._content, self._name)
        library.encode_special_tokens = False
        return library

    def unknown_in(self, text: str) -> list[str]:
        found = self._encoding(text)
        return [text[a:b] for i, (a, b) in zip(found.ids, found.offsets, strict=True) if i == self.unknown]

    def _encoding(self, text: str) -> Any:
        try:
            return self._library.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"tokenizer {self._name} cannot encode {text[:80]!r}: {error}; use another one") from None

    def piece(self, token_id: int) -> str:
        return self._library.id_to_token(token_id) or ""

    def decode(self, token_ids: Iterable[int]) -> str:
        ids = [i for i in token_ids if i < self.size and i not in self._control]
        return self._library.decode(ids, skip_special_tokens=False)


def _library(content: dict[str, Any], name: str | Path) -> "Library":
    """Return the library's tokenizer, to which texts are text; raise ValueError if there is none in `content`."""
    from tokenizers import Tokenizer as Library  # a tenth of a second: only where one is read

    try:
        library = Library.from_str(dumps(content))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"tokenizer {name} is not a tokenizer.json: {error}; fetch it again") from None
    library.encode_special_tokens = True  # text that spells <|im_start|> stays text
    library.no_padding()
    library.no_truncation()
    if getattr(library.model, "dropout", None):
        library.model.dropout = None  # a text has one encoding
    return library


def self_contained(path: Path, special: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the self-contained content of a tokenizer.json and the files beside it; of such a content, itself.

    `special` maps boi, eoi and pad to unused tokens of the vocabulary by name; those it lacks are appended. Raises
    ValueError if a name is not such a token, or no EOS is known.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"tokenizer {path} is not JSON: {error}; fetch it again") from None
    inner = content.get("tokenizer", content) if isinstance(content, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("model"), dict):
        raise ValueError(f"tokenizer {path} is not a tokenizer.json; name one, or the folder of its model")
    if inner is not content:
        if special:
            raise ValueError(f"source={path} has its special ids already; give the folder of the model that it is from")
        return content
    library = _library(content, path)
    tokens = library.get_vocab(with_added_tokens=True)
    next_id = max(_model_size(path.parent), 1 + max(tokens.values(), default=-1))
    ids = _ends(path.parent, tokens)
    if outside := {name: i for name, i in ids.items() if not 0 <= i < next_id}:
        raise ValueError(
            f"tokenizer {path}: {outside} by the config.json beside it, but it has {next_id} token ids; expected those "
            "of one model: fetch both again"
        )
    for token in content.get("added_tokens") or []:
        if token["id"] in ids.values():  # of all tokens, these are never text
            token["special"] = True
    for name in APPENDED:
        if special and name in special:
            ids[name] = _unused(special[name], name, library, path)
        else:
            ids[name], next_id = next_id, next_id + 1
    if special and (unknown := special.keys() - set(APPENDED)):
        raise ValueError(f"special: {', '.join(sorted(unknown))}: expected boi, eoi and pad only")
    if ids["boi"] == ids["eoi"] or {ids["boi"], ids["eoi"]} & {ids["bos"], ids["eos"], ids["pad"]}:
        raise ValueError(f"special: {ids}: expected tokens of their own for boi and eoi")
    chat = _chat(path.parent)
    return {"special": ids, "vocab_size": next_id, "tokenizer": content, **({"chat": chat} if chat else {})}


def _chat(folder: Path) -> dict[str, Any] | None:
    """Return a folder's chat template, of several the default, and the tokens that it may name; None without one."""
    settings = _beside(folder, "tokenizer_config.json")
    if (folder / "chat_template.jinja").is_file():
        template: Any = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    else:
        template = settings.get("chat_template") or _beside(folder, "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        return None
    said = {**_beside(folder, "special_tokens_map.json"), **settings}
    tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in said.items()}
    return {
        "template": template,
        "tokens": {name: t for name, t in tokens.items() if name.endswith("_token") and isinstance(t, str)},
    }


def _beside(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"tokenizer: {folder / name} is not JSON: {error}; fetch it again") from None
    return found if isinstance(found, dict) else {}


def _model_size(folder: Path) -> int:
    """Return the rows of the embedding of the model in a folder, which may be more than its tokens; 0: unknown."""
    size = _beside(folder, "config.json").get("vocab_size")
    return size if type(size) is int and size < LIMIT else 0


def _ends(folder: Path, tokens: dict[str, int]) -> dict[str, int]:
    """Return the ids of BOS and EOS."""
    found: dict[str, int] = {}
    for name in ("bos", "eos"):
        for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
            contents = _beside(folder, file)
            token = contents.get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            given = contents.get(f"{name}_token_id", tokens.get(token) if isinstance(token, str) else None)
            given = given[0] if isinstance(given, list) and given else given
            if type(given) is int:
                found.setdefault(name, given)
    for name, usual in (("eos", "</s>"), ("bos", "<s>")):
        if name not in found and usual in tokens:
            found[name] = tokens[usual]
    if "eos" not in found:
        raise ValueError(
            f"tokenizer {folder / TOKENIZER}: no end of a document (EOS): expected eos_token_id in config.json, or "
            "eos_token in tokenizer_config.json beside it; name the folder of the whole model"
        )
    return {"bos": found.get("bos", found["eos"]), "eos": found["eos"]}


def _unused(token: str, name: str, library: "Library", path: Path) -> int:
    """Return the id of a token that no text can spell; raise ValueError for another."""
    token_id = library.token_to_id(token)
    if token_id is None:
        near = [added.content for added in library.get_added_tokens_decoder().values()][-8:]
        raise ValueError(f"special.{name}={token!r} is no token of {path}; it has, for example, {', '.join(near)}")
    if token_id in library.encode(token, add_special_tokens=False).ids:
        raise ValueError(
            f"special.{name}={token!r}: a text can spell it; expected a special token of {path}, or leave "
            f"{name} out, which appends one"
        )
    return token_id
