"""Tokenizers: load, encode, decode; the special ids; the hash that ties shards to one.

Two libraries read two kinds of files: SentencePiece its models, which are also trained here, and `tokenizers` a
tokenizer.json (data/json_tokenizer.py). In a SentencePiece model `<boi>` and `<eoi>` are control pieces, so that no
text can spell them. Loading converts those of a foreign model that has them as text pieces, keeping their ids, and
appends them to a vocabulary without them (Llama's).
"""

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from data.durable import atomic_write
from data.json_tokenizer import TOKENIZER, JsonVocabulary, self_contained
from data.strict_json import dumps

BOI_PIECE, EOI_PIECE = "<boi>", "<eoi>"
PLAIN_FORM = "plain"  # stands for the hash of a chat template where there is none (data/chat.py)


@dataclass(frozen=True)
class SpecialIds:
    bos: int
    eos: int
    boi: int
    eoi: int
    pad: int  # fills image slots and padding; its embedding is never used


class Tokenizer:
    """Text to token ids and back, whichever library the vocabulary needs."""

    def __init__(self, path: str | Path):
        """Read a SentencePiece model, a tokenizer.json (data/json_tokenizer.py), or a folder with one of them.

        Raises FileNotFoundError or ValueError for anything else.
        """
        self.path = _file_of(Path(path))
        self._vocabulary: _SentencePieces | JsonVocabulary
        if self.path.suffix == ".json":
            content = self_contained(self.path)
            self.content = _json(content)  # of `file_name` in a copy
            self._vocabulary, self.file_name = JsonVocabulary(content, str(path)), TOKENIZER
        else:
            self.content = self.path.read_bytes()
            self._vocabulary, self.file_name = _SentencePieces(self.content, path), "tokenizer.model"
        self.vocab_size = self._vocabulary.vocab_size
        self.unknown: int | None = self._vocabulary.unknown  # stands for what no piece covers; None: all is covered
        self.special = SpecialIds(**self._vocabulary.special)
        self.chat: dict[str, Any] | None = self._vocabulary.chat  # its model's chat template (data/chat.py), if any
        # Of what makes the ids of a text, and of the template, which lays out conversations alone.
        ids = self.content if self.chat is None else _json({k: v for k, v in content.items() if k != "chat"})
        self.hash = hashlib.sha256(ids).hexdigest()[:16]
        self.chat_hash = PLAIN_FORM if self.chat is None else hashlib.sha256(_json(self.chat)).hexdigest()[:16]

    def encode(self, text: str) -> np.ndarray:
        """Return token ids int64 [len], without special ids, whatever the text spells."""
        return np.array(self._vocabulary.encode(text), dtype=np.int64)

    def encode_parsed(self, pieces: Sequence[tuple[str, bool]]) -> np.ndarray:
        """Return token ids int64 [len] of a text in pieces; in those marked True special tokens become their ids."""
        return np.array(self._vocabulary.encode_parsed(pieces), dtype=np.int64)

    def after_special(self, text: str) -> int:
        """Return where the first special token that a text spells ends, 0 if it spells none."""
        return self._vocabulary.after_special(text)

    def piece(self, token_id: int) -> str:
        """Return the vocabulary's piece for an id."""
        return self._vocabulary.piece(token_id)

    def unknown_in(self, text: str) -> list[str]:
        """Return the parts of a text, in order, that no piece covers: the model cannot tell them apart."""
        return [] if self.unknown is None else self._vocabulary.unknown_in(text)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of ids, leaving out special and appended ids."""
        return self._vocabulary.decode([int(i) for i in token_ids])

    def files(self) -> dict[str, bytes]:
        """Return the files that transformers' AutoTokenizer reads, by name, with its settings."""
        ids = {"bos": self.special.bos, "eos": self.special.eos}
        if self.unknown is not None:
            ids["unk"] = self.unknown
        if self.special.pad != self.unknown and self.piece(self.special.pad):
            ids["pad"] = self.special.pad
        settings = {
            # Not LlamaTokenizer, which treats leading spaces and line breaks differently.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": True,
            "add_eos_token": False,
            # Text that spells them stays text, unless a chat template must spell them.
            "split_special_tokens": self.chat is None,
            **({"chat_template": self.chat["template"]} if self.chat is not None else {}),
            "clean_up_tokenization_spaces": False,
            **{f"{name}_token": self.piece(token_id) for name, token_id in ids.items()},
        }
        model = self._vocabulary.model
        return {self.file_name: model, "tokenizer_config.json": dumps(settings, indent=1).encode()}


def _json(content: dict[str, Any]) -> bytes:
    return dumps(content, sort_keys=True, ensure_ascii=False).encode()


def find_copy(folder: Path) -> Path | None:
    """Return the copy of a tokenizer, its `content` under its `file_name`, in a run folder or an export, if any."""
    places = (folder / name for name in ("tokenizer.model", TOKENIZER))
    return next((place for place in places if place.is_file()), None)


def _file_of(path: Path) -> Path:
    """Return the file that a path, which may be a model's folder, stands for."""
    if path.is_file():
        return path
    for name in (TOKENIZER, "tokenizer.model"):
        if (path / name).is_file():
            return path / name
    if path.is_dir():
        raise FileNotFoundError(f"tokenizer {path}: expected {TOKENIZER} or tokenizer.model in that folder")
    raise FileNotFoundError(f"tokenizer {path}: no such file; train one with `python -m train.tokenizer`")


class _SentencePieces:
    chat = None  # chat templates come with a tokenizer.json

    def __init__(self, model: bytes, path: str | Path) -> None:
        """Load a model; raise ValueError if it is none, or lacks BOS or EOS. `path` is where it is from."""
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(f"tokenizer {path} is not a SentencePiece model: {error}") from None
        self.model = model  # as used, control pieces included
        self.vocab_size = self._processor.get_piece_size()
        self.unknown = self._processor.unk_id()
        boi, eoi = (self._processor.piece_to_id(piece) for piece in (BOI_PIECE, EOI_PIECE))
        if self.unknown in (boi, eoi):
            boi, eoi = self.vocab_size, self.vocab_size + 1
            self.vocab_size += 2
        elif not all(map(self._processor.is_control, (boi, eoi))):
            self.model = _with_control(model, (boi, eoi))
            self._processor.LoadFromSerializedProto(self.model)
        bos, eos, pad = (self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id())
        if bos < 0 or eos < 0:
            raise ValueError(f"tokenizer {path} has no BOS or no EOS piece, which every document needs; use another")
        self.special = {"bos": bos, "eos": eos, "boi": boi, "eoi": eoi, "pad": max(pad, 0)}

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_parsed(self, pieces: Sequence[tuple[str, bool]]) -> list[int]:
        raise NotImplementedError("SentencePiece models have no chat template")

    def after_special(self, text: str) -> int:
        raise NotImplementedError("SentencePiece models have no chat template")

    def unknown_in(self, text: str) -> list[str]:
        pieces = zip(self._processor.encode(text), self._processor.encode(text, out_type=str), strict=True)
        return [piece for token_id, piece in pieces if token_id == self.unknown]

    def piece(self, token_id: int) -> str:
        return self._processor.id_to_piece(token_id)

    def decode(self, token_ids: Iterable[int]) -> str:
        pieces = self._processor.get_piece_size()
        return self._processor.decode([i for i in token_ids if i < pieces and not self._processor.is_control(i)])


def _with_control(model: bytes, ids: Iterable[int]) -> bytes:
    """Return a SentencePiece model with these pieces made control pieces, which no text can spell."""
    from sentencepiece import sentencepiece_model_pb2  # needs protobuf, so only where it must

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    for i in ids:
        proto.pieces[i].type = proto.SentencePiece.CONTROL
    return proto.SerializeToString()


def train_tokenizer(texts: Iterable[str], path: Path, vocab_size: int) -> None:
    """Train a BPE model with byte fallback; raise ValueError when the texts cannot fill `vocab_size`.

    Text decodes to exactly what was encoded: no normalisation; line breaks and runs of spaces are kept.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9999,
            control_symbols=[BOI_PIECE, EOI_PIECE],
            pad_id=3,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 24,  # bytes; the default leaves out texts longer than 4 KB
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"could not train a tokenizer of vocab_size={vocab_size}: {error}; give more or other text, "
                         "or a smaller vocab_size") from None  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(model.getvalue())
