"""A model in one file that is served: what it makes is told, and requests are planned, from its header alone."""

import torch
from tests.guests.single_file_cases import reading_no_weights
from tests.loading.original_files import published_shapes, write_sparse

from lowtide.serve.served_model import ServedModel


def test_a_file_of_stable_diffusion_is_served(tmp_path):
    file = write_sparse(published_shapes("sd1"), tmp_path / "model.safetensors")
    with reading_no_weights():
        model = ServedModel(str(file), torch.device("cpu"), "float32", tmp_path, "model")
        about = model.about()
    assert model.is_ours
    assert (about["kind"], about["size"]) == ("StableDiffusionPipeline", {"width": 512, "height": 512})
