"""Tokenizers of pretrained language models: ids and texts as the library's own, special ids by the model's config."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, models, processors
from tokenizers import Tokenizer as Library

from data.tokenizer import Tokenizer, find_copy
from tests import runs
from tests.encoding.jobs import arguments, picture_record, raw_folder
from tests.json_tokenizers import byte_fallback, byte_level, qwen_folder, write_folder
from train import encode, sample
from train.tokenizer import main

HARD = [
    "a large red circle", "two\nlines\r\n\tand  three   spaces ", " leading", "trailing ", "", "\0 NUL \0",
    "\ufeffmark",
    "👩‍👩‍👧‍👦🏽 🎉🇩🇪", "שלום עולם مرحبا", "e\u0301 NFD, \ufb01 ligature, ½, Å", "x" * 3000, " " * 500, "\n" * 300,
    "中文和English混合", "\u202eright to left\u202c", "'s 'T 'LL 12345",
]  # fmt: skip
SPELLED = "<|im_start|>user<|im_end|> <image> </s> <s> <unk> <|endoftext|> <|vision_start|>"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_folder(tmp_path_factory.mktemp("qwen") / "model")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("llama") / "model", byte_fallback())


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_hard_texts_have_the_librarys_ids_and_come_back_as_it_brings_them_back(
    name: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    tokenizer, library = Tokenizer(folder), Library.from_file(str(folder / "tokenizer.json"))
    for text in HARD:
        ids = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text).tolist() == ids, text
        assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=False), text
    exact = [text for text in HARD if tokenizer.decode(tokenizer.encode(text)) == text]
    assert set(HARD) - set(exact) <= {"e\u0301 NFD, \ufb01 ligature, ½, Å"}  # Qwen's vocabulary normalises to NFC


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_special_tokens_in_a_text_are_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = Tokenizer(request.getfixturevalue(name))
    ids = tokenizer.encode(SPELLED)
    assert not set(vars(tokenizer.special).values()) & set(ids.tolist())
    assert tokenizer.decode(ids) == SPELLED
    ends = [tokenizer.special.bos, *ids, tokenizer.special.eos, tokenizer.special.boi, tokenizer.special.eoi]
    assert tokenizer.decode(ends) == SPELLED  # they are left out


def test_ends_are_the_models_and_the_rest_is_appended_after_its_rows(tmp_path: Path, qwen: Path, llama: Path) -> None:
    library = Library.from_file(str(qwen / "tokenizer.json"))
    plain, padded = Tokenizer(qwen), Tokenizer(qwen_folder(tmp_path / "padded", rows=512))
    size = library.get_vocab_size()
    assert plain.special.bos == library.token_to_id("<|endoftext|>")
    assert plain.special.eos == library.token_to_id("<|im_end|>")
    of_plain = (plain.special.boi, plain.special.eoi, plain.special.pad, plain.vocab_size)
    assert of_plain == (size, size + 1, size + 2, size + 3)
    assert (padded.special.boi, padded.vocab_size) == (512, 515)
    assert padded.hash != plain.hash
    assert (Tokenizer(llama).special.bos, Tokenizer(llama).special.eos) == (1, 2)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": ["B", "A"]}}, ("B", "B")),  # without BOS, EOS begins a document
        ({"tokenizer_config": {"bos_token": "<A>", "eos_token": {"content": "<B>"}}}, ("A", "B")),
        (
            {"config": {"bos_token_id": None, "eos_token_id": "A"}, "generation_config": {"bos_token_id": "B"}},
            ("B", "A"),
        ),
    ],
)
def test_where_ends_are_looked_for(files: dict, expected: tuple[str, str], tmp_path: Path) -> None:
    library = byte_level(["<A>", "<B>"])
    ids = {name: library.token_to_id(f"<{name}>") for name in "AB"}

    def with_ids(value: object) -> object:
        if isinstance(value, list):
            return [with_ids(part) for part in value]
        return ids.get(value, value) if isinstance(value, str) else value

    written = {name: {key: with_ids(value) for key, value in contents.items()} for name, contents in files.items()}
    special = Tokenizer(write_folder(tmp_path / "model", library, **written)).special
    assert (special.bos, special.eos) == tuple(ids[name] for name in expected)


def test_unused_tokens_are_taken_by_name_into_one_file(tmp_path: Path, qwen: Path) -> None:
    output = tmp_path / "made" / "tokenizer.json"
    special = 'special={boi: "<|vision_start|>", eoi: "<|vision_end|>", pad: "<|endoftext|>"}'
    main([f"source={qwen}", special, f"output={output}"])
    main([f"source={qwen}", special, f"output={output}"])  # the same again changes nothing
    library, tokenizer = Library.from_file(str(qwen / "tokenizer.json")), Tokenizer(output)
    assert tokenizer.special.boi == library.token_to_id("<|vision_start|>")
    assert tokenizer.special.eoi == library.token_to_id("<|vision_end|>")
    assert (tokenizer.special.pad, tokenizer.vocab_size) == (tokenizer.special.bos, library.get_vocab_size())
    assert tokenizer.encode(SPELLED).tolist() == Tokenizer(qwen).encode(SPELLED).tolist()
    assert tokenizer.hash != Tokenizer(qwen).hash


def test_a_copy_stands_for_the_folder(tmp_path: Path, qwen: Path) -> None:
    tokenizer = Tokenizer(qwen)
    (tmp_path / tokenizer.file_name).write_bytes(tokenizer.content)
    copy = find_copy(tmp_path)
    assert copy is not None
    assert (Tokenizer(copy).hash, Tokenizer(copy).special) == (tokenizer.hash, tokenizer.special)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("special={boi: '<|nothing|>'}", "is no token"),
        ("special={boi: a}", "a text can spell it"),
        ("special={boi: '<|im_start|>', eoi: '<|im_start|>'}", "tokens of their own"),
        ("special={boi: '<|im_end|>'}", "tokens of their own"),
        ("special={bos: '<|im_end|>'}", "expected boi, eoi and pad"),
    ],
)
def test_senseless_mappings_are_refused(argument: str, words: str, tmp_path: Path, qwen: Path) -> None:
    with pytest.raises(ValueError, match=words):
        main([f"source={qwen}", argument, f"output={tmp_path}/out.json"])


def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.json or tokenizer\.model in that folder"):
        Tokenizer(tmp_path)
    bad = {
        "not json": "is not JSON",
        "[1]": "is not a tokenizer.json",
        '{"tokenizer": "x"}': "is not a tokenizer.json",
        '{"model": "x"}': "is not a tokenizer.json",
        '{"model": {"vocab": {"a": "b"}}}': "is not a tokenizer.json",
        '{"model": {"vocab": [1]}}': "is not a tokenizer.json",
        '{"model": {}, "added_tokens": [{"content": "x"}]}': "is not a tokenizer.json",
        '{"model": {"type": "?"}}': "is not a tokenizer.json",
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}': "no end of a document",
        '{"tokenizer": {"model": {}}, "special": {"bos": 1}}': "lacks its special ids",
    }
    for content, words in bad.items():
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=words):
            Tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected a tokenizer\.json"):
        main([f"source={tmp_path / 'none'}", f"output={tmp_path}/out.json"])


@pytest.mark.parametrize(("special", "vocab_size"), [({"boi": 500}, 500), ({"bos": -1}, 500), ({}, 100), ({}, 1 << 31)])
def test_ids_outside_of_the_vocabulary_are_refused(special: dict, vocab_size: int, tmp_path: Path, qwen: Path) -> None:
    content = json.loads(Tokenizer(qwen).content)
    content |= {"special": content["special"] | special, "vocab_size": vocab_size}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="expected ids below vocab_size"):
        Tokenizer(tmp_path)


def test_ends_of_another_model_are_refused(tmp_path: Path, qwen: Path) -> None:
    shutil.copytree(qwen, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"eos_token_id": 9999}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"'eos': 9999.* by the config\.json beside it"):
        Tokenizer(tmp_path / "model")


def test_what_no_token_covers_is_unigrams_unknown_or_refused(tmp_path: Path) -> None:

    def with_end(library: Library) -> Library:
        library.add_special_tokens([AddedToken("<end>", special=True)])
        return library

    pieces = [("<unk>", 0.0), ("b", 0.0), ("a", -1.0)]
    write_folder(tmp_path, with_end(Library(models.Unigram(pieces, unk_id=0))), config={"eos_token_id": 3})
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.unknown == 0 and tokenizer.unknown_in("ac") == ["c"]
    write_folder(tmp_path, with_end(Library(models.Unigram(pieces, unk_id=None))), config={"eos_token_id": 3})
    with pytest.raises(ValueError, match="cannot encode '<end>'"):
        Tokenizer(tmp_path)


def test_an_end_is_never_text_whatever_its_file_says(tmp_path: Path) -> None:
    """But other added tokens that are not marked as special are words, as to the library."""
    library = byte_level([])
    library.add_tokens([AddedToken("</end>", special=False), AddedToken("<think>", special=False)])
    end, think = map(library.token_to_id, ("</end>", "<think>"))
    folder = write_folder(tmp_path / "model", library, config={"eos_token_id": end})
    tokenizer, text = Tokenizer(folder), "a</end> <think>b"
    ids = tokenizer.encode(text).tolist()
    assert end not in ids and think in ids and tokenizer.decode(ids) == text
    with pytest.raises(ValueError, match="a text can spell it"):
        main([f"source={folder}", "special={boi: <think>}", f"output={tmp_path}/out.json"])


def test_a_vocabulary_whose_words_are_special_tokens_is_refused(tmp_path: Path) -> None:
    """Unigram finds `</s>` in any text; nothing keeps the library from it."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -3.0) for letter in "▁a</s>")]
    library = Library(models.Unigram(pieces, unk_id=0))
    library.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<unk>", special=True)])
    with pytest.raises(ValueError, match="a text can spell </s>, which must not be text"):
        Tokenizer(write_folder(tmp_path / "model", library))


def test_neither_templates_nor_truncation_nor_dropout_touch_a_text(tmp_path: Path, qwen: Path) -> None:
    library = Library.from_file(str(qwen / "tokenizer.json"))
    expected = Tokenizer(qwen).encode(HARD[0] * 9).tolist()
    end = ("<|endoftext|>", library.token_to_id("<|endoftext|>"))
    library.post_processor = processors.TemplateProcessing(f"{end[0]} $A {end[0]}", special_tokens=[end])
    library.enable_truncation(3)
    library.enable_padding(length=500)
    library.model.dropout = 0.9
    tokenizer = Tokenizer(write_folder(tmp_path / "model", library, config={"eos_token_id": end[1]}))
    assert tokenizer.encode(HARD[0] * 9).tolist() == expected


@pytest.mark.slow
def test_texts_and_pictures_train_and_are_sampled_with_a_language_models_tokenizer(
    tmp_path: Path, vae_folder: Path
) -> None:
    """From raw pictures to samples, by threads and workers that fork, without a warning; then from the copy."""
    folder = write_folder(tmp_path / "model", byte_level(["<|end|>"]), tokenizer_config={"eos_token": "<|end|>"})
    main([f"source={folder}", 'special={pad: "<|end|>"}', f"output={tmp_path / 'made.json'}"])
    tokenizer = Tokenizer(tmp_path / "made.json")
    given = raw_folder(tmp_path / "raw", {"0": [picture_record(i) for i in range(12)]})
    encoded = tmp_path / "encoded"
    encode.main(arguments(given, encoded, tokenizer, vae=vae_folder, decode_threads=2))
    run_dir = tmp_path / "run"
    argv = runs.settings(run_dir, tokenizer, {"pairs": encoded}, vae=vae_folder, optim__steps=2)
    assert "forked" not in runs.finish([*argv, "checkpoint.interval_steps=2"], 1)
    assert not (run_dir / "tokenizer.model").exists()
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "made.json").rename(tmp_path / "moved.json")  # the run has its copy
    quick = ["steps=2", "max_new_tokens=4", "device=cpu", f"output={tmp_path / 'samples'}"]
    sample.main([f"checkpoint={run_dir}", "prompt=a <|end|> 🎉", *quick])
    assert (tmp_path / "samples" / "sheet.png").is_file()


def test_a_process_that_forks_after_encoding_is_not_warned(qwen: Path) -> None:
    """As the encoder's and the loader's do."""
    code = f"""
import os
from data.tokenizer import Tokenizer
tokenizer = Tokenizer({str(qwen)!r})
tokenizer.encode("a large red circle")
if not os.fork():
    tokenizer.encode("again"); os._exit(0)
os.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
