"""What is said: a grammar of commands, numbers, names and rare words in four levels of difficulty, and its JSGF for pocketsphinx.

A level asks for longer sentences with more that cannot be guessed. Sound is made in `speech_voices`, corpora in `speech`.
"""

from __future__ import annotations

import re

import numpy as np

ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
        "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
DIGITS = ONES[:10]
SLOTS = {
    "device": "light lamp heater fan radio television alarm camera music oven kettle printer",
    "opening": "door window gate curtain drawer box",
    "object": "book cup ball chair hammer basket blanket bottle candle ladder mirror pencil ribbon scarf towel umbrella",
    "colour": "red green blue yellow black white brown purple orange silver",
    "room": "kitchen bedroom bathroom garden garage hall office cellar attic balcony",
    "moment": "now today tomorrow tonight early later",
    "unit": "minutes seconds hours degrees percent meters dollars",
    "first": "anna peter clara david emma frank laura martin nina oliver rachel simon sophie thomas victor alice henry julia "
             "kevin george",
    "last": "miller baker carter fisher hunter jackson morgan parker turner wilson",
    "city": "berlin london paris rome vienna madrid chicago boston dallas denver oslo dublin",
    "day": "monday tuesday wednesday thursday friday saturday sunday",
    "rare": "penguin volcano banjo zebra cathedral tornado walnut dolphin telescope vanilla octopus compass magnet tulip kangaroo "
            "pyramid lantern falcon submarine cinnamon accordion albatross almond antelope apricot asteroid avalanche badger "
            "bamboo beaver blizzard cactus canary cello chimney cobra coyote crocodile eclipse emerald fossil galaxy glacier "
            "granite harmonica harpoon hedgehog helicopter jasmine lavender leopard lobster mango maple marble mosquito mustard "
            "nebula nutmeg orchid ostrich otter panther papaya parachute pelican raccoon saffron scorpion trombone turquoise "
            "vampire walrus wizard xylophone zeppelin",
}  # fmt: skip
SLOTS = {slot: tuple(words.split()) for slot, words in SLOTS.items()}
TEMPLATES = {  # kind -> level -> templates
    "command": (
        ("stop the {device}", "start the {device}", "open the {opening}", "close the {opening}", "find the {colour} {object}"),
        ("turn on the {device} {moment}", "turn off the {device} {moment}", "bring me the {colour} {object}",
         "open the {opening} in the {room}", "close the {opening} in the {room}"),
        ("turn on the {device} in the {room} {moment}", "turn off the {device} in the {room} {moment}",
         "put the {colour} {object} in the {room}", "take the {object} and the {object} from the {room}"),
        ("please bring the {colour} {object} from the {room} to the {room} {moment}",
         "open the {opening} and turn off the {device} in the {room}",
         "put the {colour} {object} with the {colour} {object} in the {room}"),
    ),
    "number": (
        ("number {small}", "count from {digit} to {small}"),
        ("set the timer to {small} {unit}", "the answer is {small} {unit}", "room {hundreds}"),
        ("dial {digit} {digit} {digit} {digit}", "what is {small} plus {small}", "set the {device} to {hundreds} {unit}"),
        ("dial {digit} {digit} {digit} {digit} {digit} {digit}", "what is {hundreds} plus {hundreds}",
         "the code of room {hundreds} is {digit} {digit} {digit} {digit}"),
    ),
    "name": (
        ("call {first}", "my name is {first}", "{first} is in {city}"),
        ("call {first} {last}", "meet {first} in {city}", "write to {first} on {day}"),
        ("meet {first} {last} in {city} on {day}", "call {first} and {first} {moment}", "send the {object} to {first} {last}"),
        ("{first} {last} and {first} {last} are in {city} on {day}",
         "tell {first} {last} that {first} is going from {city} to {city}"),
    ),
    "rare": (
        ("where is the {rare}", "show me a {rare}", "i hear a {rare}"),
        ("what is a {rare}", "{first} has a {colour} {rare}", "the {rare} is in the {room}"),
        ("show me the {rare} and the {rare}", "put the {rare} with the {colour} {rare}", "is the {rare} older than the {rare}"),
        ("the {rare} and the {rare} are with the {rare} in {city}",
         "{first} {last} has a {colour} {rare} and a {rare}"),
    ),
}  # fmt: skip
JOINS = ("and then", "after that")  # between the clauses of a long utterance
WEIGHTS = {"rare": 3.0, "first": 2.0, "last": 2.0, "city": 2.0}  # of a slot's words in keyword F1; 1 where not named
HELD_OUT = {0: "validation", 1: "test"}  # of ten buckets of sentences


def number_words(number: int) -> str:
    """0 to 999 as it is said: 342 -> "three hundred forty two". ValueError beyond."""
    if not 0 <= number <= 999:
        raise ValueError(f"number={number}: numbers from 0 to 999 have words here")
    hundreds, rest = divmod(number, 100)
    said = [ONES[hundreds], "hundred"] if hundreds else []
    if rest >= 20:
        said += [TENS[rest // 10 - 2]] + ([ONES[rest % 10]] if rest % 10 else [])
    elif rest or not hundreds:
        said.append(ONES[rest])
    return " ".join(said)


def fill(template: str, rng: np.random.Generator, *, tail: bool) -> tuple[str, tuple[str, ...]]:
    """A sentence of the template and the words that came in its slots. tail: rare words fall off as 1/(rank + 3), so that the
    last of them are seen a few times in some thousand utterances; otherwise all are as likely."""
    keywords = []

    def word(match):
        slot = match[1]
        if slot in SLOTS:
            options = SLOTS[slot]
            shares = 1 / (np.arange(len(options)) + 3.0) if tail and slot == "rare" else np.ones(len(options))
            said = options[rng.choice(len(options), p=shares / shares.sum())]
        else:
            low, high = {"digit": (0, 10), "small": (0, 100), "hundreds": (100, 1000)}[slot]
            said = number_words(int(rng.integers(low, high)))
        keywords.extend(said.split())
        return said

    sentence = re.sub(r"{(\w+)}", word, template)
    return re.sub(r"\ba (?=[aeiou])", "an ", sentence), tuple(keywords)


def vocabulary() -> list[str]:
    """All words of the grammar, in alphabetical order."""
    fixed = " ".join(t for levels in TEMPLATES.values() for templates in levels for t in templates) + " " + " ".join(JOINS)
    found = {word for word in fixed.split() if not word.startswith("{")} | {*ONES, *TENS, "hundred"}
    return sorted(found.union({"an"}, *SLOTS.values()))


def keyword_weights() -> dict[str, float]:
    """What each word weighs in `rules.keyword_f1`: rare words 3, names 2 (those not listed 1)."""
    return {word: weight for slot, weight in WEIGHTS.items() for word in SLOTS[slot]}


def jsgf(*, long: bool = True) -> str:
    """The grammar for pocketsphinx: one sentence or, with `long`, also several joined."""
    rules = {slot: " | ".join(words) for slot, words in SLOTS.items()}
    rules |= {"digit": " | ".join(DIGITS), "one": " | ".join(ONES[1:10]), "teen": " | ".join(ONES[10:]), "tens": " | ".join(TENS)}
    rules["small"] = "<digit> | <teen> | <tens> [<one>]"
    rules["hundreds"] = "<one> hundred [<one> | <teen> | <tens> [<one>]]"
    sentences = (t for levels in TEMPLATES.values() for templates in levels for t in templates)
    rules["sentence"] = " | ".join(re.sub(r"{(\w+)}", r"<\1>", re.sub(r"\ba {", "(a | an) {", t)) for t in sentences)
    lines = [f"<{name}> = {rule};" for name, rule in rules.items()]
    more = f" (({' | '.join(JOINS)}) <sentence>)*" if long else ""
    return "\n".join(["#JSGF V1.0;", "grammar speech;", f"public <utterance> = <sentence>{more};", *lines]) + "\n"
