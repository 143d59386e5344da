"""File names of pictures."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide.cli.errors import InputError
from lowtide.cli.pictures import output_paths, slug


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red sailboat, at sunset!", "a-red-sailboat-at-sunset"),
        ("../../etc/passwd", "etc-passwd"),
        ("???", "picture"),
        ("x" * 100, "picture"),
        ("静かな海", "静かな海"),
        ("one two three four five six seven eight nine ten eleven", "one-two-three-four-five-six-seven-eight-nine-ten"),
    ],
)
def test_slug(prompt, name):
    assert slug(prompt) == name


@given(st.text("aZ9é静⛵/\\. _-\0\udce9"))
def test_a_slug_is_a_short_plain_file_name(prompt):
    name = slug(prompt)
    assert 0 < len(name.encode("utf-8", "surrogatepass")) <= 48
    assert not set(name) & set("/\\\0. ")


def test_a_folder_with_a_dot_in_its_name_is_a_folder_when_it_is_there(tmp_path):
    folder = tmp_path / "pictures.v2"
    with pytest.raises(InputError, match=r"\.png"):
        output_paths(folder, "sea", [1])
    folder.mkdir()
    assert output_paths(folder, "sea", [1]) == [folder / "sea-1.png"]


def test_the_suffix_may_be_in_capitals():
    assert output_paths(Path("X.PNG"), "sea", [1]) == [Path("X.PNG")]
