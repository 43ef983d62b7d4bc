"""Conversations are laid out as transformers lays them out, and say which tokens the assistant wrote."""

import json
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken

import data.chat
from data.chat import Chat, EndlessTemplate, Message
from data.conversations import MAX_TURNS
from data.tokenizer import Tokenizer, train_tokenizer
from tests.json_tokenizers import TEXTS, byte_fallback, byte_level, write_folder
from train.tokenizer import main as take

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>"
    "\n\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
PHI3 = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TALK = [
    Message("user", ("What is née, \nЖ or 中?",)),
    Message("assistant", ("Words  of 3 tongues: 🎉",)),
    Message("user", ("  and that?\n",)),
    Message("assistant", ("red",)),
]
SYSTEM = Message("system", ("You are a large circle.",))


def folder_of(tmp_path: Path, name: str) -> Path:
    ends = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    if name == "chatml":
        library = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        ends, template = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}, CHATML
    elif name == "llama3":
        template, names = LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        library = byte_level([*ends.values(), *names])
    elif name == "llama2":
        template, library, ends = LLAMA2, byte_fallback(), {"bos_token": "<s>", "eos_token": "</s>"}
    else:
        library, template = byte_level(list(ends.values())), PHI3
        names = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
        library.add_special_tokens([AddedToken(token, special=True, rstrip=True) for token in names])
    return write_folder(tmp_path / name, library, tokenizer_config={**ends, "chat_template": template})


def theirs(folder: Path, messages: list[Message], prompt: bool = False) -> list[int]:
    from transformers import PreTrainedTokenizerFast

    settings = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **settings)
    conversation = [{"role": m.speaker, "content": "".join(m.parts)} for m in messages]
    return tokenizer.apply_chat_template(conversation, add_generation_prompt=prompt, return_dict=False)


def ids_of(segments: list) -> list[int]:
    return [int(i) for segment in segments for i in segment]


@pytest.mark.parametrize("name", ["chatml", "llama3", "llama2", "phi3"])
def test_a_conversation_has_the_ids_that_transformers_gives_it(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path, name)
    tokenizer = Tokenizer(folder)
    for messages in (TALK, TALK[:2], *([] if name == "llama2" else [[SYSTEM, *TALK]])):
        if name == "llama3":  # it trims what it is given, as readers do
            messages = [Message(m.speaker, tuple(part.strip() for part in m.parts)) for m in messages]
        laid_out, expected = Chat(tokenizer).lay_out(messages), theirs(folder, messages)
        found = ids_of([ids for _, ids in laid_out])
        found = found if name == "chatml" or name == "phi3" else [tokenizer.special.bos, *found]
        left = expected[len(found) :]  # EOS, which packing adds, and what a template writes after the last answer
        assert found == expected[: len(found)] and not tokenizer.decode(left).strip() and len(left) <= 2
        given = ids_of(Chat(tokenizer).prompt(messages[:-1]))
        if name != "chatml" and name != "phi3":
            given = [tokenizer.special.bos, *given]
        assert given == theirs(folder, messages[:-1], prompt=True)
        assert given == found[: len(given)]


def told(tokenizer: Tokenizer, segments: list) -> list[tuple[str, str]]:
    """Return each segment's role and its tokens' pieces; a picture as it is."""
    return [
        (role, "".join(map(tokenizer.piece, part)) if isinstance(part, np.ndarray) else part) for role, part in segments
    ]


def test_the_answer_and_what_ends_it_are_targets_and_all_else_is_context(tmp_path: Path) -> None:
    tokenizer = Tokenizer(folder_of(tmp_path, "chatml"))
    picture = object()
    messages = [
        SYSTEM,
        Message("user", (picture, "a red ", picture, "")),
        Message("assistant", ("blue",)),
        Message("user", ("and",)),
        Message("assistant", ("see ", picture)),
    ]
    assert told(tokenizer, Chat(tokenizer).lay_out(messages)) == [
        ("context", "<|im_start|>systemĊYouĠareĠaĠlargeĠcircle.<|im_end|>Ċ<|im_start|>userĊ"),
        ("context", picture),
        ("context", "aĠredĠ"),
        ("context", picture),
        ("context", "<|im_end|>Ċ<|im_start|>assistantĊ"),
        ("target", "blue<|im_end|>"),
        ("context", "Ċ<|im_start|>userĊand<|im_end|>Ċ<|im_start|>assistantĊ"),
        ("target", "seeĠ"),
        ("target", picture),  # then <|im_end|>: EOS, which packing adds
    ]
    assert told(tokenizer, [("", part) for part in Chat(tokenizer).prompt(messages[:2])])[-1] == (
        "",
        "<|im_end|>Ċ<|im_start|>assistantĊ",
    )


def test_an_answer_ends_with_the_templates_token_where_that_is_not_eos(tmp_path: Path) -> None:
    tokenizer = Tokenizer(folder_of(tmp_path, "llama3"))
    (_, context), target = told(tokenizer, Chat(tokenizer).lay_out(TALK[2:]))
    assert target == ("target", "red<|eot_id|>")
    assert context.startswith("<|start_header_id|>user") and context.endswith("assistant<|end_header_id|>ĊĊ")


@pytest.mark.parametrize("name", ["chatml", "llama3", "llama2", "phi3"])
def test_contents_cannot_spell_special_tokens(tmp_path: Path, name: str) -> None:
    """Nor the marks that stand for them: they decode to what they are."""
    tokenizer = Tokenizer(folder_of(tmp_path, name))
    added = json.loads((tmp_path / name / "tokenizer.json").read_text())["added_tokens"]
    control = {token["id"]: token["content"] for token in added}
    number = sum(i in control for i in ids_of([ids for _, ids in Chat(tokenizer).lay_out(TALK[2:])]))
    for spelled in [*control.values(), "<|im_", "\ufdd00\ufdd1", "{{ 7 * 7 }}", "\ufdd0"]:
        messages = [Message("user", (f"red {spelled}", spelled)), Message("assistant", (f"{spelled} red{spelled}",))]
        segments = Chat(tokenizer).lay_out(messages)
        assert [role for role, _ in segments] == ["context", "target"]
        assert sum(i in control for i in ids_of([ids for _, ids in segments])) == number, spelled
        assert f"{spelled} red{spelled}" in tokenizer.decode(segments[1][1]), spelled


def test_the_plain_form_is_lines_and_answers(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, tmp_path / "t.model", 330)
    tokenizer = Tokenizer(tmp_path / "t.model")
    eos, picture = tokenizer.special.eos, object()
    messages = [SYSTEM, Message("user", (picture, "a red")), Message("assistant", ("blue",)), *TALK[2:]]
    segments = Chat(tokenizer).lay_out(messages)
    assert [role for role, _ in segments] == [*["context"] * 3, "target", "context", "target"]
    texts = [tokenizer.decode(part) if isinstance(part, np.ndarray) else part for _, part in segments]
    assert texts == ["You are a large circle.\n", picture, "a red\n", "blue", "  and that?\n\n", "red"]
    ends = [part is not picture and part[-1] == eos for _, part in segments]
    assert ends == [False, False, False, True, False, False]  # the last is packing's
    for asked in (2, 4):
        prompt = Chat(tokenizer).prompt(messages[:asked])
        pairs = zip(prompt, (part for _, part in segments), strict=False)
        assert all(a is b or np.array_equal(a, b) for a, b in pairs) and len(prompt) == {2: 3, 4: 5}[asked]
    # A model of transformers' without a template has the same form.
    plain = Tokenizer(write_folder(tmp_path / "json", byte_fallback(), tokenizer_config={"eos_token": "</s>"}))
    assert [role for role, _ in Chat(plain).lay_out(TALK)] == ["context", "target"] * 2


def test_a_template_that_takes_lists_of_parts_gets_them(tmp_path: Path) -> None:
    """As that of LLaVA in transformers does."""
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' }}{% for c in m['content'] | selectattr('type', 'equalto', "
        + (
            "'text') %}{{ c['text'] + ' ' }}{% endfor %}{{ eos_token if m['role'] == 'assistant' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
        )
    )
    settings = {"eos_token": "</s>", "chat_template": template}
    tokenizer = Tokenizer(write_folder(tmp_path, byte_fallback(), tokenizer_config=settings))
    segments = Chat(tokenizer).lay_out([Message("user", ("a", "b")), *TALK[1:]])
    texts = [(role, tokenizer.decode(ids)) for role, ids in segments]
    assert texts[0] == ("context", "user: ab assistant: ") and texts[3] == ("target", "red ")


def test_what_a_template_refuses_is_refused(tmp_path: Path) -> None:
    chat = Chat(Tokenizer(folder_of(tmp_path, "llama2")))
    with pytest.raises(ValueError, match="refuses the conversation: no system"):
        chat.lay_out([SYSTEM, *TALK])
    with pytest.raises(ValueError, match="roles must alternate"):
        chat.lay_out([TALK[0], TALK[0]])
    for empty in ((), ("",)):
        with pytest.raises(ValueError, match="message 1 of the assistant is empty"):
            chat.lay_out([TALK[0], Message("assistant", empty)])
    with pytest.raises(ValueError, match="ends with a message of the user"):
        chat.prompt(TALK)
    for template, reason in (
        ("{{ messages[0]['content'] }}", "leaves out or repeats"),
        ("{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}", "leaves out or repeats"),
        ("{% for m in messages %}", "refuses the conversation"),
        ("{{ messages[5]['content'] }}", "refuses|leaves out"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses the conversation"),
        ("{{ 5 | dictsort }}", "refuses the conversation"),
        ("{{ 'x' * 10**13 }}", "refuses the conversation"),
        ("{{ raise_exception('x' * 10**5) }}", "refuses the conversation: x{300}$"),
        ("{{ messages.append(1) }}", "refuses the conversation"),  # the sandbox
        ("{% include 'tokenizer.json' %}", "refuses the conversation: no loader"),  # nor can it read a file
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses the conversation: maximum recursion"),
        ("{{ messages | xmlattr }}", "refuses the conversation"),
        ("{{ ''.__class__.__mro__ }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "refuses the conversation"),
    ):
        folder = write_folder(
            tmp_path / "bad", byte_fallback(), tokenizer_config={"eos_token": "</s>", "chat_template": template}
        )
        with pytest.raises(ValueError, match=reason):
            Chat(Tokenizer(folder)).lay_out(TALK)


def test_a_template_that_hardly_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own steps and not by the clock; one that searches all turns for each takes them for a thousand turns."""
    monkeypatch.setattr(data.chat, "MAX_STEPS", 20_000)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    recursive = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    for template in (loop, recursive):
        settings = {"eos_token": "</s>", "chat_template": template + CHATML}
        chat = Chat(Tokenizer(write_folder(tmp_path / "a", byte_fallback(), tokenizer_config=settings)))
        before = sys.gettrace()
        with pytest.raises(EndlessTemplate, match="takes more than 20,000 steps"):
            chat.lay_out([Message("user", ("a",)), Message("assistant", ("b",))])
        assert sys.gettrace() is before
    monkeypatch.undo()
    search = "{% for m in messages %}{% for n in messages %}{% endfor %}{{ m.content }}{% endfor %}"
    settings = {"eos_token": "</s>", "chat_template": search}
    chat = Chat(Tokenizer(write_folder(tmp_path / "b", byte_fallback(), tokenizer_config=settings)))
    chat.lay_out([Message("user", ("a",)), Message("assistant", ("b",))] * (MAX_TURNS // 2))


def test_a_template_that_moves_messages_loses_none(tmp_path: Path) -> None:
    settings = {"eos_token": "</s>", "chat_template": "{% for m in messages|reverse %}[{{ m['content'] }}]{% endfor %}"}
    tokenizer = Tokenizer(write_folder(tmp_path / "t", byte_fallback(), tokenizer_config=settings))
    laid_out = Chat(tokenizer).lay_out(TALK[:2])
    assert [(role, tokenizer.decode(ids)) for role, ids in laid_out] == [
        ("context", "["),
        ("target", TALK[1].parts[0]),
        ("context", f"][{TALK[0].parts[0]}"),
    ]


def test_the_date_in_a_template_is_always_the_same(tmp_path: Path) -> None:
    template = "\n{{ strftime_now('%d %b %Y') }}\n" + PHI3
    settings = {"eos_token": "</s>", "chat_template": template}
    tokenizer = Tokenizer(write_folder(tmp_path, byte_fallback(), tokenizer_config=settings))
    text = tokenizer.decode(Chat(tokenizer).prompt(TALK[:1])[0])
    assert text.startswith("\n26 Jul 2024\n<|user|>")


def test_a_template_travels_with_its_tokenizer_and_has_a_hash_of_its_own(tmp_path: Path) -> None:
    """What was encoded before templates were kept stays valid: the hash of the ids is as it was."""
    folder, copy = folder_of(tmp_path, "chatml"), tmp_path / "copy" / "tokenizer.json"
    tokenizer = Tokenizer(folder)
    take([f"source={folder}", f"output={copy}"])
    assert Tokenizer(copy).hash == tokenizer.hash and Tokenizer(copy).chat_hash == tokenizer.chat_hash != "plain"
    assert told(tokenizer, Chat(Tokenizer(copy)).lay_out(TALK)) == told(tokenizer, Chat(tokenizer).lay_out(TALK))

    place = folder / "tokenizer_config.json"
    settings = json.loads(place.read_text())
    template = settings.pop("chat_template")
    place.write_text(json.dumps(settings))
    without = Tokenizer(folder)
    assert without.chat is None and without.chat_hash == "plain" and without.hash == tokenizer.hash
    assert b'"chat"' not in without.content and without.hash == sha256(without.content).hexdigest()[:16]
    files = {"chat_template.json": json.dumps({"chat_template": template}), "chat_template.jinja": template}
    for name, contents in files.items():
        (folder / name).write_text(contents)
        assert Tokenizer(folder).chat_hash == tokenizer.chat_hash, name
        (folder / name).unlink()
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": template}]
    place.write_text(json.dumps({**settings, "chat_template": named}))
    assert Tokenizer(folder).chat_hash == tokenizer.chat_hash


def test_an_exported_tokenizer_keeps_its_chat_template(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = folder_of(tmp_path, "chatml")
    (tmp_path / "export").mkdir()
    for name, content in Tokenizer(folder).files().items():
        (tmp_path / "export" / name).write_bytes(content)
    exported = AutoTokenizer.from_pretrained(tmp_path / "export")
    conversation = [{"role": m.speaker, "content": "".join(m.parts)} for m in TALK]
    assert exported.apply_chat_template(conversation, return_dict=False) == theirs(folder, TALK)
