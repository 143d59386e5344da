"""What files of weights hold, told by names and shapes."""

import pytest
from tests.loading.original_files import index_of, published_shapes

from lowtide.loading.original_kinds import kind_of
from lowtide.weights.index import CheckpointError

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"


def changed(kind, **shapes):
    return index_of({**published_shapes(kind), **shapes})


def test_stable_diffusion_is_told_by_the_width_of_its_texts():
    first, second = kind_of(changed("sd1")), kind_of(changed("sd2"))
    assert (first.is_ours, first.name, first.configs) == (True, "a Stable Diffusion 1.x model", "stable_diffusion_1")
    assert (second.is_ours, second.name, second.configs) == (True, "a Stable Diffusion 2.x model", "stable_diffusion_2")


def test_what_a_model_predicts_is_told_by_who_asks_or_else_by_the_files_metadata():
    assert kind_of(changed("sd2"), "epsilon").configs == "stable_diffusion_2_base"
    assert kind_of(changed("sd2"), "v_prediction").configs == "stable_diffusion_2"
    said = index_of(published_shapes("sd2"), **{"modelspec.prediction_type": "epsilon"})
    assert kind_of(said).configs == "stable_diffusion_2_base"
    assert kind_of(said, "v_prediction").configs == "stable_diffusion_2"
    assert kind_of(changed("sd1"), "v_prediction").configs == "stable_diffusion_1"
    assert kind_of(changed("sd1")).predicts is None
    assert kind_of(changed("sd1", v_pred=())).predicts == "v_prediction"


@pytest.mark.parametrize(
    ("said", "kind", "channels"),
    [
        ("an inpainting model (Stable Diffusion 1.x model)", "sd1", 9),
        ("an inpainting model (Stable Diffusion 2.x model)", "sd2", 9),
        ("InstructPix2Pix", "sd1", 8),
        ("a depth-to-picture model", "sd2", 5),
        ("an upscaling model", "sd2", 7),
    ],
)
def test_what_reads_more_than_latents_is_named_and_is_not_ours(said, kind, channels):
    found = kind_of(changed(kind, **{CONV_IN: (320, channels, 3, 3)}))
    assert not found.is_ours
    assert said in found.name


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ("an SDXL model", (CONV_IN, "conditioner.embedders.1.model.ln_final.bias")),
        ("an SDXL model", (CONV_IN, "model.diffusion_model.label_emb.0.0.weight")),
        ("an SDXL refiner", (CONV_IN, "conditioner.embedders.0.model.ln_final.bias")),
        ("a Stable Diffusion 3 model", ("model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight",)),
        ("a FLUX model", ("double_blocks.0.img_attn.qkv.weight",)),
        ("a model that Lowtide does not know", ("something.weight",)),
    ],
)
def test_other_models_are_named_and_are_not_ours(said, names):
    found = kind_of(index_of(dict.fromkeys(names, (4, 4))))
    assert (found.name, found.is_ours) == (said, False)


@pytest.mark.parametrize(
    ("said", "names"),
    [
        (
            "is a LoRA, and no model. It changes a model",
            ("lora_unet_mid_block_proj_in.lora_up.weight",),
        ),
        ("is a LoRA", ("unet.down_blocks.0.attn1.to_q.lora_A.weight",)),
        ("is a ControlNet", ("control_model.time_embed.0.weight",)),
        ("is a textual inversion", ("emb_params",)),
        ("is a VAE alone, and no whole model. Give it beside a model: vae=FILE", ("decoder.conv_in.weight",)),
        ("is a VAE alone", ("first_stage_model.decoder.conv_in.weight", "first_stage_model.quant_conv.bias")),
        ("is a U-Net alone", ("input_blocks.0.0.weight", "out.2.bias")),
        ("is a U-Net alone", ("down_blocks.0.resnets.0.conv1.weight", "conv_in.weight")),
        ("is a text encoder alone", ("text_model.embeddings.token_embedding.weight",)),
    ],
)
def test_what_is_no_model_is_an_error_that_says_what_it_is(said, names):
    with pytest.raises(CheckpointError, match=said):
        kind_of(index_of(dict.fromkeys(names, (4, 4))))
