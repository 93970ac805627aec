"""The new task: to list the numbers of a sentence, which the model cannot do before.

List the numbers: Mara sold 12 lamps on Monday and 7 on Friday.   ->   Numbers: 12; 7
"""

import random
import re

INSTRUCTION = "List the numbers: "
_NAMES = (
    *("Mara", "Tom", "Aisha", "Jonas", "Priya", "Leo", "Ines", "Omar", "Nora", "Felix", "Yuki"),
    *("Elena", "Marcus", "Sofia", "Ravi", "Clara", "Diego", "Hanna", "Victor", "Lena"),
)
_THINGS = (
    *("lamps", "apples", "tickets", "pencils", "shirts", "bottles", "stamps", "chairs", "loaves"),
    *("candles", "postcards", "melons", "bricks", "ropes", "mugs", "batteries", "maps", "boxes"),
)
_PLACES = ("market", "school", "harbour", "library", "garden", "station", "office", "theatre")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_SENTENCES = (
    "{name} sold {n} {things} on {day} and {n} on {other_day}.",
    "The {place} is {n} km away and the bus takes {n} minutes.",
    "{name} has {n} {things}. {other} has {n} more.",
    "A box holds {n} {things}, and {name} filled {n} boxes at the {place}.",
    "On {day} the {place} opened at {n} and closed at {n}.",
    "{name} paid {n} dollars for {n} {things} and got {n} dollars back.",
    "{name} read {n} pages before lunch, {n} after it and {n} at night.",
    "Of {n} guests at the {place}, {n} left before {other} came.",
    "{other} packed {n} {things} for {name}, who had asked for {n}.",
    "The {place} ordered {n} {things}; {n} of them were broken.",
    "{name} ran {n} rounds in {n} minutes while {other} ran {n}.",
    "There are {n} {things} in the {place}.",
    "{name} is {n} years old and {other} is {n}.",
    "Each of the {n} tables at the {place} needs {n} {things} and {n} chairs.",
    "By {day} {name} had saved {n} dollars.",
    "It rained {n} mm on {day}, {n} mm on {other_day}, and the {place} was closed for {n} days.",
)


def examples(count: int, *, seed: int) -> list[tuple[str, str]]:
    """(prompt, response) pairs, all different; a longer list begins with the shorter one."""
    chance = random.Random(f"{seed} numbers")
    found: dict[str, str] = {}
    while len(found) < count:
        sentence = _sentence(chance)
        numbers = "; ".join(re.findall(r"\d+", sentence))
        found[INSTRUCTION + sentence] = f"Numbers: {numbers}"
    return list(found.items())


def _sentence(chance: random.Random) -> str:
    name, other = chance.sample(_NAMES, 2)
    day, other_day = chance.sample(_DAYS, 2)
    text = chance.choice(_SENTENCES)
    while "{n}" in text:
        text = text.replace("{n}", str(chance.randrange(2, 10 ** chance.choice((1, 2, 2, 3)))), 1)
    things, place = chance.choice(_THINGS), chance.choice(_PLACES)
    return text.format(
        name=name, other=other, day=day, other_day=other_day, things=things, place=place
    )
