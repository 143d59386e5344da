"""The dtype of a served model: chosen once, and kept over restarts."""

import pytest

from lowtide.serve.kept_dtype import kept_dtype

ABOUT = ["/models/a", "cpu"]


def test_what_was_chosen_stays_whatever_is_fastest_later(tmp_path):
    assert kept_dtype(tmp_path / "notes", "a", ABOUT, lambda: "bfloat16") == "bfloat16"
    assert kept_dtype(tmp_path / "notes", "a", ABOUT, lambda: pytest.fail("chosen again")) == "bfloat16"
    assert kept_dtype(tmp_path / "notes", "b", ABOUT, lambda: None) is None
    assert kept_dtype(tmp_path / "notes", "b", ABOUT, lambda: pytest.fail("chosen again")) is None


def test_another_model_by_that_name_or_another_device_is_chosen_for_anew(tmp_path):
    kept_dtype(tmp_path, "a", ABOUT, lambda: "bfloat16")
    assert kept_dtype(tmp_path, "a", ["/models/a", "cuda"], lambda: "float16") == "float16"
    assert kept_dtype(tmp_path, "a", ["/models/b", "cuda"], lambda: None) is None


@pytest.mark.parametrize("broken", ["", "[]", "{}", '{"about": ["/models/a", "cpu"], "dtype": 3}', "\0"])
def test_a_file_that_is_not_ours_is_written_over(tmp_path, broken):
    (tmp_path / "a.dtype.json").write_text(broken)
    assert kept_dtype(tmp_path, "a", ABOUT, lambda: "float32") == "float32"
    assert kept_dtype(tmp_path, "a", ABOUT, lambda: pytest.fail("chosen again")) == "float32"
