"""`transplant_hf.export` was a sub-package and is a function now: both uses work, in either order."""

from __future__ import annotations

import pytest

from tests.helpers import run_python

FUNCTION = "import transplant_hf; from transplant_hf.exporting import export; transplant_hf.export = export"
OLD_PATH = "from transplant_hf.export import export_transplant, push_artefact, Export, Push"
CHECK = """
import transplant_hf
from transplant_hf.errors import ConfigurationError
from transplant_hf.exporting import export
from transplant_hf.pushing import push

assert export_transplant is export and push_artefact is push
try:
    transplant_hf.export("nowhere/at/all", "out")
except ConfigurationError:
    print("called")
"""


@pytest.mark.parametrize("first", [(FUNCTION, OLD_PATH), (OLD_PATH, FUNCTION), (OLD_PATH,)])
def test_the_function_and_the_old_path(first: tuple[str, ...]) -> None:
    assert run_python("\n".join([*first, CHECK])).split() == ["called"]
