"""Tiny video models and pipelines, as `tests.tiny` has them for pictures."""

from __future__ import annotations

import io
import json
from pathlib import Path

from tests import tiny
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from lowtide.models.t5 import T5EncoderModel
from lowtide.models.tokenizers import T5Tokenizer
from lowtide.models.video_transformer import CogVideoXTransformer3DModel
from lowtide.models.video_vae import AutoencoderKLCogVideoX
from lowtide.pipelines.cogvideox import CogVideoXPipeline
from lowtide.schedulers import SCHEDULERS

MAX_TOKENS = 10
TEXT_WIDTH = 16
TEXT = {
    "d_model": TEXT_WIDTH,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 3,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,  # so in the published configurations, and the class ties them all the same
}
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": TEXT_WIDTH,
    "num_layers": 2,
    "sample_width": 6,
    "sample_height": 4,
    "sample_frames": 9,
    "max_text_seq_length": MAX_TOKENS,
}
TRANSFORMERS = {
    "2b": TRANSFORMER,
    "5b": {**TRANSFORMER, "use_rotary_positional_embeddings": True},
    "1.5": {**TRANSFORMER, "use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False},
}
"""Two layers as published: with sines added to the input, with rotary positions, and of two frames a patch."""
VAE = {
    "block_out_channels": [8, 8, 8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "latent_channels": 4,
    "sample_height": 32,
    "sample_width": 48,
    "scaling_factor": 0.7,
}
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
}
SENTENCE = "a panda in a red jacket plays the guitar near some bamboo while others watch the sea and a boat at night"
SENTINELS = [f"<extra_id_{n}>" for n in range(100)]
SPECIAL = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def text_encoder(vocabulary=200):
    """A T5 text encoder, ready to compute."""
    model = tiny.set_weights(T5EncoderModel.from_config({**TEXT, "vocab_size": vocabulary}))
    for block in model.encoder.block:
        block.layer[0].SelfAttention.q.weight.mul_(TEXT["d_kv"] ** -0.5)  # T5 has this in its weights
    return model


def write_pieces(folder: Path, **config):
    """Write the files of a T5 tokenizer as CogVideoX is published: `spiece.model`, and no `tokenizer.json`."""
    import sentencepiece

    words, pieces = SENTENCE.split(), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words[i:] + words[:i]) for i in range(len(words))]),
        model_writer=pieces,
        vocab_size=70,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(pieces.getvalue())
    write_config(folder, legacy=True, sp_model_kwargs={}, **config)


def write_tokenizer_json(folder: Path, **config):
    """Write the files of a T5 tokenizer as the library `tokenizers` saves it: `tokenizer.json` alone."""
    words = sorted(set(SENTENCE.split()))
    letters = sorted(set(SENTENCE.replace(" ", "")))
    vocabulary = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")] + [("▁", -2.0)]
    vocabulary += [(f"▁{word}", -3.0 - 0.01 * n) for n, word in enumerate(words) if len(word) > 1]
    vocabulary += [(letter, -6.0 - 0.01 * n) for n, letter in enumerate(letters)]
    tokenizer = Tokenizer(models.Unigram([*vocabulary, *((token, 0.0) for token in SENTINELS[::-1])], unk_id=2))
    spaces = {"replacement": "▁", "prepend_scheme": "always"}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**spaces)]
    )
    tokenizer.decoder = decoders.Metaspace(**spaces)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(token) for token in ("<pad>", "</s>", "<unk>", *SENTINELS)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_config(folder, **config)


def write_config(folder: Path, **config):
    """Write the two small files that stand beside either vocabulary; entries of None are left out."""
    entries = {
        **SPECIAL,
        "additional_special_tokens": SENTINELS,
        "extra_ids": 100,
        "model_max_length": MAX_TOKENS,
        "tokenizer_class": "T5Tokenizer",
        **config,
    }
    entries = {key: value for key, value in entries.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(entries), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(SPECIAL), encoding="utf-8")


WRITERS = {"spiece.model": write_pieces, "tokenizer.json": write_tokenizer_json}


def tokenizer(folder: Path):
    """A T5 tokenizer; `folder` keeps its files."""
    write_pieces(folder)
    return T5Tokenizer.from_pretrained(folder)


def transformer(kind="5b", **changes):
    """Our transformer, ready to compute."""
    return tiny.set_weights(CogVideoXTransformer3DModel.from_config({**TRANSFORMERS[kind], **changes}))


def vae(**changes):
    """Our autoencoder, ready to compute."""
    model = tiny.set_weights(AutoencoderKLCogVideoX.from_config({**VAE, **changes}))
    model.decoder.conv_out.conv.weight.mul_(0.3)  # frames that are not black and white
    return model


def scheduler(name="CogVideoXDDIMScheduler", **changes):
    """One of our schedulers, with CogVideoX's schedule."""
    return SCHEDULERS[name].from_config({**SCHEDULE, **changes})


def pipeline(folder: Path, kind="5b", schedule=None, **parts):
    """Our pipeline of tiny parts, 9 frames of 32x48 pixels by default; `folder` keeps the vocabulary."""
    words = tokenizer(folder / "words")
    usual = {
        "tokenizer": words,
        "text_encoder": text_encoder(len(words)),
        "vae": vae(),
        "transformer": transformer(kind),
        "scheduler": schedule or scheduler(),
    }
    pipe = CogVideoXPipeline(**{**usual, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_checkpoint(folder: Path, kind="5b", schedule=None, **options):
    """Write a checkpoint as it is published: the tokenizer's pieces alone."""
    pipe = pipeline(folder.parent / f"{folder.name}-words", kind, schedule)
    pipe.save_pretrained(folder, **options)
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    write_pieces(folder / "tokenizer")
    return folder
