"""English sentences of varied words from a small seeded grammar: texts for the espeak corpus."""

import random
from collections.abc import Iterator


def _words(text: str) -> list[str]:
    return text.split()


def _phrases(text: str) -> list[str]:
    return [phrase.strip() for phrase in text.split(",")]


_NAMES = _words("""
    Anna Ben Clara David Emma Frank Grace Henry Isabel Jack Kate Leo Martha Noah Olga Peter Rose Samuel Thea Victor
    Yvonne Zoe
""")
_ACTORS = _words("""
    teacher farmer sailor doctor painter singer child stranger neighbor judge thief soldier driver baker queen shepherd
    dog horse fox owl rabbit goose zebra whale mouse beetle lion pigeon goat tiger
""")
_THINGS = _words("""
    letter basket engine bridge candle window ladder mirror bottle hammer river valley garden treasure picture blanket
    wagon orchard island umbrella teapot guitar shovel button lantern cushion whistle feather telescope machine kettle
    jacket boat clock drum vase
""")
_ADJECTIVES = _words("""
    quiet golden heavy narrow ancient yellow broken gentle clever frozen hollow purple rusty wooden bright tiny enormous
    dusty silver crooked foolish lazy cheerful shy thick smooth early orange warm strange
""")
_ADVERBS = _words("""
    slowly quickly loudly softly proudly again yesterday early twice together bravely happily rarely calmly outside
    upstairs
""")
_PLACES = _phrases("""
    near the harbor, under the bridge, behind the church, at the station, in the forest, on the roof, by the fire,
    across the field, beside the well, over the hill, through the village, along the shore, in the cellar, at noon,
    before breakfast, after the storm, without a word, from the tower
""")
_MOVED = _words("""
    waited laughed vanished slept sang returned jumped whispered arrived stumbled shouted danced paused wandered escaped
    smiled coughed listened
""")
_DID = _phrases("""
    carried carry, found find, painted paint, watched watch, followed follow, sold sell, admired admire, touched touch,
    measured measure, forgot forget, borrowed borrow, noticed notice, washed wash, chose choose, moved move,
    judged judge, enjoyed enjoy, bought buy, dropped drop, remembered remember
""")

# Short and long sentences, statements and questions: attention has to follow the text, not the clock.
_PATTERNS = (
    "{name} {moved}.",
    "{name} {moved} {adverb}.",
    "The {actor} {moved} {place}.",
    "The {adjective} {actor} {moved} {adverb}.",
    "{name} {moved} {place}.",
    "{name} {did} {a_thing}.",
    "{name} {did} the {adjective} {thing}.",
    "The {actor} {did} the {thing} {place}.",
    "{name} and {name2} {did} {a_adjective} {thing}.",
    "Did the {actor} {do} the {thing}?",
    "Did {name} {do} {a_adjective} {thing}?",
    "There was {a_adjective} {thing} {place}.",
    "Where is the {adjective} {thing}?",
    "We {did} the {thing} {adverb}.",
    "They never {did} the {adjective} {actor}.",
    "The {thing} was {adjective} and {adjective2}.",
    "My {adjective} {actor} {did} your {thing}.",
    "{name}, please {do} this {thing}!",
    "It was only {a_thing}.",
)


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def sentences(seed: int) -> Iterator[str]:
    """Give different English sentences without end (some millions exist); the same seed gives the same ones."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while True:
        name, name2 = rng.sample(_NAMES, 2)
        adjective, adjective2 = rng.sample(_ADJECTIVES, 2)
        thing = rng.choice(_THINGS)
        did, do = rng.choice(_DID).split()
        text = rng.choice(_PATTERNS).format(
            name=name, name2=name2, adjective=adjective, adjective2=adjective2, a_adjective=_article(adjective),
            thing=thing, a_thing=_article(thing), did=did, do=do, actor=rng.choice(_ACTORS),
            moved=rng.choice(_MOVED), adverb=rng.choice(_ADVERBS), place=rng.choice(_PLACES),
        )  # fmt: skip
        if text not in seen:
            seen.add(text)
            yield text
