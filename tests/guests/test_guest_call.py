"""What of a call's arguments decides its memory: texts by how many tokens the pipeline's tokenizers make of them."""

import pytest
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


class Pipeline:
    """A pipeline with one component beside its call."""

    def __init__(self, **components):
        self.components = components

    def __call__(self, prompt, height=64):
        return prompt


@pytest.mark.parametrize("name", ["tokenizer", "processor"])
def test_a_processor_counts_by_the_tokenizer_in_it(name):
    pipe = Pipeline(**{name: Processor(guest_tokenizers.qwen())})
    call = GuestCall.of(pipe, {"prompt": "a red boat"})
    assert call == GuestCall.of(pipe, {"prompt": "a red sea"})
    assert call != GuestCall.of(pipe, {"prompt": "a red boat on the sea"})


def test_without_a_tokenizer_every_text_is_another():
    assert GuestCall.of(Pipeline(), {"prompt": "a red boat"}) != GuestCall.of(Pipeline(), {"prompt": "a red sea"})
