"""Text comes back as it went in, no text can spell a special piece, and the hash names the model."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data.tokenizer import Tokenizer, train_tokenizer
from train.tokenizer import main

TEXTS = [
    *("a large red circle", "two\nlines\n\nand  two  spaces", " leading, trailing ", "tab\tand\r\n"),
    "unseen letters: ümlaut Ж 中 🎉 e\u0301 \ufb01 ½ \0",
    "<boi> <eoi> <s> </s> <unk> <pad> <0x41>",
    "",
]


def foreign_model(path: Path, **options: int | list[str]) -> Path:
    """A SentencePiece model that was not made for images, as Llama's."""
    model = io.BytesIO()
    texts = (f"some words for number {i}" for i in range(200))
    options = {"vocab_size": 60, "model_type": "bpe", **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, minloglevel=2, **options)
    path.write_bytes(model.getvalue())
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_text_decodes_to_what_was_encoded_and_spells_no_special_id(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text)
    assert token_ids.dtype == np.int64 and token_ids.ndim == 1
    assert tokenizer.decode(token_ids) == text
    assert not set(vars(tokenizer.special).values()) & set(token_ids.tolist())


def test_special_ids_are_distinct_inside_the_vocabulary_and_left_out_of_decoded_text(tokenizer: Tokenizer) -> None:
    special = tokenizer.special
    ids = vars(special).values()
    assert len(set(ids)) == 5 and all(0 <= i < tokenizer.vocab_size for i in ids) and tokenizer.vocab_size == 300
    text = tokenizer.encode("a red circle").tolist()
    assert tokenizer.decode([special.bos, *text, special.boi, special.pad, special.eoi, special.eos]) == "a red circle"


def test_a_foreign_model_gets_image_ids_after_its_own(tmp_path: Path) -> None:
    tokenizer = Tokenizer(foreign_model(tmp_path / "foreign.model"))
    assert (tokenizer.special.boi, tokenizer.special.eoi, tokenizer.vocab_size) == (60, 61, 62)
    assert tokenizer.special.pad == 0  # it has none; the unknown piece stands in
    ids = tokenizer.encode("some words").tolist()
    assert tokenizer.decode([*ids, 60, 61]) == "some words"


@pytest.mark.parametrize("symbols", [["<boi>", "<eoi>"], ["<eoi>", "<boi>", "</s", "ord"]])
def test_a_foreign_models_symbols_are_no_text(tmp_path: Path, symbols: list[str]) -> None:
    """SentencePiece finds user-defined symbols in any text; ids and vocabulary stay, for what was made with them."""
    path = foreign_model(tmp_path / "foreign.model", user_defined_symbols=symbols, byte_fallback=True, vocab_size=330)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = Tokenizer(path)
    special = tokenizer.special
    assert tokenizer.vocab_size == 330
    assert [special.boi, special.eoi] == [theirs.piece_to_id(piece) for piece in ("<boi>", "<eoi>")]
    text = "some words <boi>for<eoi> </s> <s> <pad> <boi>"
    assert special.boi in theirs.encode(text)
    assert not {special.bos, special.eos, special.boi, special.eoi} & set(tokenizer.encode(text).tolist())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("some words").tolist() == theirs.encode("some words")


def test_what_no_piece_stands_for_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    foreign = Tokenizer(foreign_model(tmp_path / "foreign.model"))
    assert foreign.unknown_in("some 中 words é") == ["中", "é"] and foreign.unknown_in("some words") == []
    assert tokenizer.unknown_in("some 中 words é") == []  # spelled in bytes


def test_a_model_without_bos_or_eos_is_refused(tmp_path: Path) -> None:
    for option in ("bos_id", "eos_id"):
        path = foreign_model(tmp_path / "foreign.model", **{option: -1})
        with pytest.raises(ValueError, match=r"foreign.model has no BOS or no EOS piece"):
            Tokenizer(path)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.model: no such file; train one with `python -m train.tok"):
        Tokenizer(tmp_path / "none.model")
    for content in (b"", b"no model", bytes(1000)):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad.model is not a SentencePiece model"):
            Tokenizer(tmp_path / "bad.model")


def test_training_is_deterministic_and_the_hash_names_the_model(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [f"a large red circle beside {i} small blue squares" for i in range(200)]
    for trained_on, is_same in ((texts, True), (texts, True), ([*texts, "another text"], False)):
        train_tokenizer(trained_on, tmp_path / "made" / "t.model", 300)
        assert (Tokenizer(tmp_path / "made" / "t.model").hash == tokenizer.hash) == is_same


def test_long_texts_train_the_tokenizer_too(tmp_path: Path) -> None:
    """By default SentencePiece leaves out texts longer than 4 KB."""
    train_tokenizer(["zqzq " * 2000, "some words"], tmp_path / "t.model", 275)
    assert len(Tokenizer(tmp_path / "t.model").encode("zqzq zqzq")) <= 4


def test_too_few_texts_for_the_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"could not train .* vocab_size=5000: .*; give more or other text"):
        train_tokenizer(["few words"], tmp_path / "t.model", 5000)
    with pytest.raises(ValueError, match="could not train"):
        train_tokenizer([], tmp_path / "t.model", 300)
    assert not list(tmp_path.iterdir())


def test_the_program_trains_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "".join(f'{{"text": "some words for number {i}"}}\n' for i in range(100))
    (tmp_path / "a.jsonl").write_text(lines)
    output, inputs = tmp_path / "made" / "t.model", f"inputs=[{tmp_path / 'a.jsonl'}]"
    main([inputs, f"output={output}", "vocab_size=300"])
    made = output.read_bytes()
    assert f"tokenizer: wrote {output}, vocabulary 300, hash {Tokenizer(output).hash}" in capsys.readouterr().out
    main([inputs, f"output={output}", "vocab_size=300"])
    assert output.read_bytes() == made and "delete it to train again" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"t\.model exists with vocabulary 300, expected vocab_size=400: delete it"):
        main([inputs, f"output={output}", "vocab_size=400"])
    no_text = r"100 of 100 records are bad.*no text: 100\. First: .*text_key=KEY chooses one of \['text'\]"
    for arguments, message in (
        ([inputs, "vocab_size=264"], "expected more than 264"),
        ([inputs, "text_key=words"], no_text),
        ([], r"inputs=\[\] \(none given\)"),
    ):
        with pytest.raises(ValueError, match=message):
            main([*arguments, f"output={tmp_path / 'b'}"])
    (tmp_path / "a.jsonl").write_text(lines.replace('"text"', '"words"') + "{}")
    main([inputs, f"output={tmp_path / 'c'}", "vocab_size=300", "text_key=words"])
    said = capsys.readouterr().out
    assert f"skipped {tmp_path / 'a.jsonl'}:101: no text" in said and (tmp_path / "c").read_bytes() == made


def test_what_the_program_cannot_read_is_named_and_has_a_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f'{{"text": "some words for number {i}"}}\n' for i in range(100)]
    (tmp_path / "a.jsonl").write_text("".join([*lines, "no JSON\n", "none either\n"]))
    (tmp_path / "b.jsonl").write_text("version https://git-lfs.github.com/spec/v1\n")
    output = tmp_path / "t.model"
    arguments = [f"inputs=[{tmp_path}]", f"output={output}", "vocab_size=300"]
    for more, message in (
        ([], "^nothing could be read from 1 of 2 input files, .*b.jsonl: no text; it is a Git LFS pointer"),
        (["max_failed_files=1"], "^2 of 102 records are bad, more than max_bad_fraction=0.01: undecodable text: 2"),
    ):
        with pytest.raises(ValueError, match=message):
            main([*arguments, *more])
        assert not output.exists()
    main([*arguments, "max_failed_files=1", "max_bad_fraction=0.02"])
    assert output.exists() and f"tokenizer: skipped {tmp_path / 'a.jsonl'}:101" in capsys.readouterr().out


def test_the_program_refuses_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train.tokenizer", f"inputs=[{tmp_path / 'none'}]", f"output={tmp_path / 't'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"train.tokenizer: input {tmp_path / 'none'} does not exist" in done.stderr
