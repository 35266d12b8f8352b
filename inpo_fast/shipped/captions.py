"""The vocabulary of the shipped model, and captions tokenised in batches.

The tokenizer is an ordinary CLIPTokenizer whose byte-pair merges make one token of every word that
a prompt uses. Other text falls apart into characters, so nothing printable in ASCII is unknown.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from .scenes import (
    BACKGROUNDS,
    COLORS,
    PAIR_PHRASINGS,
    PLACES,
    RELATIONS,
    SHAPES,
    SINGLE_PHRASINGS,
    SIZES,
    SLOTS,
)

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
# The longest prompt has 19 words.
MAX_TOKENS = 24
_PAD = -1


def words() -> list[str]:
    """Return every word of the prompts, sorted."""
    text = " ".join((*SINGLE_PHRASINGS, *PAIR_PHRASINGS))
    phrases = [re.sub(r"\{\w+\}", "", text)]
    phrases += [phrase for _, values in SLOTS.values() for phrase in values]
    return sorted(set(re.findall(r"[a-z]+|,", " ".join(phrases))))


def build_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return CLIP's two tables: token to id, and byte-pair merges in order of priority.

    The most frequent pair is merged in all words at once until each word is one token. Replaying
    the merges therefore cannot take another path.
    """
    split = [[*word[:-1], f"{word[-1]}</w>"] for word in words()]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(p for word in split for p in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in split:
            for i in range(len(word) - 2, -1, -1):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
    characters = [chr(code) for code in range(33, 127)]
    tokens = [*characters, *(f"{c}</w>" for c in characters), *map("".join, merges), START, END]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def build_tokenizer() -> CLIPTokenizer:
    """Return the tokenizer, which pads to 24 tokens with the end token as Stable Diffusion does."""
    from transformers import CLIPTokenizer

    vocabulary, merges = build_vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


class CaptionEncoder:
    """Turns codes into token ids on their device, in a random phrasing each.

    Gives exactly the ids that the tokenizer gives for `scenes.prompt(scene, phrasing)`.
    """

    def __init__(self, device: torch.device | str) -> None:
        vocabulary, _ = build_vocabulary()
        self._start, self._end = vocabulary[START], vocabulary[END]

        def ids(text: str) -> list[int]:
            return [vocabulary[f"{word}</w>"] for word in re.findall(r"[a-z]+|,", text)]

        def table(phrases: tuple[str, ...]) -> torch.Tensor:
            rows = [ids(phrase) for phrase in phrases]
            width = max(map(len, rows))
            padded = [row + [_PAD] * (width - len(row)) for row in rows]
            return torch.tensor(padded, device=device)

        tables = {slot: (column, table(phrases)) for slot, (column, phrases) in SLOTS.items()}
        self._phrasings = [
            [
                tables[part[1:-1]]
                if part.startswith("{")
                else (0, table((part,) * len(BACKGROUNDS)))
                for part in re.findall(r"\{\w+\}|[^{}]*[a-z,][^{}]*", phrasing)
            ]
            for phrasing in (*SINGLE_PHRASINGS, *PAIR_PHRASINGS)
        ]

    def __call__(self, codes: torch.Tensor, phrasing: torch.Tensor) -> torch.Tensor:
        """Return ids [B, 24] int64 for codes [B, 9] int64 in the phrasings [B] int64 (0 to 3)."""
        index = phrasing + torch.where(codes[:, 5] >= 0, len(SINGLE_PHRASINGS), 0)
        safe = codes.clamp(min=0)
        # One more column at the end takes what is written for the padding of phrases.
        result = codes.new_full((len(codes), MAX_TOKENS + 1), self._end)
        result[:, 0] = self._start
        for number, parts in enumerate(self._phrasings):
            ids = torch.cat([values[safe[:, column]] for column, values in parts], dim=1)
            ids = torch.where((index == number)[:, None], ids, _PAD)
            position = torch.where(ids == _PAD, MAX_TOKENS, (ids != _PAD).cumsum(dim=1))
            result.scatter_(1, position, ids)
        return result[:, :MAX_TOKENS]

    def empty(self, count: int, device: torch.device | str) -> torch.Tensor:
        """Return the ids [count, 24] of empty prompts."""
        ids = torch.full((count, MAX_TOKENS), self._end, device=device)
        ids[:, 0] = self._start
        return ids


class Corruption:
    """Replaces attribute words by random ones, uniform over all that fit the slot.

    The new word may be the old one.
    """

    def __init__(self, device: torch.device | str) -> None:
        names = tuple(PLACES)
        self._sides = torch.tensor(
            [names.index(first) for first, _ in RELATIONS.values()], device=device
        )

    def __call__(
        self, codes: torch.Tensor, rate: torch.Tensor | float, generator: torch.Generator
    ) -> torch.Tensor:
        """Return codes [B, 9] for captions in which each word is replaced with probability rate."""
        result = codes.clone()
        pair = codes[:, 5] >= 0
        # The last column is left alone: prompts tell the second place through the first.
        item = (len(SHAPES), len(COLORS), len(SIZES))
        for column, size in enumerate((len(BACKGROUNDS), *item, len(PLACES), *item)):
            shape, device = (len(codes),), codes.device
            word = torch.randint(size, shape, generator=generator, device=device)
            if column == 4:
                word = torch.where(pair, self._sides[word % len(self._sides)], word)
            replaced = torch.rand(shape, generator=generator, device=device) < rate
            exists = pair | (column < 5)
            result[:, column] = torch.where(replaced & exists, word, codes[:, column])
        return result
