"""Chats in batches: requests that wait are sampled side by side by rollout.py's own sampler.

In: `Work` (a prompt's token ids, how many answers, how to sample). Out: the pieces of its answers,
as far as they are certain.

Requests that want the same temperature, top_p and number of answers share a batch, the longest
waiting first, as many as fit into the memory; a batch is done when its last answer is. So one who
comes late waits for the batch before: a teacher is asked alike questions, many at a time.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from data import left_pad
from model import load_model
from rollout import decode
from support.tokenizer import load_tokenizer


class ModelFailed(Exception):
    """Said to whoever asked."""


@dataclass
class Answer:
    """One answer, while it is written."""

    ids: list[int] = field(default_factory=list)  # without the token that ended it
    sampled: int = 0  # tokens, the ending one included
    told: int = 0  # characters handed on
    finish: str | None = None  # "stop" or "length"


@dataclass(eq=False)
class Work:
    """A request: n answers to one prompt."""

    prompt: list[int]
    uniform: torch.Tensor  # float32 [n, N]: the random number behind each token
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    follow: bool = False  # its text is read while it is written

    def __post_init__(self):
        self.answers = [Answer() for _ in self.uniform]
        self.news: asyncio.Queue = asyncio.Queue()  # what `pieces` yields; None: the model failed
        self.gone = False  # nobody wants it any more

    @property
    def kind(self) -> tuple:
        return len(self.uniform), self.temperature, self.top_p

    def done(self) -> bool:
        return self.gone or all(answer.finish for answer in self.answers)

    async def pieces(self) -> AsyncIterator[tuple[int, str, str | None]]:
        """(number of an answer, its new text, how it ended or None), as the answers go on."""
        going_on = len(self.answers)
        while going_on:
            if (piece := await self.news.get()) is None:
                raise ModelFailed("the model failed; the server's log says why")
            yield piece
            going_on -= piece[2] is not None


class Engine:
    """A folder's model and the batches of at most `size` answers that it writes.

    memory: bytes for their caches, else half of a GPU's free ones or a quarter of this machine's.
    """

    def __init__(self, folder: str, size: int, device: str, memory: int | None = None):
        # float32 is fast and exact on a CPU; 16 bits are what GPUs are made for
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.model = load_model(folder, device, dtype).requires_grad_(False)
        self.tokenizer, self.size, c = load_tokenizer(folder), size, self.model.config
        self.ends = self.tokenizer.eos, *self.model.end_tokens  # ids that end an answer
        if not memory and self.model.lm_head.weight.is_cuda:
            memory = torch.cuda.mem_get_info(device)[0] // 2
        elif not memory:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
        number = self.model.compute_dtype.itemsize
        # tokens whose keys and values fit
        self.room = memory // (2 * c.n_layer * c.n_kv_head * c.head_dim * number)
        self.works: list[Work] = []  # whatever waits or is being answered
        self.waiting: list[Work] = []
        self.wake = asyncio.Event()

    @contextlib.contextmanager
    def working_on(self, work: Work):
        """Within, answers to it are written."""
        self.works.append(work)
        self.waiting.append(work)
        self.wake.set()
        try:
            yield
        finally:
            work.gone = True
            self.works.remove(work)

    async def run(self):
        """Batch after batch as long as somebody waits, the model in a thread of its own."""
        while await self.wake.wait():
            self.wake.clear()
            while batch := self.admit():
                try:
                    tokens = self.sampled(batch)
                    while not all(work.done() for work in batch):
                        rows = await asyncio.to_thread(next, tokens)  # [B][n]
                        for work, row in zip(batch, rows, strict=True):
                            self.take(work, row)
                    tokens.close()  # its caches, too; a cancelled one may still be running
                except Exception:
                    logging.exception("a batch failed")
                    for work in batch:
                        work.news.put_nowait(None)

    def admit(self) -> list[Work]:
        """The longest waiting, and of those behind it who are like it as many as fit."""
        waiting, self.waiting, batch = self.waiting, [], []
        for work in (work for work in waiting if not work.gone):
            together = [*batch, work]
            P = max(len(each.prompt) for each in together)  # prefix and answers are as long as
            N = max(each.uniform.shape[1] for each in together)  # the longest
            n = len(work.uniform)
            fits = len(together) * n <= self.size and len(together) * (P + n * N) <= self.room
            joins = not batch or (fits and work.kind == batch[0].kind)
            (batch if joins else self.waiting).append(work)
        return batch

    def sampled(self, batch: list[Work]) -> Iterator[list[list[int]]]:
        """The next token of every answer of every request, [B][n], again and again."""
        N = max(work.uniform.shape[1] for work in batch)
        prefix, pad = left_pad([work.prompt for work in batch], 0)  # [B, P], [B]
        u = [F.pad(work.uniform, (0, N - work.uniform.shape[1])) for work in batch]
        device = self.model.lm_head.weight.device
        inputs = (x.to(device) for x in (prefix, pad, torch.stack(u)))  # u [B, n, N]
        for token, _ in decode(self.model, *inputs, batch[0].temperature, batch[0].top_p):
            yield token.tolist()

    def take(self, work: Work, row: list[int]):
        """One more token of each answer; the news are what of its text has become certain."""
        for number, (answer, token) in enumerate(zip(work.answers, row, strict=True)):
            if answer.finish:
                continue
            answer.sampled += 1
            if token in self.ends:
                answer.finish = "stop"
            else:
                answer.ids.append(token)
                if answer.sampled == work.uniform.shape[1]:
                    answer.finish = "length"
            if not (answer.finish or work.follow or work.stop):
                continue  # nobody looks yet
            text = self.tokenizer.decode(answer.ids)
            cut = min((at for stop in work.stop if (at := text.find(stop)) >= 0), default=None)
            if cut is not None:
                text, answer.finish = text[:cut], "stop"
            elif not answer.finish:
                text = certain(text, work.stop)
            if answer.finish or len(text) > answer.told:
                work.news.put_nowait((number, text[answer.told :], answer.finish))
                answer.told = len(text)


def certain(text: str, stops: tuple[str, ...]) -> str:
    """Without half a character at the end, and without what may become a stop."""
    text = text.rstrip("\ufffd")
    heads = (stop[:n] for stop in stops for n in range(len(stop) - 1, 0, -1))
    return text[: len(text) - max((len(head) for head in heads if text.endswith(head)), default=0)]
