"""Make preferences.jsonl, the preference pairs that ship with this project, from the hand-written facts beside it.

    python experiments/data/make_preferences.py

The facts are in facts/*.yaml: questions with a right and a wrong answer, with a concise and a rambling one, with a
helpful and a dismissive one, with one that follows the instruction and one that does not. Answers that can be computed
(arithmetic, dates, words, Python values) are computed here, so that no typing error can make `chosen` wrong.
Nothing is random: the same facts always give the same file. Schema: UltraFeedback-binarized.
"""

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

HERE = Path(__file__).parent
OUTPUT = HERE / "preferences.jsonl"


class Pair(NamedTuple):
    """A question with a better and a worse answer."""

    prompt: str
    chosen: str
    rejected: str


def facts(name: str) -> list[Any]:
    """Return the entries of one file of hand-written facts."""
    return yaml.safe_load((HERE / "facts" / f"{name}.yaml").read_text(encoding="utf-8"))


def written(name: str) -> Iterator[Pair]:
    """Yield the pairs of a file that contains them in full."""
    for entry in facts(name):
        yield Pair(**entry)


def slip(number: int, turn: int) -> int:
    """Return a typical wrong result: off by ten or by one, or with the last two digits swapped."""
    swapped = int(str(number)[:-2] + str(number)[:-3:-1]) if number >= 10 else number
    candidates = [number + 10, number - 1, swapped, number + 1]
    return next(wrong for wrong in candidates[turn % 4 :] + candidates if wrong != number and wrong > 0)


def arithmetic() -> Iterator[Pair]:
    """Yield sums, differences, products, quotients and percentages."""
    sums = [(17, 25), (38, 47), (56, 89), (123, 77), (246, 135), (64, 36), (99, 58), (401, 299), (75, 18), (512, 256)]
    for turn, (a, b) in enumerate(sums):
        question = (f"What is {a} + {b}?", f"Add {a} and {b}.", f"How much is {a} plus {b}?")[turn % 3]
        yield Pair(question, f"{a} + {b} = {a + b}.", f"{a} + {b} = {slip(a + b, turn)}.")
    differences = [(52, 17), (90, 46), (134, 58), (200, 73), (81, 29), (1000, 365), (63, 38), (415, 216), (77, 49)]
    for turn, (a, b) in enumerate(differences):
        question = (f"What is {a} - {b}?", f"Subtract {b} from {a}.", f"How much is {a} minus {b}?")[turn % 3]
        yield Pair(question, f"The answer is {a - b}.", f"The answer is {slip(a - b, turn)}.")
    products = [(7, 8), (12, 11), (9, 6), (15, 4), (13, 7), (25, 8), (14, 12), (6, 17), (11, 19), (30, 21), (8, 16)]
    for turn, (a, b) in enumerate(products):
        question = (f"What is {a} times {b}?", f"Multiply {a} by {b}.", f"Calculate {a} x {b}.")[turn % 3]
        yield Pair(question, f"{a} times {b} is {a * b}.", f"{a} times {b} is {slip(a * b, turn)}.")
    quotients = [(56, 7), (144, 12), (81, 9), (96, 8), (225, 15), (132, 11), (68, 4), (300, 25)]
    for turn, (a, b) in enumerate(quotients):
        question = (f"What is {a} divided by {b}?", f"Divide {a} by {b}.")[turn % 2]
        yield Pair(question, f"{a} divided by {b} is {a // b}.", f"{a} divided by {b} is {slip(a // b, turn)}.")
    percentages = [(10, 250), (50, 84), (25, 60), (20, 45), (5, 200), (75, 40), (30, 70), (15, 80), (40, 35), (1, 900)]
    for turn, (percent, whole) in enumerate(percentages):
        part = percent * whole // 100
        right, wrong = (f"{percent}% of {whole} is {value}." for value in (part, slip(part, turn)))
        yield Pair(f"What is {percent}% of {whole}?", right, wrong)


def word_problems() -> Iterator[Pair]:
    """Yield word problems with one step of arithmetic, solved with the right operation and with a wrong one."""
    for name, thing, a, b in [
        ("Mia", "apples", 12, 5),
        ("Tom", "stamps", 48, 27),
        ("Aisha", "books", 19, 14),
        ("Ken", "marbles", 33, 18),
    ]:
        more, fewer = f"{a} + {b} = {a + b} {thing}", f"{a} - {b} = {a - b} {thing}"
        start = f"{name} has {a} {thing} and"
        yield Pair(f"{start} gets {b} more. How many is that?", f"{name} now has {more}.", f"{name} now has {fewer}.")
        yield Pair(f"{start} gives {b} away. How many are left?", f"{fewer} are left.", f"{more} are left.")
    for thing, count, price in [
        ("tickets", 4, 15),
        ("pens", 6, 3),
        ("cakes", 5, 12),
        ("maps", 7, 9),
        ("chairs", 8, 25),
        ("cups", 12, 4),
    ]:
        yield Pair(
            f"One of these {thing} costs {price} euros. What do {count} of them cost?",
            f"They cost {count} x {price} = {count * price} euros.",
            f"They cost {count} + {price} = {count + price} euros.",
        )
    for speed, hours in [(60, 3), (80, 2), (45, 4), (100, 5), (12, 6), (90, 3)]:
        yield Pair(
            f"A train travels at {speed} km/h for {hours} hours. How far does it go?",
            f"It goes {speed} x {hours} = {speed * hours} kilometres.",
            f"It goes {speed} + {hours} = {speed + hours} kilometres.",
        )


def units() -> Iterator[Pair]:
    """Yield conversions between units."""
    for turn, (amount, unit, right, other, wrong) in enumerate(facts("units")):
        question = (f"Convert {amount} {unit} to {other}.", f"How many {other} are {amount} {unit}?")[turn % 2]
        yield Pair(question, f"{amount} {unit} is {right} {other}.", f"{amount} {unit} is {wrong} {other}.")


def calendar() -> Iterator[Pair]:
    """Yield questions about lengths of months, leap years, weekdays and time spans in days."""
    for year, month in [(2023, 2), (2024, 2), (2025, 4), (2025, 7), (2026, 9), (2026, 12), (2027, 11), (2028, 2)]:
        first = datetime.date(year, month, 1)
        days = (datetime.date(year + month // 12, month % 12 + 1, 1) - first).days
        wrong = {28: 29, 29: 28, 30: 31, 31: 30}[days]
        name = first.strftime("%B %Y")
        yield Pair(f"How many days does {name} have?", f"{name} has {days} days.", f"{name} has {wrong} days.")
    for year in (1900, 2000, 2015, 2020, 2023, 2024, 2030, 2096, 2100):
        leap = (datetime.date(year, 3, 1) - datetime.date(year, 2, 28)).days == 2
        is_leap, is_not = f"Yes, {year} is a leap year.", f"No, {year} is not a leap year."
        right, wrong = (is_leap, is_not) if leap else (is_not, is_leap)
        yield Pair(f"Is {year} a leap year in the Gregorian calendar?", right, wrong)
    for turn, days in enumerate([2, 5, 7, 10, 14, 20, 30, 45, 100]):
        monday = datetime.date(2024, 1, 1)
        start = monday + datetime.timedelta(turn)
        right, wrong = (f"It will be {start + datetime.timedelta(days + extra):%A}." for extra in (0, 2))
        yield Pair(f"Today is {start:%A}. What day will it be in {days} days?", right, wrong)
    spans = [("2024-02-20", 15), ("2025-03-01", 60), ("2025-06-10", 21), ("2023-12-20", 19), ("2026-10-05", 40)]
    for start_text, days in spans:
        start = datetime.date.fromisoformat(start_text)
        end = start + datetime.timedelta(days)
        question = f"How many days is it from {_date(start)} to {_date(end)}?"
        yield Pair(question, f"It is {days} days.", f"It is {days - 3} days.")


def _date(day: datetime.date) -> str:
    return f"{day.day} {day:%B %Y}"


def words() -> Iterator[Pair]:
    """Yield questions about letters, the order of words, and opposites."""
    for word in ("garden", "mountain", "bicycle", "library", "umbrella", "strength", "computer", "sunflower"):
        right, wrong = (f"It has {count} letters." for count in (len(word), len(word) + 2))
        yield Pair(f'How many letters are in the word "{word}"?', right, wrong)
    for word in ("stone", "planet", "market", "silver", "window", "rocket", "basket"):
        back = word[::-1]
        wrong = back[1] + back[0] + back[2:]
        yield Pair(
            f'Spell "{word}" backwards.', f'"{word}" backwards is "{back}".', f'"{word}" backwards is "{wrong}".'
        )
    for word in ("education", "banana", "rhythm", "orange", "keyboard", "elephant", "music"):
        vowels = sum(letter in "aeiou" for letter in word)
        right, wrong = (f'"{word}" contains {count} of them.' for count in (vowels, vowels + 1))
        yield Pair(f'How many of the letters a, e, i, o and u does "{word}" contain, counting repeats?', right, wrong)
    for line in ("dog cat bird", "red green blue", "tea milk juice", "rose lily daisy iris", "Rome Paris Oslo"):
        right, wrong = ", ".join(sorted(line.split())), ", ".join(sorted(line.split(), reverse=True))
        yield Pair(f"Put these words in alphabetical order: {', '.join(line.split())}.", right, wrong)
    for word, opposite, other in facts("antonyms"):
        question = f'What is the opposite of "{word}"?'
        yield Pair(question, f'The opposite of "{word}" is "{opposite}".', f'The opposite of "{word}" is "{other}".')


def capitals() -> Iterator[Pair]:
    """Yield capitals, each with a better-known or similar city as the wrong answer."""
    for turn, (country, capital, other) in enumerate(facts("capitals")):
        question = (
            f"What is the capital of {country}?",
            f"Which city is the capital of {country}?",
            f"Name the capital of {country}.",
            f"Is {other} the capital of {country}?",
        )[turn % 4]
        if turn % 4 == 3:
            chosen, rejected = f"No, the capital of {country} is {capital}.", f"Yes, {other} is its capital."
        else:
            chosen, rejected = (f"The capital of {country} is {city.rstrip('.')}." for city in (capital, other))
        yield Pair(question, chosen, rejected)


def python_values() -> Iterator[Pair]:
    """Yield Python expressions with their values."""
    for expression, wrong in facts("python"):
        right = repr(eval(expression))
        yield Pair(
            f"What does this Python expression give: {expression}",
            f"{expression} gives {right}.",
            f"{expression} gives {wrong}.",
        )


def make_rows() -> list[dict[str, Any]]:
    """Return all pairs in the UltraFeedback-binarized schema, category by category."""
    categories = {
        "arithmetic": arithmetic(),
        "word-problem": word_problems(),
        "units": units(),
        "calendar": calendar(),
        "words": words(),
        "capitals": capitals(),
        "python": python_values(),
        **{name: written(name) for name in ("geography", "science", "grammar", "code")},
        **{name: written(name) for name in ("concise", "helpful", "instructions")},
    }
    return [
        {
            "prompt": pair.prompt,
            "prompt_id": f"{category}-{number:03d}",
            "chosen": [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.rejected}],
        }
        for category, pairs in categories.items()
        for number, pair in enumerate(pairs)
    ]


def make_text() -> str:
    """Return the content of preferences.jsonl."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows())


if __name__ == "__main__":
    OUTPUT.write_text(make_text(), encoding="utf-8")
    print(f"{OUTPUT}: {len(make_rows())} pairs")
