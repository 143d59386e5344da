"""Maps of characters: whatever passes the check can be followed by the library, which panics on others."""

import random

import pytest
from tests import tiny_video
from tokenizers import normalizers

from lowtide.configs import CheckpointError
from lowtide.models import vocabulary
from lowtide.models.character_map import check_character_map
from lowtide.models.protobuf_fields import parts_in

TEXT = "ﬁne ① ｱ½ é Å ㌀ … àÀ " + "".join(map(chr, range(32, 0x3000, 7)))


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The map that SentencePiece makes, and that T5 has."""
    folder = tmp_path_factory.mktemp("pieces")
    tiny_video.write_pieces(folder)
    file = folder / "spiece.model"
    (normalizer,) = parts_in(file, file.read_bytes(), vocabulary.NORMALIZER_FIELD)
    (content,) = parts_in(file, normalizer, vocabulary.MAP_FIELD)
    return content


def passes(content):
    try:
        check_character_map(content, "the map")
    except CheckpointError:
        return False
    return True


def test_the_usual_map(usual):
    assert passes(usual)
    assert passes(b"")  # none


@pytest.mark.parametrize("seed", range(40))
def test_what_passes_can_be_followed(usual, seed):
    """Few random bytes in the trie, so that some pass; the library's panic would be no `Exception`."""
    drawn = random.Random(seed)
    content = bytearray(usual)
    for _ in range(drawn.choice([1, 2, 30])):
        content[drawn.randrange(4, 4 + int.from_bytes(usual[:4], "little"))] = drawn.randrange(256)
    if passes(bytes(content)):
        normalizers.Precompiled(bytes(content)).normalize_str(TEXT)


def test_some_damage_passes_and_some_does_not(usual):
    """Negative control: the check refuses neither everything nor nothing."""
    size = int.from_bytes(usual[:4], "little")
    assert not passes(usual[: size // 2])
    assert not passes(usual[:4] + b"\xff" * size + usual[4 + size :])
    assert passes(usual[: 4 + size] + usual[4 + size :].replace(b"a", b"b"))
