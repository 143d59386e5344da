"""Tiny video models and pipelines, as `tests.tiny` has them for pictures."""

from __future__ import annotations

import io
import json
from pathlib import Path

from tests import tiny
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import T5Config, T5EncoderModel

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
SENTENCE = "a panda in a red jacket plays the guitar near some bamboo while others watch the sea and a boat at night"
SENTINELS = [f"<extra_id_{n}>" for n in range(100)]
SPECIAL = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def text_encoder(vocabulary=200):
    """A T5 text encoder, ready to compute."""
    model = tiny.set_weights(T5EncoderModel(T5Config(**TEXT, vocab_size=vocabulary)))
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
