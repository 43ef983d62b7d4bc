"""Folders of pretrained language models' tokenizers, made on the spot by the `tokenizers` library."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [f"a large red circle beside {i} small blue squares, née Ж 中 🎉" for i in range(200)]
# How Qwen2.5 and Llama 3 cut a text into words.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(specials: list[str], size: int = 400) -> Tokenizer:
    """Return one like Qwen's and Llama 3's: bytes, NFC, and special tokens after the vocabulary."""
    library = Tokenizer(models.BPE())
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet))
    library.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return library


def byte_fallback() -> Tokenizer:
    """Return one like Llama 2's and Mistral's: a SentencePiece model as transformers converts it."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({letter for text in TEXTS for letter in text.replace(" ", "▁")} - {"🎉"})
    merges = [("▁", "r"), ("▁r", "e"), ("▁re", "d")]
    pieces += [*letters, *("".join(pair) for pair in merges)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    library = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return library


def write_folder(folder: Path, library: Tokenizer, **files: dict[str, Any]) -> Path:
    """Write tokenizer.json and, by name without .json, other files of the model; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    for name, contents in files.items():
        (folder / f"{name}.json").write_text(json.dumps(contents), encoding="utf-8")
    return folder


def qwen_folder(folder: Path, rows: int | None = None) -> Path:
    """Return a folder as Qwen's: ends by id in config.json, with `rows` of the embedding, and tokens for pictures."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
    library = byte_level(specials)
    end = library.token_to_id("<|endoftext|>")
    config = {"bos_token_id": end, "eos_token_id": library.token_to_id("<|im_end|>")}
    size = {} if rows is None else {"vocab_size": rows}
    return write_folder(folder, library, config=config | size)
