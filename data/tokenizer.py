"""SentencePiece: train, load, encode, decode; the special ids; the hash that ties shards to a tokenizer.

`<boi>` and `<eoi>` are control pieces, so that no text can spell them. Loading converts those of a foreign
model that has them as text pieces, keeping their ids, and appends them to a vocabulary without them (Llama's).
"""

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece

from data.durable import atomic_write

BOI_PIECE, EOI_PIECE = "<boi>", "<eoi>"


@dataclass(frozen=True)
class SpecialIds:
    bos: int
    eos: int
    boi: int
    eoi: int
    pad: int  # fills image slots and padding; its embedding is never used


class Tokenizer:
    def __init__(self, path: str | Path):
        """Raise FileNotFoundError or ValueError when `path` is not a SentencePiece model."""
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"tokenizer {path}: no such file; train one with `python -m train.tokenizer`")
        model = self.path.read_bytes()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(f"tokenizer {path} is not a SentencePiece model: {error}") from None
        self.hash = hashlib.sha256(model).hexdigest()[:16]
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
        self.special = SpecialIds(bos=bos, eos=eos, boi=boi, eoi=eoi, pad=max(pad, 0))

    def encode(self, text: str) -> np.ndarray:
        """Return token ids int64 [len], without special ids."""
        return np.array(self._processor.encode(text), dtype=np.int64)

    def piece(self, token_id: int) -> str:
        """Return the vocabulary's piece for an id."""
        return self._processor.id_to_piece(token_id)

    def unknown_in(self, text: str) -> list[str]:
        """Return the parts of a text, in order, that no piece covers: the model cannot tell them apart."""
        pieces = zip(self._processor.encode(text), self._processor.encode(text, out_type=str), strict=True)
        return [piece for token_id, piece in pieces if token_id == self.unknown]

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of ids, leaving out special and appended ids."""
        pieces = self._processor.get_piece_size()
        ids = [int(i) for i in token_ids if int(i) < pieces and not self._processor.is_control(int(i))]
        return self._processor.decode(ids)


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
