"""The vocabulary of a pretrained language model: a tokenizer.json, read by the `tokenizers` library.

What a document needs beyond it, BOS, EOS, BOI, EOI and PAD, is decided once and kept with it in one file:

    {"special": {"bos": 1, "eos": 2, "boi": 32000, "eoi": 32001, "pad": 32002}, "vocab_size": 32003, "tokenizer": {...}}

BOS and EOS are the model's own, by config.json, generation_config.json or tokenizer_config.json beside it. A model
without BOS begins a document with EOS, as GPT-2 and Qwen do. Of several ends the first counts. BOI, EOI and PAD are
appended after its vocabulary, or are unused tokens of it, by name.
"""

import json
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TOKENIZER = "tokenizer.json"
LIMIT = 1 << 31  # of token ids
APPENDED = ("boi", "eoi", "pad")


class JsonVocabulary:
    def __init__(self, content: dict[str, Any], name: str) -> None:
        """Take a self-contained file's content; raise ValueError if `name`, where it is from, does not hold one."""
        self._name = name
        from tokenizers import Tokenizer as Library  # a tenth of a second: only where one is read

        try:
            self._library = Library.from_str(json.dumps(content["tokenizer"]))
            self.special: dict[str, int] = {key: int(content["special"][key]) for key in ("bos", "eos", *APPENDED)}
            self.vocab_size = int(content["vocab_size"])
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"tokenizer {name} is not a tokenizer.json: {error}; fetch it again") from None
        self._library.encode_special_tokens = True  # text that spells <|im_start|> stays text
        self._library.no_padding()
        self._library.no_truncation()
        added = self._library.get_added_tokens_decoder()
        self._control = {i for i, token in added.items() if token.special} | set(self.special.values())
        self.size = 1 + max(self._library.get_vocab(with_added_tokens=True).values(), default=-1)
        if (
            not (max(self.size, 1 + max(self.special.values())) <= self.vocab_size < LIMIT)
            or min(self.special.values()) < 0
        ):
            raise ValueError(
                f"tokenizer {name}: {self.size} tokens, {self.special}, vocab_size {self.vocab_size}: expected ids "
                "below vocab_size, and that below 2^31; fetch it again"
            )
        model = content["tokenizer"].get("model", {})
        unknown = model.get("unk_token")
        self.unknown: int | None = model.get("unk_id") if unknown is None else self._library.token_to_id(unknown)

        self.model = json.dumps(content["tokenizer"], ensure_ascii=False).encode()

    def encode(self, text: str) -> list[int]:
        return self._encoding(text).ids

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
    if not isinstance(inner, dict) or "model" not in inner:
        raise ValueError(f"tokenizer {path} is not a tokenizer.json; name one, or the folder of its model")
    if "tokenizer" in content:
        if special:
            raise ValueError(f"source={path} has its special ids already; give the folder of the model that it is from")
        return content
    try:
        tokens = _tokens(content)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"tokenizer {path} is not a tokenizer.json: {error!r}; fetch it again") from None
    ids = _ends(path.parent, tokens)
    next_id = max(_model_size(path.parent), 1 + max(tokens.values(), default=-1))
    if outside := {name: i for name, i in ids.items() if not 0 <= i < next_id}:
        raise ValueError(
            f"tokenizer {path}: {outside} by the config.json beside it, but it has {next_id} token ids; expected those "
            "of one model: fetch both again"
        )
    for name in APPENDED:
        if special and name in special:
            ids[name] = _unused(special[name], name, tokens, content, path)
        else:
            ids[name], next_id = next_id, next_id + 1
    if special and (unknown := special.keys() - set(APPENDED)):
        raise ValueError(f"special: {', '.join(sorted(unknown))}: expected boi, eoi and pad only")
    if ids["boi"] == ids["eoi"] or {ids["boi"], ids["eoi"]} & {ids["bos"], ids["eos"], ids["pad"]}:
        raise ValueError(f"special: {ids}: expected tokens of their own for boi and eoi")
    return {"special": ids, "vocab_size": next_id, "tokenizer": content}


def _tokens(content: dict[str, Any]) -> dict[str, int]:
    """Return the ids of the vocabulary and of the added tokens, by token."""
    vocabulary = content["model"].get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: (piece, score) in order
        vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    tokens = {**vocabulary, **{token["content"]: token["id"] for token in content.get("added_tokens") or []}}
    return {token: operator.index(token_id) for token, token_id in tokens.items()}


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


def _unused(token: str, name: str, tokens: dict[str, int], content: dict[str, Any], path: Path) -> int:
    """Return the id of a token that no text can spell; raise ValueError for another."""
    if token not in tokens:
        near = [added["content"] for added in content.get("added_tokens") or []][-8:]
        raise ValueError(f"special.{name}={token!r} is no token of {path}; it has, for example, {', '.join(near)}")
    content = {"special": dict.fromkeys(("bos", "eos", *APPENDED), 0), "vocab_size": LIMIT - 1, "tokenizer": content}
    if tokens[token] in JsonVocabulary(content, str(path)).encode(token):
        raise ValueError(
            f"special.{name}={token!r}: a text can spell it; expected a special token of {path}, or leave "
            f"{name} out, which appends one"
        )
    return tokens[token]
