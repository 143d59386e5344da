"""The Python in our own guides compiles, and runs where `<!-- run -->` stands right above the block.

The blocks of one file run in order, in one namespace, in a folder where `src` is this repository's.
"""

import pytest
from tests.document.processes import ROOT
from tests.document.snippets import RUN, extract

GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL_RUN = ["reduce_memory.md"]
"""Guides of which every block is to run."""
BUDGET = 600  # seconds; a step in bfloat16 takes six of them where a processor multiplies it by loops
"""Seconds for all blocks of one guide."""


COMPILING = "torch.compile("
"""A block with it takes three times as long as all others; `tests/models/test_tracing.py` compiles a tiny network."""
STEPS = "num_inference_steps=5"
"""Of the guides' pictures: each is of one step by default."""


def script_of(guide, *, verbatim=True):
    """The blocks to run, each at its line in the guide, so that errors name that line; empty if there are none."""
    lines = []
    for block in extract(guide.read_text(encoding="utf-8")):
        if block.is_run and (verbatim or COMPILING not in block.code):
            code = block.code if verbatim else block.code.replace(STEPS, "num_inference_steps=1")
            lines += [""] * (block.line - 1 - len(lines)) + code.splitlines()
    return "\n".join(lines)


def run_guide(guide, runner, folder, *, verbatim=True):
    (folder / "src").symlink_to(ROOT / "src", target_is_directory=True)
    return runner.run(script_of(guide, verbatim=verbatim), folder, BUDGET)


def unmarked(guide):
    """Lines of blocks that are not run."""
    return [block.line for block in extract(guide.read_text(encoding="utf-8")) if not block.is_run]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_every_block_compiles(guide):
    for block in extract(guide.read_text(encoding="utf-8")):
        compile("\n" * (block.line - 1) + block.code, str(guide), "exec")


@pytest.mark.parametrize("guide", [one for one in GUIDES if script_of(one)], ids=lambda guide: guide.name)
@pytest.mark.parametrize("verbatim", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_blocks_to_run_do(guide, verbatim, warm, tmp_path):
    run_guide(guide, warm, tmp_path, verbatim=verbatim).check()


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_every_mark_stands_above_a_block(guide):
    text = guide.read_text(encoding="utf-8")
    assert text.splitlines().count(RUN) == sum(block.is_run for block in extract(text))


@pytest.mark.parametrize("name", ALL_RUN)
def test_no_block_is_left_out(name):
    guide = ROOT / "docs" / name
    if not guide.is_file():
        pytest.skip(f"docs/{name} is not there yet")
    assert unmarked(guide) == [], f"{RUN} is missing above the blocks of these lines"


# ---- the tool itself

GUIDE = """# A guide

<!-- run -->
```python
from pathlib import Path
count = len(list(Path("src/lowtide/assets/seascapes").iterdir()))
```

```python
raise SystemExit("this block is not run")
```

<!-- run -->
```python
assert count == COUNT
print("the end")
```
"""


@pytest.fixture
def guide(tmp_path):
    return tmp_path / "guide.md"


def test_blocks_share_names_and_the_unmarked_are_left_out(guide, warm, tmp_path):
    guide.write_text(GUIDE.replace("COUNT", "6"), encoding="utf-8")
    assert run_guide(guide, warm, tmp_path).check() == "the end\n"
    assert unmarked(guide) == [10]


def test_a_block_that_fails_is_named_by_its_line_in_the_guide(guide, warm, tmp_path):
    guide.write_text(GUIDE.replace("COUNT", "7"), encoding="utf-8")
    result = run_guide(guide, warm, tmp_path)
    assert result.status == 1
    assert "line 15" in result.output
    assert "AssertionError" in result.output
