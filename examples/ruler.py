"""Tasks of RULER (Hsieh et al., arXiv 2404.06654) for models that were not taught to follow instructions.

Six of its thirteen tasks, written anew after the published templates and settings (github.com/NVIDIA/RULER,
scripts/data/synthetic and scripts/synthetic.yaml): the text ends with RULER's answer prefix and the right answers, so
that one forward pass says which of them a model gives, each behind the right ones before it (teacher forcing). Other
than there, the haystack is the user's own text, cut between any two tokens; words are those of the same text (made up
where it has too few); and answers have an order: that of the text, of the question, or of falling frequency.
"""

import math
import random
import re
import string
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch


NEEDLES = 4  # keys of multi_key and multi_query, values of multi_value
HOPS = 4  # of variable tracking, behind the first variable
COMMON = 10  # words to extract
FREQUENT = 3
# How often common and other words stand in a list, and the same in the list of the example with its number of words;
# the second where the first does not fit
REPEATS = (((30, 3), (10, 3, 40)), ((6, 1), (3, 1, 20)))

NEEDLE = "\nOne of the special magic numbers for {key} is: {value}.\n"
NEEDLE_BEGIN = (
    "\nSome special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the numbers afterwards.\n"
)
NEEDLE_END = (
    "\nWhat are all the special magic numbers for {keys} mentioned in the provided text? The special magic numbers "
    "for {keys} mentioned in the provided text are"
)
ONE_NEEDLE_BEGIN = (
    "\nA special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the number afterwards.\n"
)
ONE_NEEDLE_END = (
    "\nWhat is the special magic number for {keys} mentioned in the provided text? The special magic number for "
    "{keys} mentioned in the provided text is"
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
CHAIN_BEGIN = "\nMemorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
CHAIN_END = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
    "chain(s) of variable assignment in the text above, {count} variables are assigned the value {value}, they are:"
)
COMMON_BEGIN = (
    "\nBelow is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n"
)
COMMON_END = (
    "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often "
    "in the list are:"
)
FREQUENT_BEGIN = (
    "\nRead the following coded text and track the frequency of each coded word. Find the three most frequently "
    "appeared coded words. "
)
FREQUENT_END = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
    "appeared words are:"
)


class RulerText(NamedTuple):
    """A task: `ids` `[N]` with its answers at the end, the columns of each answer's tokens, and `chance`, how often
    one is right who draws an answer from the candidates (numbers, variables, words) that the text has behind its
    example, if it has one."""

    ids: torch.Tensor
    answers: list[torch.Tensor]
    chance: float


class _Writer:
    """Puts a task together, piece by piece; every piece is tokenized by itself."""

    def __init__(self, tokenizer):
        self.tokenizer, self.pieces, self.answers, self.length = tokenizer, [], [], 0

    def ids_of(self, text: str) -> torch.Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)

    def add(self, piece: str | torch.Tensor, is_answer: bool = False) -> None:
        ids = self.ids_of(piece) if isinstance(piece, str) else piece
        if is_answer:
            self.answers.append(torch.arange(self.length, self.length + len(ids)))
        self.pieces.append(ids)
        self.length += len(ids)

    def end(self, *pieces: str) -> None:
        """Every second piece is an answer."""
        for i, piece in enumerate(pieces):
            self.add(piece, is_answer=i % 2 == 1)

    def tokens(self, pieces: Iterable[str]) -> int:
        return sum(len(self.ids_of(piece)) for piece in pieces)

    def task(self, candidates: int) -> RulerText:
        return RulerText(torch.cat(self.pieces), self.answers, 1 / candidates)


class _Source(NamedTuple):
    """What tasks are made of: a text `[N]`, words, and chance."""

    text: torch.Tensor
    words: list[str]
    draw: random.Random


def make_tasks(name: str, tokenizer, length: int, texts: torch.Tensor, number: int, seed: int) -> list[RulerText]:
    """Make texts of a task, each of another draw.

    Args:
        name: one of [`TASKS`].
        tokenizer: the model's.
        length: tokens of a text, at most.
        texts: the haystacks, `[T, N]`; N of at least `length`.
        number: how many texts.
        seed: of all that is drawn.

    Raises:
        ValueError: if the task does not fit into so few tokens.
    """
    if name not in TASKS:
        raise ValueError(f"`name` must be one of {list(TASKS)}, got {name!r}.")
    words = sorted(set(re.findall(r"\b[a-z]{4,10}\b", " ".join(tokenizer.decode(text) for text in texts))))
    tasks = []
    for index in range(number):
        draw = random.Random(f"{seed} {name} {index}")
        source = _Source(texts[index % len(texts)], draw.sample(words, len(words)), draw)
        writer = _Writer(tokenizer)
        candidates = TASKS[name](writer, source, length)
        tasks.append(writer.task(candidates))
    return tasks


def _check_room(name: str, room: int, least: int, length: int) -> None:
    if room < least:
        raise ValueError(
            f"Texts (`--lengths`) must be longer for RULER's {name}, got {length} tokens: {length - room + least} are "
            "the least for what was drawn. `--ruler_texts 0` leaves RULER out."
        )


def _some_words(source: _Source, count: int) -> list[str]:
    """Different words: the text's, and where these are too few, made-up ones."""
    words = list(source.words[:count])
    known = set(words)
    while len(words) < count:
        word = _letters(source.draw, string.ascii_lowercase, 6)
        if word not in known:
            known.add(word)
            words.append(word)
    return words


def _letters(draw: random.Random, alphabet: str, count: int) -> str:
    return "".join(draw.choices(alphabet, k=count))


def _listed(words: list[str]) -> list[str]:
    """Words in a sentence, and what stands between them: "", " a", ",", " b", ", and", " c"."""
    between = [""] + [","] * (len(words) - 2) + [", and"]
    return [piece for joint, word in zip(between, words, strict=False) for piece in (joint, f" {word}")]


# The tasks: each writes itself, and returns the number of candidates


def _needles(keys: int, values: int, asked: int) -> Callable[[_Writer, _Source, int], int]:
    """RULER's niah_multikey_1 (4 keys, one asked), niah_multivalue (one of 4 values), niah_multiquery (4 keys)."""

    def write(writer: _Writer, source: _Source, length: int) -> int:
        draw, words = source.draw, _some_words(source, 2 * keys)
        names = [f"{words[2 * i]}-{words[2 * i + 1]}" for i in range(keys)]
        secrets = draw.sample(range(10**6, 10**7), keys * values)
        said = [(names[i // values], str(secret)) for i, secret in enumerate(secrets)]
        draw.shuffle(said)
        questions = draw.sample(names, asked)
        answers = [value for name in questions for key, value in said if key == name]
        begin, end = (ONE_NEEDLE_BEGIN, ONE_NEEDLE_END) if len(answers) == 1 else (NEEDLE_BEGIN, NEEDLE_END)
        end = end.format(keys="".join(_listed(questions)).strip())
        hidden = [NEEDLE.format(key=key, value=value) for key, value in said]
        room = length - writer.tokens([begin, *hidden, end, *_listed(answers)])
        _check_room("needles", room, len(hidden), length)
        writer.add(begin)
        place = 0
        for cut, needle in zip(sorted(draw.sample(range(room), len(hidden))), hidden, strict=True):
            writer.add(source.text[place:cut])
            writer.add(needle)
            place = cut
        writer.add(source.text[place:room])
        writer.add(end)
        writer.end(*_listed(answers))
        return len(said)

    return write


def _chain(draw: random.Random, letters: int) -> tuple[str, list[str], list[str]]:
    """A value, the variables that have it, and the assignments."""
    value, names = str(draw.randint(10000, 99999)), []
    while len(names) < HOPS + 1:
        name = _letters(draw, string.ascii_uppercase, letters)
        names += [name] * (name not in names)
    sources = [value, *(f"VAR {name}" for name in names)]
    return value, names, [f"VAR {name} = {source}\n" for name, source in zip(names, sources, strict=False)]


def _variable_tracking(writer: _Writer, source: _Source, length: int) -> int:
    """RULER's vt: one chain of 4 hops in noise, behind an example of another."""

    def parts(letters: int) -> tuple[list[str], str, list[str]]:
        value, names, said = _chain(source.draw, letters)
        return said, CHAIN_END.format(value=value, count=len(names)), names

    def hide(said: list[str], count: int) -> None:
        places = sorted(source.draw.sample(range(count), len(said)))
        start = 0
        for place, assignment in zip(places, said, strict=True):
            writer.add(noise.repeat(place - start))
            writer.add(assignment)
            start = place
        writer.add(noise.repeat(count - start))

    noise = writer.ids_of(NOISE)
    said, end, names = parts(3)
    writer.add(CHAIN_BEGIN)
    hide(said, 2 * len(said))
    writer.add(end)
    writer.add(" " + " ".join(names) + "\n")

    said, end, names = parts(5)
    room = length - writer.length - writer.tokens([CHAIN_BEGIN, *said, end, *(f" {name}" for name in names)])
    _check_room("variable_tracking", room, len(noise) * len(said), length)
    writer.add(CHAIN_BEGIN)
    hide(said, room // len(noise))
    writer.add(end)
    writer.end(*(piece for name in names for piece in ("", f" {name}")))
    return len(names)


def _common_words(writer: _Writer, source: _Source, length: int) -> int:
    """RULER's cwe: a numbered list in which ten words stand more often than all others, behind an example."""

    def listing(words: list[str], common: int, other: int) -> list[str]:
        entries = words[:COMMON] * common + words[COMMON:] * other
        random.Random(order).shuffle(entries)
        return entries

    def numbered(entries: list[str]) -> str:
        return " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))

    words, order = _some_words(source, 40 + COMMON + length // 2), source.draw.random()
    for (common, other), (common_before, other_before, count_before) in REPEATS:
        before = listing(words[:count_before], common_before, other_before)
        first = list(dict.fromkeys(word for word in before if word in words[:COMMON]))
        example = COMMON_BEGIN + numbered(before) + COMMON_END + " " + numbered(first) + "\n"
        rest = words[count_before:]
        said = [piece for i, word in enumerate(rest[:COMMON], 1) for piece in (f" {i}.", f" {word}")]
        room = length - writer.tokens([example, COMMON_BEGIN, COMMON_END, *said])

        def size(count: int, common=common, other=other, rest=rest) -> int:
            return len(writer.ids_of(numbered(listing(rest[: COMMON + count], common, other))))

        least = size(COMMON)
        if room >= least:
            break
    _check_room("common_words", room, least, length)
    # An entry has two tokens at least
    count = bisect_right(range(max(COMMON, room // (2 * other)) + 1), room, lo=COMMON + 1, key=size) - 1
    entries = listing(rest[: COMMON + count], common, other)
    writer.add(example)
    writer.add(COMMON_BEGIN)
    writer.add(numbered(entries))
    writer.add(COMMON_END)
    answers = list(dict.fromkeys(word for word in entries if word in rest[:COMMON]))
    writer.end(*(piece for i, word in enumerate(answers, 1) for piece in (f" {i}.", f" {word}")))
    return COMMON + count


def _frequent_words(writer: _Writer, source: _Source, length: int) -> int:
    """RULER's fwe: made-up words whose frequency falls with the square of their rank; the first are dots."""
    alphabet, vocabulary = string.ascii_lowercase, {"...": None}
    while len(vocabulary) < max(20, length // 50):
        vocabulary[_letters(source.draw, alphabet, 6)] = None
    words, order = list(vocabulary), source.draw.random()

    def coded(count: int) -> str:
        norm = math.pi**2 / 6
        entries = [word for k, word in enumerate(words, 1) for _ in range(int(count / norm / k**2))]
        random.Random(order).shuffle(entries)
        return " ".join(entries)

    answers = words[1 : 1 + FREQUENT]
    room = length - writer.tokens([FREQUENT_BEGIN, FREQUENT_END, *_listed(answers)])
    least = 100  # of which each of the three stands more often than the next
    _check_room("frequent_words", room, writer.tokens([coded(least)]), length)
    counts = range(max(least, 2 * room) + 1)
    count = bisect_right(counts, room, lo=least + 1, key=lambda count: writer.tokens([coded(count)])) - 1
    writer.add(FREQUENT_BEGIN)
    writer.add(coded(count))
    writer.add(FREQUENT_END)
    writer.end(*_listed(answers))
    return len(set(coded(count).split())) - 1


TASKS: dict[str, Callable[[_Writer, _Source, int], int]] = {
    "multi_key": _needles(NEEDLES, 1, 1),
    "multi_value": _needles(1, NEEDLES, 1),
    "multi_query": _needles(NEEDLES, 1, NEEDLES),
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
}
