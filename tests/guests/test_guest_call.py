"""What of the arguments of a call decides its memory: of prompts how many tokens the tokenizers make of them."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.guests import guest_tokenizers

from lowtide.guests.guest_call import GuestCall

pytest.importorskip("diffusers")


class Processor:
    """A processor of pictures and words as transformers has them: it takes pictures first."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, images=None, text=None):
        if images is not None:
            raise ValueError(f"Incorrect image source: {images}")
        return self.tokenizer(text)


@dataclass
class Condition:
    """A clip that begins at a frame, as LTX's pipelines take them."""

    frames: Any
    index: int = 0


class Pipeline:
    """A pipeline with one component beside its call."""

    def __init__(self, **components):
        self.components = components

    def __call__(self, prompt, height=64, output_type="pil", conditions=()):
        return prompt


@pytest.mark.parametrize("name", ["tokenizer", "processor"])
def test_a_processor_counts_by_the_tokenizer_in_it(name):
    pipe = Pipeline(**{name: Processor(guest_tokenizers.qwen())})
    call = GuestCall.of(pipe, {"prompt": "a red boat"})
    assert call == GuestCall.of(pipe, {"prompt": "a red sea"})
    assert call != GuestCall.of(pipe, {"prompt": "a red boat on the sea"})


def test_without_a_tokenizer_every_text_is_another():
    assert GuestCall.of(Pipeline(), {"prompt": "a red boat"}) != GuestCall.of(Pipeline(), {"prompt": "a red sea"})


def test_words_that_are_no_prompt_are_not_counted():
    pipe = Pipeline(tokenizer=guest_tokenizers.qwen())
    assert len(pipe.components["tokenizer"]("np")["input_ids"]) == len(pipe.components["tokenizer"]("pt")["input_ids"])
    assert GuestCall.of(pipe, {"output_type": "np"}) != GuestCall.of(pipe, {"output_type": "pt"})
    assert GuestCall.of(pipe, {"output_type": "np"}) == GuestCall.of(pipe, {"output_type": "np"})


def test_clips_inside_of_conditions_are_seen():
    calls = [GuestCall.of(Pipeline(), {"prompt": "", "conditions": [Condition(torch.zeros(frames, 3, 8, 8))]})
        for frames in (1, 9, 9)]  # fmt: skip
    assert calls[0] != calls[1]
    assert calls[1] == calls[2]
