"""The stored snippets are the document's, and the replacement tool changes what it lists and nothing else."""

from pathlib import Path

import pytest
from tests.document.cases import CASES, COUNTS, SD15, SHIPPED, TINY, Setting, model_id, source_of
from tests.document.snippets import Replacement, check_replaced, extract, replaced, stored

DOCUMENT = Path(__file__).parents[3] / "shared" / "reference" / "reduce_memory.md"
MODEL = Path("/models/one")
MARKDOWN = """# Title
```console
# no heading
```
## First
<!-- run -->
```python
a = 1
```
<!-- run -->

```Python
b = 2  # ``` stays
```
```
plain
```
"""


@pytest.mark.skipif(not DOCUMENT.is_file(), reason=f"{DOCUMENT} is not there")
def test_the_stored_snippets_are_the_documents():
    found = extract(DOCUMENT.read_bytes().decode())
    assert [(one.heading, one.code) for one in stored()] == [(one.heading, one.code) for one in found]


def test_extraction():
    first, second = extract(MARKDOWN)
    assert (first.heading, first.code, first.line, first.is_run) == ("First", "a = 1\n", 8, True)
    assert (second.heading, second.code, second.line, second.is_run) == ("First", "b = 2  # ``` stays\n", 13, False)
    with pytest.raises(ValueError, match="line 2 on is not closed"):
        extract("text\n```python\na = 1\n")


def test_every_snippet_is_run():
    run = [step.number for steps in CASES.values() for step in steps]
    assert sorted(run) == list(range(len(stored())))


@pytest.mark.parametrize("number", COUNTS)
def test_with_a_gpu_the_import_name_and_the_model_id_change_alone(number):
    source = source_of(number, Setting(MODEL, "cuda"))
    before = stored()[number].code
    assert source.replace('"/models/one"', model_id(number)) == before.replace("diffusers", "lowtide")


@pytest.mark.parametrize("table", [{}, TINY, SHIPPED, SD15], ids=["none", "tiny", "shipped", "sd15"])
def test_without_a_gpu_no_snippet_asks_for_one(table):
    for number in COUNTS:
        source = source_of(number, Setting(MODEL, "cpu", table))
        compile(source, f"snippet {number}", "exec")
        assert "cuda" not in source.replace("torch.cuda.max_memory_allocated()", "")  # which answers 0 without one
        assert "diffusers" not in source


def test_every_replacement_has_a_reason():
    assert all(one.why for table in (TINY, SHIPPED, SD15) for several in table.values() for one in several)


@pytest.mark.parametrize(
    ("old", "count", "found"), [("cuda", 1, 0), ("run", 1, 2), ("run", 3, 2), ("run", 0, 2)], ids=str
)
def test_a_replacement_that_is_not_there_so_often_is_refused(old, count, found):
    with pytest.raises(ValueError, match=f"stands there {found} times, not {count}"):
        replaced("run(); run()\n", [Replacement(old, "x", count, "")])


def test_a_replacement_may_not_change_what_another_one_wrote():
    table = [Replacement("one", "two", 1, ""), Replacement("two", "three", 1, "")]
    with pytest.raises(ValueError, match="more than the replacements has changed"):
        replaced("one + two\n", table)


@pytest.mark.parametrize("after", ["x()\n\n", "x()", "x( )\n", "y()\n", "f()\n"])
def test_whatever_else_has_changed_is_seen(after):
    table = [Replacement("f", "x", 1, "")]
    check_replaced("f()\n", "x()\n", table)
    with pytest.raises(ValueError, match="more than the replacements has changed"):
        check_replaced("f()\n", after, table)
