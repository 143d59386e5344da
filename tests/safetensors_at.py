"""Files whose numbers begin at a chosen place, as headers of other lengths make them."""

from safetensors.torch import save_file


def save_at(place, tensors, file):
    """Write a file whose numbers begin at `place` (a multiple of 8) in a row of 64 bytes."""
    for room in range(128):
        save_file(tensors, file, metadata={"room": " " * room})
        with open(file, "rb") as content:
            begin = 8 + int.from_bytes(content.read(8), "little")
        if begin % 64 == place:
            return
    raise AssertionError("a header's length is a multiple of 8")
