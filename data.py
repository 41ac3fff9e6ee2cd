"""Documents in, prefixes and suffixes out.

    python -m tools.inspect PATH            # what is there: fields, lengths, samples
    python -m tools.filter PATH --out DIR   # keeps RedPajama's unsafe documents

A document is its tokens and an end of text, cut into chunks of N tokens. One chunk boundary, drawn
at random, gives one sample: up to max_seq - N tokens before it are the prefix, the N tokens after
it the suffix. A sample never holds text of two documents. What follows the last whole chunk, mostly
with the end of text, is in no suffix.

The order of samples is one global order that knows nothing of processes: shards in an order keyed
by the seed, documents in windows permuted by a keyed generator. Every rank walks through all of it,
and of each global batch takes samples rank, rank + world_size, ...; so the state is a few integers,
and a run may go on with another number of ranks.
"""

import hashlib
import re
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from config import Config
from support import command
from support.command import UserError
from support.distributed import rank, world_size

# Shares of the documents, by a hash of their text: whatever the shards, no document is in two.
SPLITS = {
    "train": (0.0, 0.9),
    "teacher": (0.9, 0.98),  # for training judges and rewriters
    "validation": (0.98, 0.99),
    "test": (0.99, 1.0),
    "all": (0.0, 1.0),
}
WINDOW_BYTES = 32 << 20  # a window of the shuffle ends early when its texts pass this size
AHEAD = 3  # batches prepared before they are asked for
PATIENCE = 200_000  # documents without a sample before we give up
OTHERS = ("a sample of another rank",)
WORD = re.compile(r"(?<!\S)[A-Za-z]")  # where a word that begins with a letter begins


@dataclass
class Batch:
    """One process's share of a batch, on the CPU: B prefixes, perhaps none, of at most P tokens
    each, and the N tokens that follow them in their documents."""

    prefix: torch.Tensor  # int64 [B, P], padded on the left with the end-of-text id
    pad: torch.Tensor  # int32 [B], number of padding tokens
    suffix: torch.Tensor  # int64 [B, N]
    index: torch.Tensor  # int64 [B], number of the sample in the run; keys its randomness
    prefix_text: list[str]
    suffix_text: list[str]
    state: dict  # Stream(state=...) goes on right after this batch
    rows: list | None = None  # of teachers/tasks.py: what each prefix asks


def digest(text: str) -> int:
    """64 bits that stand for a text: they decide its split, and tell duplicates."""
    code = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(code, digest_size=8).digest(), "little")


def in_split(key: int, split: str) -> bool:
    low, high = SPLITS[split]
    return low <= key / 2**64 < high


def document_tokens(text: str, tokenizer) -> np.ndarray:
    """int64 [tokens]"""
    return np.array([*tokenizer.start_ids, *tokenizer.encode(text), tokenizer.eos])


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B rows of token ids -> (int64 [B, P] that end together, int32 [B] paddings before each)."""
    length = max(map(len, rows), default=1)
    tokens = torch.full((len(rows), length), pad_id)
    pad = [length - len(row) for row in rows]
    for row, begin, ids in zip(tokens, pad, rows, strict=True):
        row[begin:] = torch.as_tensor(ids)
    return tokens, torch.tensor(pad, dtype=torch.int32)


def cut(
    ids: np.ndarray, key: int, chunk: int, max_seq: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Prefix and suffix around one of the document's chunk boundaries; None if it has none."""
    boundaries = len(ids) // chunk - 1
    if boundaries < 1:
        return None
    middle = chunk * (1 + key % boundaries)
    return ids[max(0, middle - (max_seq - chunk)) : middle], ids[middle : middle + chunk]


def sample_of(text: str, tokenizer, chunk: int, max_seq: int, seed: int = 0, epoch: int = 0):
    """(prefix, suffix) of a document, the same wherever it stands in a corpus, or None."""
    key = digest(f"{seed} {epoch} {text}")
    return cut(document_tokens(text, tokenizer), key, chunk, max_seq)


class Stream:
    """Iterating yields this rank's part of each global batch, prepared in the background."""

    def __init__(
        self,
        source,  # what `sources.list_files` takes, or an object with documents(start)
        tokenizer,
        *,
        chunk: int,
        max_seq: int,
        batch_size: int,  # of the global batch
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        text_field: str | None = None,  # None: whichever of TEXT_FIELDS a line has
        window: int = 1024,  # documents that are shuffled together
        split: str = "train",  # a key of SPLITS; an object with documents() does its own splitting
        epochs: int | None = None,  # None: for ever
        state: dict | None = None,
    ):
        if max_seq < 2 * chunk:
            raise ValueError(f"max_seq {max_seq} can't hold two chunks of {chunk} tokens")
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
        self.from_files, self.skipped, self.source = isinstance(source, str), Counter(), source
        self.name = source if self.from_files else type(source).__name__
        if self.from_files:
            from support.sources import Files, Skips  # the pocket world needs no such file

            self.skipped = Skips()
            self.source = Files(source, self.skipped, text_field, seed)
        self.tokenizer, self.chunk, self.max_seq = tokenizer, chunk, max_seq
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.window, self.split, self.epochs = seed, window, split, epochs
        self.state = state

    def __iter__(self) -> Iterator[Batch]:
        batches, ahead = self.batches(), deque()

        def work(before: list[Future], future: Future) -> None:
            futures.wait(before)
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(next(batches, None))
                except BaseException as error:  # the loop that asks for batches has to hear of it
                    future.set_exception(error)

        try:
            while True:
                while len(ahead) < AHEAD:  # threads that end with the process: a source may hang
                    last, future = [*ahead][-1:], Future()
                    threading.Thread(target=work, args=(last, future), daemon=True).start()
                    ahead.append(future)
                if (batch := command.wait(ahead.popleft())) is None:
                    return
                yield batch
        finally:  # a process that ends while a thread is in native code would be aborted
            for future in ahead:
                future.cancel()
            futures.wait(ahead, 2)

    def batches(self) -> Iterator[Batch]:
        """What iterating yields, without the thread."""
        rows, slots = [], 0
        for number, sample, state in self.samples():
            if sample is not OTHERS:
                rows.append((number, *sample))
            slots += 1
            if slots == self.batch_size:
                yield self.collate(rows, state)
                rows, slots = [], 0
        if slots:
            yield self.collate(rows, state)

    def samples(self) -> Iterator[tuple[int, tuple, dict]]:
        """(number, (prefix, suffix), state right after it) in the global order."""
        state = self.state or {"index": 0, "epoch": 0, "window": 0, "used": 0, "source": None}
        index, epoch, begin = state["index"], state["epoch"], state["source"]
        window, used, idle = state["window"], state["used"], 0
        while self.epochs is None or epoch < self.epochs:
            first = index if (window, used) == (0, 0) else None  # None: joined in mid-epoch
            start = self.source.beginning(epoch) if self.from_files and begin is None else begin
            for texts, end in self.windows(start):
                order = np.random.default_rng([self.seed, epoch, window]).permutation(len(texts))
                for i in range(used, len(texts)):
                    slot = (index - state["index"]) % self.batch_size
                    mine = slot % self.world_size == self.rank
                    sample = self.sample(texts[order[i]], epoch, mine)
                    idle = 0 if sample else idle + 1
                    if idle >= PATIENCE:
                        self.give_up()
                    if sample:
                        place = {"epoch": epoch, "window": window, "used": i + 1, "source": start}
                        yield index, sample, {"index": index + 1, **place}
                        index += 1
                window, used, start = window + 1, 0, end
            if index == first:
                self.give_up()
            epoch, window, used, begin = epoch + 1, 0, 0, None

    def windows(self, start: dict | None) -> Iterator[tuple[list[str], Any]]:
        """Texts that are shuffled together, and the position after them, to the end of an epoch."""
        texts, size, end = [], 0, start
        for text, end in self.source.documents(start):
            if self.from_files and not in_split(digest(text), self.split):
                self.skipped[f"not in split {self.split}"] += 1
                continue
            texts.append(text)
            size += len(text)
            if len(texts) == self.window or size > WINDOW_BYTES:
                yield texts, end
                texts, size = [], 0
        if texts:
            yield texts, end

    def sample(self, text: str, epoch: int, mine: bool) -> tuple | None:
        """(prefix, suffix); None if the text is too short; OTHERS if it is another rank's."""
        if not mine and self.surely_long(text):
            return OTHERS  # without the work of tokenising it
        sample = sample_of(text, self.tokenizer, self.chunk, self.max_seq, self.seed, epoch)
        if sample is None:
            self.skipped["shorter than two chunks"] += 1
        return sample if mine or sample is None else OTHERS

    def surely_long(self, text: str) -> bool:
        """Where no token spans two words, there are at least as many tokens as words."""
        least = 2 * self.chunk
        if not self.tokenizer.splits_words:
            return False
        return sum(1 for _ in islice(WORD.finditer(text), least + 1)) > least

    def collate(self, rows: list, state: dict) -> Batch:
        prefix, pad = left_pad([prefix for _, prefix, _ in rows], self.tokenizer.eos)
        suffixes = np.array([suffix for *_, suffix in rows], dtype=np.int64)
        return Batch(
            prefix=prefix,
            pad=pad,
            suffix=torch.from_numpy(suffixes.reshape(len(rows), self.chunk)),
            index=torch.tensor([number for number, *_ in rows], dtype=torch.int64),
            prefix_text=[self.tokenizer.decode(prefix) for _, prefix, _ in rows],
            suffix_text=[self.tokenizer.decode(suffix) for *_, suffix in rows],
            state=state,
        )

    def give_up(self) -> None:
        counts = ", ".join(f"{reason}: {count}" for reason, count in self.skipped.items())
        raise UserError(f"no document to use in {self.name} ({counts or 'it is empty'})")


def open_stream(source, tokenizer, config: Config, kind=Stream, **how) -> Stream:
    """The batches of this process: of documents, or of what another `kind` of Stream reads."""
    return kind(
        source,
        tokenizer,
        chunk=config.chunk,
        max_seq=config.max_seq,
        batch_size=config.batch_size,
        rank=rank(),
        world_size=world_size(),
        seed=config.seed,
        text_field=None if config.text_field == "auto" else config.text_field,
        window=config.window,
        **how,
    )
