"""The order of the modules, and the rules that a program can check."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

# Left to right: a module or subpackage of transplant_hf imports only from those to its left.
MODULES = (
    "errors",
    "numeric",  # numbers as users write them
    "display",  # sizes, tables and progress bars for a person
    "layer_map",
    "recipient_fields",
    "config",
    "heads",  # names of Auto classes; up to here pure: what reads or writes files stands to the right
    "storage",
    "cards",  # model cards, from facts that others hand over
    "sources",
    "hub",
    "architecture",
    "pt_files",
    "donor",
    "compatibility",
    "splice",
    "model",
    "registration",
    "exporting",  # a transplant as files that load without this package
    "serving",  # transplants in engines that build their own models
    "pushing",  # what is on disk, checked and uploaded
    "export",  # old names of the two, for one release
    "conversion",
    "inspection",
    "texts",  # from words to blocks of tokens: knows no model
    "partial",  # some layers of a model, from a hidden state that was computed before
    "evaluation",
    "signing",  # what the text of a donor's domain looks like
    "generation",  # text with donors and without
    "training",
    "planning",  # the memory that a transplant or a training run needs, from headers alone
    "comparison",
    "plots",
    "demo",
    "cli",
)
# Modules that may use the public names as a user would: `from transplant_hf import Donor`.
USERS = ("demo", "cli")
MOST_LINES = 450

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "transplant_hf"
FILES = sorted(PACKAGE.rglob("*.py"))


class Import(NamedTuple):
    """An import of something inside the package; the module is "" for the package's own names."""

    module: str
    line: int


def modules_on_disk(package: Path) -> set[str]:
    names = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    return names | {path.parent.name for path in package.glob("*/*.py")}


def module_of(path: Path, package: Path) -> str:
    """The module a file is in; "" for files of the package itself, such as its `__init__.py`."""
    first = path.relative_to(package).parts[0]
    name = first.removesuffix(".py")
    return "" if name in ("__init__", "__main__") else name


def imports_that_run(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import statement, in functions too, but for those that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from imports_that_run(ast.Module([other], []))
        else:
            yield from imports_that_run(child)


def imports_of(path: Path, package: Path) -> Iterator[Import]:
    """What a file imports from the package, one entry for each name."""
    here = (package.name, *path.relative_to(package).parts[:-1])
    for statement in imports_that_run(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in statement.names]
        if isinstance(statement, ast.Import):
            targets = [name.split(".") for name in names]
        else:
            base = list(here[: len(here) + 1 - statement.level]) if statement.level else []
            base += statement.module.split(".") if statement.module else []
            targets = [[*base, name] for name in names]
        for target in targets:
            if target[0] != package.name:
                continue
            name = target[1] if len(target) > 1 else ""
            if name.startswith("__"):  # `from transplant_hf import __version__`
                continue
            yield Import(name if name in modules_on_disk(package) else "", statement.lineno)


def wrong_imports(package: Path, modules: tuple[str, ...] = MODULES) -> list[str]:
    """Say of every import that points to the right what to do about it."""
    problems = []
    for path in sorted(package.rglob("*.py")):
        module = module_of(path, package)
        if module not in modules:  # the package's own files, or a module that unknown_modules() reports
            continue
        for target, line in imports_of(path, package):
            place = f"{path.relative_to(package.parent).as_posix()}:{line}"
            if not target:
                if module not in USERS:
                    problems.append(f"{place}: import from the module that defines the name, not {package.name} itself")
            elif target in modules and modules.index(target) > modules.index(module):
                problems.append(
                    f"{place}: {module} imports {target}, which stands to its right. Move what both need "
                    f"to the left of {module}, or hand it over as an argument"
                )
    return problems


def unknown_modules(package: Path, modules: tuple[str, ...] = MODULES) -> list[str]:
    return [
        f"transplant_hf/{name} has no place in the order: add {name!r} to MODULES at the top of "
        "tests/test_import_layers.py, right of all that it imports and left of all that imports it"
        for name in sorted(modules_on_disk(package) - set(modules))
    ]


def broad_handlers(tree: ast.AST) -> Iterator[int]:
    """Lines of `except:`, `except Exception` and `suppress(Exception)`."""
    broad = {"Exception", "BaseException"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "suppress":
            caught = node.args
        else:
            continue
        if any(item is None or ast.unparse(item).split(".")[-1] in broad for item in caught):
            yield node.lineno


def loads_that_unpickle(tree: ast.AST) -> Iterator[int]:
    """Lines of `torch.load(...)` without `weights_only=True`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if safe.get("weights_only") != "True":
                yield node.lineno


def test_a_module_imports_only_from_its_left() -> None:
    problems = wrong_imports(PACKAGE)
    assert not problems, "\n".join(problems)


def test_every_module_has_its_place() -> None:
    problems = unknown_modules(PACKAGE)
    assert not problems, "\n".join(problems)


def test_no_utils_module() -> None:
    names = [path.relative_to(REPOSITORY).as_posix() for path in FILES if path.name == "utils.py"]
    assert not names, f"{names}: name the module after its one job"


def test_no_file_is_too_long() -> None:
    lines = {path.relative_to(REPOSITORY).as_posix(): len(path.read_bytes().splitlines()) for path in FILES}
    long = {name: count for name, count in lines.items() if count > MOST_LINES}
    assert not long, f"{long}: over {MOST_LINES} lines, split it"


@pytest.mark.parametrize(
    ("find", "advice"),
    [
        (broad_handlers, "catch what you can name"),
        (loads_that_unpickle, "torch.load can run code from the file; say weights_only=True"),
    ],
)
def test_no_file_has(find: Callable[[ast.AST], Iterator[int]], advice: str) -> None:
    places = [
        f"{path.relative_to(REPOSITORY).as_posix()}:{line}: {advice}"
        for path in FILES
        for line in find(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not places, "\n".join(places)


# Registering with the Auto classes needs the Auto classes, and a config class; these import torch. Anything
# beyond them (PreTrainedModel, an architecture) would more than double the time that the import takes.
IMPORT_PROBE = """
import json, sys
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
before, verbosity = set(sys.modules), transformers.logging.get_verbosity()
import transplant_hf
assert transformers.logging.get_verbosity() == verbosity
added = sorted(name for name in set(sys.modules) - before if name.split(".")[0] in ("torch", "transformers"))
with open(sys.argv[1], "w") as file:
    json.dump({"added": added, "file": transplant_hf.__file__}, file)
"""


def test_importing_is_quiet_and_loads_no_model_code(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_PROBE, str(result)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert (run.stdout, run.stderr) == ("", "")
    found = json.loads(result.read_text())
    assert Path(found["file"]) == PACKAGE / "__init__.py"
    assert not found["added"], (
        f"import transplant_hf also imports {found['added'][:20]}: import them where they are used"
    )


# Packages whose name on the index is another one; and those that are used only where somebody has installed them.
DISTRIBUTIONS = {"yaml": "pyyaml"}
IF_INSTALLED = {"liger_kernel", "vllm"}


def test_what_is_imported_is_declared() -> None:
    """A package that only comes with another one may be gone with the next version of that."""
    declared = set(re.findall(r'^ +"([a-z0-9_-]+)[><\[]', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE))
    extras = re.findall(r'^\w+ = (\[".*\])$', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    declared |= {re.split(r"[><\[]", name)[0] for extra in extras for name in json.loads(extra)}
    imported = {
        name.partition(".")[0]
        for path in FILES
        for node in imports_that_run(ast.parse(path.read_text(encoding="utf-8")))
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        if isinstance(node, ast.Import) or not node.level
    }
    others = imported - set(sys.stdlib_module_names) - {PACKAGE.name} - IF_INSTALLED
    assert {DISTRIBUTIONS.get(name, name) for name in others} - declared == set()


# The checks themselves, on a small package.


@pytest.fixture
def small_package(tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    def make(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / "transplant_hf" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "transplant_hf"

    return make


SMALL = {
    "__init__.py": "from .cli import main",
    "errors.py": "",
    "config.py": "from .errors import TransplantError",
    "donor/__init__.py": "from .tensors import read",
    "donor/tensors.py": "import json\nimport torch.nn\nfrom ..config import a\nfrom . import other",
    "donor/other.py": "from .. import __version__, errors",
    "model/__init__.py": "import transplant_hf.donor.tensors\nfrom transplant_hf.config import a",
    "cli.py": "from transplant_hf import Donor\nfrom .model import x",
}


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("errors.py", "from .config import a", "errors.py:1: errors imports config"),
        ("errors.py", "from . import config", "errors.py:1: errors imports config"),
        ("errors.py", "import transplant_hf.config as c", "errors.py:1: errors imports config"),
        ("donor/other.py", "from ..model import x", "donor/other.py:1: donor imports model"),
        ("donor/other.py", "from ..model.parts import x", "donor/other.py:1: donor imports model"),
        ("donor/other.py", "from .. import errors, model", "donor/other.py:1: donor imports model"),
        (
            "donor/__init__.py",
            "from transplant_hf.model import x",
            "donor/__init__.py:1: donor imports model",
        ),
        ("donor/other.py", "def f():\n    from ..cli import x", "donor/other.py:2: donor imports cli"),
        (
            "donor/other.py",
            "try:\n    from ..cli import x\nexcept ImportError:\n    x = 1",
            "donor imports cli",
        ),
        (
            "donor/other.py",
            "if TYPE_CHECKING:\n    pass\nelse:\n    from ..cli import x",
            "donor imports cli",
        ),
        ("donor/other.py", "from .. import Donor", "not transplant_hf itself"),
        ("donor/other.py", "import transplant_hf", "not transplant_hf itself"),
        ("donor/other.py", "if TYPE_CHECKING:\n    from ..cli import x", None),
        ("donor/other.py", "if typing.TYPE_CHECKING:\n    from ..cli import x", None),
        ("donor/other.py", "import transplant_hf_extras, cli\nfrom cli import x", None),
    ],
)
def test_the_check_sees_it(
    small_package: Callable[[dict[str, str]], Path], name: str, text: str, problem: str | None
) -> None:
    assert wrong_imports(small_package(SMALL)) == []
    found = wrong_imports(small_package({name: text}))
    if problem is None:
        assert found == []
    else:
        assert len(found) == 1
        assert problem in found[0]


def test_a_module_without_a_place_is_named(small_package: Callable[[dict[str, str]], Path]) -> None:
    package = small_package({**SMALL, "cellar/__init__.py": "", "attic.py": ""})
    found = unknown_modules(package)
    assert len(found) == 2
    assert all("tests/test_import_layers.py" in text for text in found)
    assert "'attic'" in found[0]
    assert "'cellar'" in found[1]


@pytest.mark.parametrize(
    ("find", "text", "lines"),
    [
        (broad_handlers, "try:\n    f()\nexcept:\n    pass", [3]),
        (broad_handlers, "try:\n    f()\nexcept Exception as error:\n    pass", [3]),
        (broad_handlers, "try:\n    f()\nexcept (ValueError, builtins.BaseException):\n    pass", [3]),
        (broad_handlers, "with contextlib.suppress(Exception):\n    f()", [1]),
        (broad_handlers, "try:\n    f()\nexcept (OSError, ValueError):\n    pass", []),
        (loads_that_unpickle, "torch.load(path)", [1]),
        (loads_that_unpickle, "torch.load(path, weights_only=False)", [1]),
        (loads_that_unpickle, "torch.load(path, weights_only=True, mmap=True)", []),
    ],
)
def test_the_house_rules_see_it(find: Callable[[ast.AST], Iterator[int]], text: str, lines: list[int]) -> None:
    assert list(find(ast.parse(text))) == lines
