"""The page that says where things are says what the tree is; packages and files keep to their sizes."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "lowtide"
FILES = sorted(SOURCE.rglob("*.py"))
SAY_NOTHING = {"brief", "words", "rests", "twin", "tidy", "view", "gather", "flow", "outlook", "meant", "dry"} | {
    "origins", "small", "look", "made",
}  # fmt: skip


def lines(file):
    return len(file.read_text(encoding="utf-8").splitlines())


def test_the_page_is_as_the_tree_is():
    done = subprocess.run([sys.executable, ROOT / "scripts/structure", "--check"], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_the_check_sees_a_file_that_is_not_on_the_page(tmp_path):
    for name in ("scripts", "docs"):
        (tmp_path / name).mkdir()
    (tmp_path / "src").symlink_to(ROOT / "src")
    (tmp_path / "scripts/structure").write_text((ROOT / "scripts/structure").read_text())
    (tmp_path / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    page = (ROOT / "docs/structure.md").read_text()
    (tmp_path / "docs/structure.md").write_text(page.replace("| `planner.py` |", "| `planers.py` |"))
    command = [sys.executable, tmp_path / "scripts/structure", "--check"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 1


@pytest.mark.parametrize("page", ["docs/structure.md", "docs/decisions.md", "CONTRIBUTING.md"])
def test_files_that_pages_name_are_there(page):
    named = re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py|(?:[a-z_]+/)+)`", (ROOT / page).read_text(encoding="utf-8"))
    assert named
    missing = [name for name in named if not (SOURCE / name).exists() and not (ROOT / name).exists()]
    assert not missing


def test_no_file_is_long_and_no_package_is_most_of_the_code():
    assert [file for file in FILES if lines(file) > 350] == []
    sizes = Counter()
    for file in FILES:
        sizes[file.relative_to(SOURCE).parts[0]] += lines(file)
    largest, size = sizes.most_common(1)[0]
    assert size <= 0.15 * sum(sizes.values()), largest


def test_names_of_files_say_what_is_in_them_and_are_not_shared():
    names = Counter(file.name for file in FILES if file.stem not in ("__init__", "__main__"))
    assert [name for name, count in names.items() if count > 1] == []
    assert not SAY_NOTHING & {file.stem for file in FILES}


def test_nothing_is_planned_or_fitted_by_the_name_of_a_component():
    files = [*(SOURCE / "fitting").glob("*.py"), *(SOURCE / "planning").glob("*.py")]
    words = {file.name: set(re.findall(r"\b(?:vae|unet|text_encoder)\b", file.read_text())) for file in files}
    assert {name: found for name, found in words.items() if found} == {}


def test_every_file_says_what_it_is_for():
    assert [file for file in FILES if ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) is None] == []


def test_tests_are_collected_where_not_everything_is_installed():
    """As on a machine with a GPU on which `make gpu` runs: one file that cannot be imported would stop all of them."""
    absent = {"av", "diffusers", "gguf", "peft"}
    assert [file for file in (ROOT / "tests").rglob("*.py") if absent & set(imported(file))] == [], "importorskip does"


def imported(file):
    """The packages that a file imports when it is imported itself."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (name.partition(".")[0] for name in names)
