"""Config files and arguments arrive typed and complete, or are refused with name, value and expectation."""

import ast
import dataclasses
import importlib
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from omegaconf import MISSING

from data.storage import Location
from tests.say import say
from train.config import help_text, load_config, options, to_yaml

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = 3  # units, > 0
    # Of what is kept,
    # in [0, 1].
    share: float = 0.5
    name: str | None = None  # null: none

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"inner.width={self.width}: expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Source:
    path: Location | None = MISSING  # folder of the source
    weight: float = 1.0  # share of all tokens


@dataclass(frozen=True, kw_only=True)
class Config:
    run_dir: Location = MISSING  # folder of the run
    seed: int = 0  # of everything
    kind: Literal["one", "two"] = "one"  # which
    sizes: tuple[int, ...] = (1, 2)  # a few
    pair: tuple[int, int] | None = None  # two
    inputs: list[Location] = field(default_factory=list)  # files
    fast: bool = False  # or slow
    labels: dict[str, str] = field(default_factory=dict)  # by name
    folders: dict[str, Location] = field(default_factory=dict)  # by name
    inner: Inner = field(default_factory=Inner)
    sources: dict[str, Source] = field(default_factory=dict)  # data sets by name


def load(*arguments: str) -> Config:
    return load_config(Config, ["run_dir=run", *arguments])


def refusal(*arguments: str) -> str:
    with pytest.raises(ValueError) as caught:
        load(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def yaml_file(path: Path, text: str) -> str:
    path.write_text(textwrap.dedent(text))
    return f"config={path}"


def test_values_arrive_with_their_types() -> None:
    config = load(
        *("seed=5", "kind=two", "sizes=[3,4,5]", "inputs=[a,b=c]", "fast=true", "labels.x=y", "inner.width=7"),
        *("inner.share=1e-3", "inner.name=null", "sources.pics.path=p", "sources.words.path=w"),
        "sources.words.weight=2",
    )
    assert config == Config(
        run_dir="run",
        seed=5,
        kind="two",
        sizes=(3, 4, 5),
        inputs=["a", "b=c"],
        fast=True,
        labels={"x": "y"},
        inner=Inner(width=7, share=0.001),
        sources={"pics": Source(path="p"), "words": Source(path="w", weight=2.0)},
    )
    assert type(config.sources["words"]) is Source and type(config.sizes) is tuple


def test_files_come_first_and_the_command_line_wins(tmp_path: Path) -> None:
    first = yaml_file(tmp_path / "1.yaml", "seed: 1\ninner: {width: 4, share: 0.1}\nsources: {a: {path: p}}\n")
    second = yaml_file(tmp_path / "2.yaml", "seed: 2\nsources: {b: {path: q, weight: 3}}\n")
    config = load("inner.width=9", first, second)
    assert (config.seed, config.inner.width, config.inner.share) == (2, 9, 0.1)
    assert config.sources == {"a": Source(path="p"), "b": Source(path="q", weight=3.0)}


def test_a_saved_config_loads_back(tmp_path: Path) -> None:
    config = load("sizes=[3]", "inner.name=a b", "sources.x.path=p", "labels.x=y")
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(Config, [f"config={tmp_path / 'c.yaml'}"]) == config


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("inner.widht=5", "command line: unknown key 'inner.widht'; did you mean 'inner.width'? (--help lists"),
        ("sources.x.pth=5", "command line: unknown key 'sources.x.pth'; did you mean 'sources.NAME.path'?"),
        ("nothing_like_it=5", "command line: unknown key 'nothing_like_it' (--help lists the keys)"),
        ("seed.x=1", "command line: unknown key 'seed.x'"),
        ("=5", "command line: unknown key ''"),
        ("seed=abc", "command line: seed='abc': expected int"),
        ("seed=1.5", "command line: seed=1.5: expected int"),
        ("seed=", "command line: seed=None: expected int"),
        ("seed=null", "command line: seed=None: expected int"),
        ("kind=three", "command line: kind='three': expected one of one, two"),
        ("sizes=[1,x]", "command line: sizes=[1, 'x']: expected tuple[int, ...]"),
        ("pair=5", "command line: pair=5: expected tuple[int, int], or null"),
        ("inputs=", "command line: inputs=None: expected list[str]"),
        ("sources.x=null", "command line: sources.x=null removes an entry that does not exist; there is nothing"),
        ("labels.x=null", "command line: labels.x=null removes an entry that does not exist; there is nothing"),
        ("fast=perhaps", "command line: fast='perhaps': expected bool"),
        ("inner=5", "command line: inner=5: expected a group of keys, such as inner.width"),
        ("sources=[1]", "command line: sources=[1]: expected name: settings"),
        ("sources.x=5", "command line: sources.x=5: expected a group of keys, such as sources.NAME.path"),
        ("inner.width=0", "inner.width=0: expected at least 1"),
        ("inputs=[a", "command line: inputs=[a: not readable as YAML"),
        ("seed=!!python/object/apply:os.getpid []", "not readable as YAML"),
        ("seed", "argument 'seed' is not of the form key=value; --help lists the keys"),
        ("labels=x", "command line: labels='x': expected a mapping of names to str, such as {NAME: ...}"),
        ("--seed=1", "argument '--seed=1' is not of the form key=value"),
        ("inner.name=${nowhere}", "inner.name: Interpolation key 'nowhere' not found"),
        ("sources.x.weight=2", "sources.x.path is required: give sources.x.path=VALUE or set it in config=FILE"),
    ],
)
def test_a_mistake_is_refused_by_name(argument: str, message: str) -> None:
    assert message in refusal(argument)


def test_a_mistake_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    cases = {
        "inner: {width: x}": f"config={path}: inner.width='x': expected int",
        "iner: {width: 1}": f"config={path}: unknown key 'iner.width'; did you mean 'inner.width'?",
        "[1, 2]": f"config={path}: expected a mapping of keys to values",
        "a: [": f"config={path}: not readable as YAML",
        "seed: !!python/object/apply:os.getpid []": f"config={path}: not readable as YAML",
        "7": f"config={path}",
    }
    for text, message in cases.items():
        assert message in refusal(yaml_file(path, text)), text
    path.write_bytes(b"\xff\xfe\x00")
    assert f"config={path}: not readable as YAML" in refusal(f"config={path}")
    with pytest.raises(FileNotFoundError, match=r"config=.*none.yaml: no such file"):
        load(f"config={tmp_path / 'none.yaml'}")
    assert load(yaml_file(path, "")) == load()  # an empty file sets nothing


def test_null_leaves_out_what_a_layer_below_names(tmp_path: Path) -> None:
    base = yaml_file(tmp_path / "1.yaml", "sources: {a: {path: p, weight: 2}, b: {path: q}}\nlabels: {x: y, z: w}\n")
    assert load(base, "labels={v: y}").labels == {"v": "y"}, "a whole mapping replaces that of a file"
    assert load(base, "labels={v: y}", "labels.u=t").labels == {"v": "y", "u": "t"}
    assert load(base, "labels.x=w").labels == {"x": "w", "z": "w"}
    assert load(base, "sources.a=null", "sources.c.path=r", "labels.x=null") == Config(
        run_dir="run", sources={"b": Source(path="q"), "c": Source(path="r")}, labels={"z": "w"}
    )
    assert load(base, "sources.a=null", "sources.a.path=r").sources["a"] == Source(path="r")  # nothing of the old one
    assert load(base, "sources=null", "labels=null") == load()
    above = yaml_file(tmp_path / "2.yaml", "sources: {a: null, d: {path: s}}\nlabels: ~\n")
    assert load(base, above) == Config(run_dir="run", sources={"b": Source(path="q"), "d": Source(path="s")})
    assert "sources.e=null removes an entry that does not exist; there is a, b" in refusal(base, "sources.e=null")
    assert load("labels.x=").labels == {"x": ""}  # empty is a text


def test_names_are_what_is_written_whatever_yaml_takes_them_for(tmp_path: Path) -> None:
    names = ("no", "on", "yes", "1", "1.0", "null", "2024-01-01", "0x1f")
    written = "".join(f"  {name}: {{path: p}}\n" for name in names)
    assert tuple(load(yaml_file(tmp_path / "c.yaml", f"sources:\n{written}")).sources) == names
    assert tuple(load("sources={no: {path: p}, 1: {path: q}}").sources) == ("no", "1")
    merged = yaml_file(tmp_path / "d.yaml", "sources: {a: &a {path: p, weight: 3}, on: {<<: *a, path: q}}\n")
    assert load(merged).sources["on"] == Source(path="q", weight=3.0)


def test_a_lone_value_is_a_list_of_one(tmp_path: Path) -> None:
    assert load("inputs=a: b, c", "sizes=5") == load("inputs=['a: b, c']", "sizes=[5]")
    assert load("inputs={000..099}.tar").inputs == ["{000..099}.tar"]
    assert load(yaml_file(tmp_path / "c.yaml", "inputs: a\nsizes: 5\n")) == load("inputs=[a]", "sizes=[5]")


def test_home_and_variables_are_expanded_in_paths_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/$me")
    monkeypatch.delenv("NOWHERE", raising=False)
    url = "s3://$bucket/~x"
    paths = yaml_file(tmp_path / "c.yaml", "run_dir: ~/run\nfolders: {a: $SCRATCH}\nsources: {a: {path: ~/$SCRATCH}}\n")
    config = load_config(
        Config, [paths, f"inputs=[{url},~/,a~/b,$SCRATCH/c.tar]", "labels.x=~/$SCRATCH", "inner.name=$5"]
    )
    assert config == Config(
        run_dir="/home/me/run",
        inputs=[url, "/home/me/", "a~/b", "/scratch/$me/c.tar"],
        folders={"a": "/scratch/$me"},
        sources={"a": Source(path="/home/me//scratch/$me")},
        labels={"x": "~/$SCRATCH"},
        inner=Inner(name="$5"),
    )
    assert load_config(Config, [paths], expand=False).run_dir == "~/run"
    assert "folders.a=$NOWHERE/x: $NOWHERE is not set in the environment" in refusal("folders.a=$NOWHERE/x")
    assert "no such user here" in refusal("run_dir=~nobody-of-this-name/x")
    assert "an environment variable is written $NAME" in refusal("run_dir=${SCRATCH}/x")


def test_a_missing_value_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"run_dir is required: give run_dir=VALUE or set it in config=FILE"):
        load_config(Config, [])


def test_help_lists_every_option_with_its_comment() -> None:
    text = help_text("python -m train.x", "Do something.", Config)
    assert text.startswith(
        "usage: python -m train.x [--help | --resolve] [config=FILE.yaml] [key=value ...]\n\nDo something.\n"
    )
    assert list(options(Config)) == [
        ("run_dir", "str", "(required)", "folder of the run"),
        ("seed", "int", "0", "of everything"),
        ("kind", "Literal['one', 'two']", "one", "which"),
        ("sizes", "tuple[int, ...]", "(1, 2)", "a few"),
        ("pair", "tuple[int, int] | None", "None", "two"),
        ("inputs", "list[str]", "[]", "files"),
        ("fast", "bool", "False", "or slow"),
        ("labels", "dict[str, str]", "{}", "by name"),
        ("folders", "dict[str, str]", "{}", "by name"),
        ("inner.width", "int", "3", "units, > 0"),
        ("inner.share", "float", "0.5", "Of what is kept, in [0, 1]."),
        ("inner.name", "str | None", "None", "null: none"),
        ("sources", "name: settings", "{}", "data sets by name"),
        ("sources.NAME.path", "str | None", "(required)", "folder of the source"),
        ("sources.NAME.weight", "float", "1.0", "share of all tokens"),
    ]
    for key, type_name, default, comment in options(Config):
        assert f"  {key}: {type_name} = {default}\n      {comment}" in text


def programs() -> list[str]:
    files = sorted((ROOT / "train").glob("*.py"))
    return [path.stem for path in files if '__name__ == "__main__"' in path.read_text()]


@pytest.mark.parametrize("name", programs())
def test_every_option_of_every_program_is_explained(name: str) -> None:
    schema = importlib.import_module(f"train.{name}").CONFIG
    assert [key for key, _, _, comment in options(schema) if not comment] == []


# Texts that are not paths: `~` and `$NAME` are not expanded in them.
TEXTS = {
    *("weights", "guide_weights", "init_weights", "device", "prompt", "prompts", "ask", "preview.prompts", "title"),
    *("gpu", "log.project"),
    *("checkpoint.best_metric", "program", "gpus_per_node", "time", "array", "then", "setup", "env", "sbatch"),
    *("text_key", "special", "model.lora.parameters", "optim.groups.parameters"),
    *("captioning.split", "generation.split", "answers.template", "host"),
}


def hints(schema: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, type) of each leaf, with the mark of a path."""
    for name, hint in get_type_hints(schema, include_extras=True).items():
        inner = get_args(hint)[1] if get_origin(hint) is dict else hint
        if dataclasses.is_dataclass(inner):
            yield from hints(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(hint)


@pytest.mark.parametrize("name", [*(f"train.{name}" for name in programs()), "slurm.launch"])
def test_every_text_among_the_options_is_a_path_or_is_not(name: str) -> None:
    """An option that names a file but is not a Location would create a folder called `~`."""
    for key, hint in hints(importlib.import_module(name).CONFIG):
        assert key in TEXTS or "'path'" in hint or "Literal" in hint or "str" not in hint.replace("dict[str, ", ""), key


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_in_the_repository_loads(path: Path) -> None:
    """The command in its header names the program."""
    command = next(line for line in path.read_text().splitlines() if "-m train." in line)
    name = command.split("-m train.")[1].split()[0]
    load_config(importlib.import_module(f"train.{name}").CONFIG, [f"config={path}"])
    assert {"Purpose", "Hardware", "Expected", "Command"} <= {
        line.removeprefix("# ").split(":")[0] for line in path.read_text().splitlines() if line.startswith("# ")
    }


def test_a_program_ends_with_the_status_of_what_happened(tmp_path: Path) -> None:
    assert say(tmp_path) == (0, "nobody\n", "")
    assert say(tmp_path, "status=75") == (75, "nobody\n", "")
    status, out, _ = say(tmp_path, "--help")
    assert status == 0 and "python -m train.say" in out and "times: int = 1\n      how often" in out
    status, _, error = say(tmp_path, "fail=interrupt")
    assert (status, error) == (130, "train.say: interrupted; the same command continues from here\n")
    status, _, error = say(tmp_path, "fail=bug")
    assert status == 1 and "Traceback" in error


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("fail=value", "train.say: times=1: expected another\n"),
        ("fail=file", "train.say: data folder a does not exist\n"),
        ("nam=1", "train.say: command line: unknown key 'nam'; did you mean 'name'? (--help lists the keys)\n"),
    ],
)
def test_a_refusal_is_one_message_without_a_traceback(tmp_path: Path, argument: str, message: str) -> None:
    assert say(tmp_path, argument) == (2, "", message)
    assert say(tmp_path, argument, RANK="3") == (2, "", f"[rank 3] {message}")
    assert "Traceback" in say(tmp_path, argument, TRACEBACK="1")[2]


def test_every_dataclass_of_options_is_frozen_and_keyword_only() -> None:
    """STYLE.md, config: checked in the sources."""
    for package in ("data", "model", "train"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                    assert "frozen=True, kw_only=True" in ast.unparse(node.decorator_list[0]), f"{path}: {node.name}"


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e39"])
def test_a_number_that_is_not_finite_in_float32_is_refused_by_name(value: str) -> None:
    with pytest.raises(ValueError, match=r"rate=.*: expected a finite number"):
        load_config(_Extremes, [f"rate={value}"])
    with pytest.raises(ValueError, match=r"count=.*: expected a finite number"):
        load_config(_Extremes, [f"count={1 << 63}"])


@dataclass(frozen=True, kw_only=True)
class _Extremes:
    rate: float = 1.0
    count: int = 1
