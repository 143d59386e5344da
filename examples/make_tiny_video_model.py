"""Write a CogVideoX checkpoint of a few random weights (10 MB), to try video commands without a large download.

    python examples/make_tiny_video_model.py tiny-video
    lowtide generate --video "waves" --model tiny-video --steps 4 --sheet

Its videos are coloured noise, because nothing was trained.
"""

import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

import lowtide

TEXT_WIDTH, TOKENS = 32, 226
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()-▁"


def tokenizer() -> T5TokenizerFast:
    """A tokenizer with one token for each letter."""
    entries = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -1.0) for letter in LETTERS)]
    letters = Tokenizer(models.Unigram(entries, unk_id=2))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    letters.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    with tempfile.TemporaryDirectory() as folder:
        letters.save(f"{folder}/tokenizer.json")
        return T5TokenizerFast.from_pretrained(folder, extra_ids=0, model_max_length=TOKENS)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tiny-video")
    torch.manual_seed(0)
    words = tokenizer()
    text = T5Config(
        vocab_size=len(words), d_model=TEXT_WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    vae = lowtide.AutoencoderKLCogVideoX.from_config(
        {"block_out_channels": [32, 32, 32, 64], "norm_num_groups": 8, "layers_per_block": 1, "scaling_factor": 0.7}
    )
    transformer = lowtide.CogVideoXTransformer3DModel.from_config(
        {
            "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 3, "time_embed_dim": 64,
            "text_embed_dim": TEXT_WIDTH, "max_text_seq_length": TOKENS, "sample_height": 12, "sample_width": 16,
            "sample_frames": 17, "use_rotary_positional_embeddings": True,
        }
    )  # fmt: skip
    scheduler = lowtide.CogVideoXDPMScheduler.from_config(
        {
            "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "snr_shift_scale": 1.0,
            "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
        }
    )  # fmt: skip
    lowtide.CogVideoXPipeline(
        tokenizer=words, text_encoder=T5EncoderModel(text).eval(), vae=vae.eval(), transformer=transformer.eval(),
        scheduler=scheduler,
    ).save_pretrained(folder)  # fmt: skip
    print(folder)


if __name__ == "__main__":
    main()
