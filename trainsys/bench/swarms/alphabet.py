"""The tokens of the bench's policies: a task's name is one, every other character of its questions is one."""

from __future__ import annotations

import functools

from trainsys.bench.swarms.stack import PAD

SKILLS = ("add", "reverse", "sort", "largest", "increment")
"""The tasks of the bench, built-in ones with their default sizes."""
_SYMBOLS = "0123456789+= "
_FIRST_SYMBOL = 1 + len(SKILLS)
VOCAB_SIZE = _FIRST_SYMBOL + len(_SYMBOLS)
_IDS = {symbol: _FIRST_SYMBOL + index for index, symbol in enumerate(_SYMBOLS)}
_TEXTS = ["", *(f"{skill} " for skill in SKILLS), *_SYMBOLS]


@functools.lru_cache(maxsize=100_000)
def encode(text: str) -> tuple[int, ...]:
    """Return the tokens of a prompt or completion; a character that is none becomes a space."""
    name, space, rest = text.partition(" ")
    if space and name in SKILLS:
        return (1 + SKILLS.index(name), *encode(rest))
    return tuple(_IDS.get(symbol, _IDS[" "]) for symbol in text)


def decode(tokens: list[int]) -> tuple[str, int, bool]:
    """Return (text, number of tokens with the end, whether it ended) of a drawn completion."""
    if PAD in tokens:
        length = tokens.index(PAD)
        return "".join(_TEXTS[token] for token in tokens[:length]), length + 1, True
    return "".join(_TEXTS[token] for token in tokens), len(tokens), False
