"""What a seascape shows, how a scene is chosen at random, and how a caption describes it."""

from dataclasses import dataclass

import numpy as np

TIMES = ("day", "sunset", "night", "dawn")
SEAS = ("calm", "rough")
BOAT_KINDS = ("sailboat", "fishing boat", "steamship")
BOAT_COLORS = ("red", "blue", "green", "yellow", "white", "black")
LANDMARKS = ("none", "lighthouse", "island")
SIDES = ("left", "right")

_TIME_PHRASES = {
    "day": ("by day", "in the daytime", "at noon", "during the day"),
    "sunset": ("at sunset", "at sunset", "at sunset", "in the evening", "at dusk"),
    "night": ("at night", "at night", "at night", "by night"),
    "dawn": ("at dawn", "at dawn", "at sunrise", "in the morning"),
}
_TIME_TAGS = {
    "day": ("daytime", "day", "noon"),
    "sunset": ("sunset", "sunset", "evening", "dusk"),
    "night": ("night",),
    "dawn": ("dawn", "dawn", "sunrise", "morning"),
}
_SEA_PHRASES = {
    "calm": ("calm sea", "calm sea", "quiet sea", "calm water", "calm ocean", "still water"),
    "rough": ("rough sea", "rough sea", "stormy sea", "rough water", "stormy ocean", "big waves"),
}
_KIND_PHRASES = {
    "sailboat": ("sailboat", "sailboat", "sailboat", "sailing boat", "sail boat", "sailing ship", "boat"),
    "fishing boat": ("fishing boat", "fishing boat", "fishing boat", "fishing ship", "boat"),
    "steamship": ("steamship", "steamship", "steamship", "steamer", "steam ship", "ship", "boat"),
}
_LANDMARK_PHRASES = {
    "lighthouse": ("lighthouse",),
    "island": ("island", "island", "small island", "palm island"),
}
_SIDE_PHRASES = ("on the {}", "on the {}", "on the {}", "to the {}", "on the {} side")


@dataclass(frozen=True)
class Scene:
    """One seascape in words. Without a boat `boat_color` has no meaning, and without a landmark `side` has none."""

    time: str
    sea: str
    boat_kind: str
    boat_color: str
    landmark: str
    side: str
    sky_body: str
    clouds: bool
    stars: bool
    birds: bool


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene. Every attribute is drawn on its own, except where the time of day forbids one."""
    time = _pick(rng, TIMES)
    night = time == "night"
    body = rng.random() < 0.8
    return Scene(
        time=time,
        sea=_pick(rng, SEAS),
        boat_kind=_pick(rng, BOAT_KINDS) if rng.random() < 0.88 else "none",
        boat_color=_pick(rng, BOAT_COLORS),
        landmark=str(rng.choice(LANDMARKS, p=(0.3, 0.4, 0.3))),
        side=_pick(rng, SIDES),
        sky_body=("moon" if night else "sun") if body else "none",
        clouds=bool(rng.random() < 0.5),
        stars=bool(rng.random() < 0.65) and night,
        birds=bool(rng.random() < 0.35) and not night,
    )


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describe a scene as a user would, in lower case. All that it says is true; it seldom says everything."""
    subject, rest = _subjects(scene, rng)
    sea = _pick(rng, _SEA_PHRASES[scene.sea]) if rng.random() < 0.75 else _pick(rng, ("sea", "sea", "ocean", "water"))
    says_time = rng.random() < 0.93
    if rng.random() < 0.1:
        tags = [*subject, *rest, sea, *([_pick(rng, _TIME_TAGS[scene.time])] if says_time else []), *_sky(scene, rng)]
        return ", ".join(tags)
    place = _place(sea, rng)
    when = _pick(rng, _TIME_PHRASES[scene.time]) if says_time else ""
    if not subject:
        subject, place = [f"the {sea}" if sea in ("sea", "ocean") else _article(sea)], ""
    if rest and rng.random() < 0.35:
        subject, rest = [f"{rest[0]} and {subject[0]}" if rng.random() < 0.5 else f"{subject[0]} and {rest[0]}"], []
    head = " ".join(part for part in (subject[0], place, when) if part)
    if when and rng.random() < 0.12:
        head = " ".join(part for part in (f"{when},", subject[0], place) if part)
    return _with_extras(head, rest, _sky(scene, rng), rng)


def vocabulary() -> list[str]:
    """List every word a caption can hold, sorted."""
    rng = np.random.default_rng(0)
    words = {word for _ in range(20000) for word in caption(sample_scene(rng), rng).replace(",", "").split()}
    return sorted(words)


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _article(noun: str) -> str:
    if noun.rsplit(maxsplit=1)[-1] in ("water", "waves"):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _subjects(scene: Scene, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Return the caption's subject and what stands beside it, each at most one phrase."""
    found = []
    if scene.boat_kind != "none":
        found.append(_boat(scene, rng))
    if scene.landmark != "none" and rng.random() < 0.9:
        noun = _article(_pick(rng, _LANDMARK_PHRASES[scene.landmark]))
        side = _pick(rng, _SIDE_PHRASES).format(scene.side) if rng.random() < 0.97 else ""
        found.append(f"{noun} {side}".strip())
    return found[:1], found[1:]


def _boat(scene: Scene, rng: np.random.Generator) -> str:
    kind = _pick(rng, _KIND_PHRASES[scene.boat_kind])
    if rng.random() < 0.04:
        return _article(kind)
    if scene.boat_kind == "sailboat" and kind == "sailboat" and rng.random() < 0.1:
        return f"a sailboat with {_pick(rng, ('a {} sail', '{} sails')).format(scene.boat_color)}"
    small = "small " if scene.boat_kind != "steamship" and rng.random() < 0.06 else ""
    return f"a {small}{scene.boat_color} {kind}"


def _place(sea: str, rng: np.random.Generator) -> str:
    if sea == "big waves":
        return _pick(rng, ("in big waves", "on big waves"))
    if sea in ("sea", "ocean", "water"):
        return _pick(rng, (f"on the {sea}", f"on the {sea}", "at sea"))
    if sea.endswith("water"):
        return f"on {sea}"
    return _pick(rng, (f"on a {sea}", f"on a {sea}", f"on the {sea}"))


def _sky(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Name some of the things in the sky, in any order."""
    said = []
    if scene.sky_body != "none" and rng.random() < 0.5:
        low = scene.time in ("sunset", "dawn")
        sun = ("the sun", "a sun", "a low sun", "a setting sun" if scene.time == "sunset" else "a rising sun")
        said.append(_pick(rng, sun if low else ("the sun", "a sun")) if scene.sky_body == "sun" else "a moon")
    if scene.stars and rng.random() < 0.65:
        said.append("stars")
    if scene.birds and rng.random() < 0.65:
        said.append(_pick(rng, ("birds", "birds", "seagulls")))
    if scene.clouds and rng.random() < 0.65:
        said.append("clouds")
    elif not scene.clouds and rng.random() < 0.12:
        said.append("a clear sky")
    rng.shuffle(said)
    return said


def _with_extras(head: str, rest: list[str], sky: list[str], rng: np.random.Generator) -> str:
    if not rest and not sky:
        return head
    if rng.random() < 0.4:
        return ", ".join([head, *rest, *sky])
    sky_part = [*([", ".join(sky[:-1])] if sky[:-1] else []), *sky[-1:]]
    joined = [*rest, " and ".join(sky_part)] if sky else rest
    link = _pick(rng, (" with ", ", with "))
    return head + link + ", ".join(joined)
