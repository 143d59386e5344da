"""The dtype of a served model: chosen once, and kept over restarts."""

import pytest
import torch
from tests.planning import processors

from lowtide.cli.request import shipped_model
from lowtide.serve.kept_dtype import kept_dtype
from lowtide.serve.served_model import ServedModel

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


def test_a_served_model_computes_in_it_on_a_machine_where_another_is_faster(tmp_path, monkeypatch):
    def served(name):
        return ServedModel(str(shipped_model()), torch.device("cpu"), "auto", tmp_path, name)

    processors.use(monkeypatch, processors.FOR_BFLOAT16)
    assert served("a").dtype == torch.bfloat16
    processors.use(monkeypatch, processors.FOR_FLOAT32)
    assert served("a").dtype == torch.bfloat16
    assert served("new").dtype == torch.float32
