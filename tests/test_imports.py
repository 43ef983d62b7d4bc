"""Imports go one way, programs are imported by nobody, and importing does nothing. Read from the sources' ASTs."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSE = ("data", "model", "train", "slurm", "bench", "tests")
PROGRAMS = {
    *("pretrain", "vae", "tokenizer", "encode", "scenes", "sample"),
    *("evaluate", "plan", "export", "view", "report", "demo", "serve"),
}
MAY_IMPORT = {
    "data": {"data"},
    "model": {"model"},
    "train": {"train", "data", "model"},
    "slurm": {"slurm", "train", "data"},
    "bench": {"bench", "train", "data", "model"},
}
# What a package knows nothing of: DESIGN.md, the house.
FOREIGN = {
    "data": ("torch.distributed",),
    "model": ("torch.distributed", "logging", "time", "omegaconf", "wandb"),
}
# The rooms of train/: what each may import of the others, and of the files that lie beside them.
EVERYWHERE = {"config", "console", "flops", "hardware", "nested", "step"}
ROOMS = {
    "distributed": set(),
    "encoding": {"distributed"},
    "evaluation": {"distributed", "optim", "checkpoints", "pretrain_config", "inference", "output_folder"},
    "optim": {"distributed"},
    "checkpoints": {"distributed"},
    "inference": {"distributed", "optim", "checkpoints", "pretrain_config", "llm_folder"},
    "planning": {"distributed", "optim", "checkpoints", "pretrain_config", "llm_folder"},
    "serving": {"distributed", "pretrain_config", "inference"},
    "pages": {
        *("distributed", "optim", "checkpoints", "pretrain_config", "inference", "planning", "evaluation"),
        "config_layers",
    },
}
FILES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports_of(path: Path) -> list[str]:
    """Return the dotted name of everything a file imports, inside functions and for type checking too."""
    names = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def is_main_or_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "__name__ == '__main__'")


def test_imports_go_one_way() -> None:
    for path in FILES:
        package = name_of(path).split(".")[0]
        for imported in imports_of(path):
            top, said = imported.split(".")[0], f"{name_of(path)} imports {imported}"
            assert top not in HOUSE or top in MAY_IMPORT[package], said
            assert not any(f"{imported}.".startswith(f"{foreign}.") for foreign in FOREIGN.get(package, ())), said
            if package == "slurm" and top != "slurm":
                assert imported.startswith(("train.config", "data.durable")) or top not in HOUSE, said


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_lies_below_them(room: str) -> None:
    """So each can be read, tested and replaced alone."""
    for path in sorted((ROOT / "train" / room).glob("*.py")):
        for imported in imports_of(path):
            package, _, rest = imported.partition(".")
            below = rest.split(".")[0]
            assert package != "train" or below in {room} | ROOMS[room] | EVERYWHERE, f"{name_of(path)} <- {imported}"


def test_every_folder_of_train_is_a_room() -> None:
    assert {path.parent.name for path in (ROOT / "train").glob("*/*.py")} == ROOMS.keys()


def test_nobody_imports_a_program() -> None:
    for path in FILES:
        for imported in imports_of(path):
            parts, said = imported.split("."), f"{name_of(path)} imports {imported}"
            assert parts[0] != "train" or len(parts) == 1 or parts[1] not in PROGRAMS, said


def test_importing_a_module_does_nothing() -> None:
    """Only definitions, constants and imports stand at the top level."""
    quiet = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.ClassDef)
    quiet += (ast.FunctionDef, ast.AsyncFunctionDef)
    for path in FILES:
        for node in tree_of(path).body:
            if isinstance(node, quiet) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                continue
            allowed = isinstance(node, ast.If) and is_main_or_type_checking(node.test)
            assert allowed, f"{name_of(path)}:{node.lineno}: {ast.unparse(node)[:80]}"


def test_programs_are_verbs_in_train_with_a_main() -> None:
    """Each takes its arguments, has a config whose comments are its help, and says what it does."""
    found = {path.stem for path in (ROOT / "train").glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert found <= PROGRAMS
    for name in found:
        tree = ast.parse((ROOT / "train" / f"{name}.py").read_text())
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert [argument.arg for argument in functions["main"].args.args] == ["argv"], name
        assert any(isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "CONFIG" for n in tree.body), name
        assert ast.get_docstring(tree), name


def test_there_is_no_attic() -> None:
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "common", "misc")]
