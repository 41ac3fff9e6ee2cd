"""Chats in batches: requests that wait are sampled side by side by rollout.py's own sampler.

In: `Work` (a prompt's token ids, how many answers, how to sample). Out: the same Work, its answers
a token longer each `step`.

Requests that want the same temperature, top_p and number of answers share a batch, the longest
waiting first, as many as fit into the memory; a batch is done when its last answer is. So one who
comes late waits for the batch before: a teacher is asked alike questions, many at a time.
"""

import asyncio
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from data import left_pad
from model import Llama, load_model
from rollout import decode
from support.tokenizer import load_tokenizer


@dataclass(eq=False)
class Answer:
    """One answer, while it is written."""

    ids: list[int] = field(default_factory=list)  # without the token that ended it
    sampled: int = 0  # tokens, the ending one included
    text: str = ""  # what of it is certain: no half of a character, nothing that may become a stop
    finish: str | None = None  # "stop", "length" or, set by whoever sees it fail, "error"


@dataclass(eq=False)
class Work:
    """A request: n answers to one prompt."""

    prompt: list[int]
    uniform: torch.Tensor  # float32 [n, N]: the random number behind each token
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    follow: bool = False  # its text is read while it is written
    gone: bool = False  # set by whoever no longer wants it
    news: asyncio.Event = field(default_factory=asyncio.Event)  # for whoever waits; not set here

    def __post_init__(self):
        self.answers = [Answer() for _ in self.uniform]

    @property
    def kind(self) -> tuple:
        return len(self.uniform), self.temperature, self.top_p

    def done(self) -> bool:
        return self.gone or all(answer.finish for answer in self.answers)


class Engine:
    """Batches of at most `size` answers. ends: ids that end an answer; memory: bytes of caches."""

    def __init__(self, model: Llama, ends: tuple[int, ...], decode_text, size: int, memory: int):
        c = model.config
        self.model, self.ends, self.text_of, self.size = model, ends, decode_text, size
        bytes_each = 2 * c.n_layer * c.n_kv_head * c.head_dim * model.compute_dtype.itemsize
        self.room = memory // bytes_each  # tokens whose keys and values fit
        self.waiting: deque[Work] = deque()
        self.batch: list[Work] = []
        self.tokens: Iterator = iter(())

    @property
    def busy(self) -> bool:
        return bool(self.batch or self.waiting)

    def needs(self, works: list[Work]) -> int:
        """Tokens of the caches of a batch: every prefix and answer is as long as the longest."""
        P, N = max(len(w.prompt) for w in works), max(w.uniform.shape[1] for w in works)
        return len(works) * (P + len(works[0].uniform) * N)

    def admit(self):
        """Make a batch of what waits."""
        for _ in range(len(self.waiting)):
            work = self.waiting.popleft()
            together = [*self.batch, work]
            alike = work.kind == together[0].kind
            fits = len(together) * len(work.uniform) <= self.size
            fits &= self.needs(together) <= self.room
            if work.gone:
                continue
            if not self.batch or (alike and fits):
                self.batch.append(work)
            else:
                self.waiting.append(work)
        if self.batch:
            N = max(work.uniform.shape[1] for work in self.batch)
            prefix, pad = left_pad([work.prompt for work in self.batch], 0)  # [B, P], [B]
            u = [F.pad(work.uniform, (0, N - work.uniform.shape[1])) for work in self.batch]
            _, temperature, top_p = self.batch[0].kind
            device = self.model.lm_head.weight.device
            inputs = (x.to(device) for x in (prefix, pad, torch.stack(u)))  # u [B, n, N]
            self.tokens = decode(self.model, *inputs, temperature, top_p)

    def step(self) -> list[Work]:
        """The next token of every answer of the batch. -> its requests"""
        if not self.batch:
            self.admit()
        batch = self.batch
        if batch:
            for work, row in zip(batch, next(self.tokens)[0].tolist(), strict=True):
                for answer, token in zip(work.answers, row, strict=True):
                    if not (work.gone or answer.finish):
                        self.take(work, answer, token)
            if all(work.done() for work in batch):
                self.clear()
        return batch

    def take(self, work: Work, answer: Answer, token: int):
        """One more token of an answer; its text as far as it is certain."""
        answer.sampled += 1
        finish = "stop" if token in self.ends else None
        if not finish:
            answer.ids.append(token)
        ended = finish or answer.sampled == work.uniform.shape[1]
        if not (ended or work.follow or work.stop):
            return  # nobody looks yet
        text = self.text_of(answer.ids)
        cut = min((at for stop in work.stop if (at := text.find(stop)) >= 0), default=None)
        if cut is not None:
            text, finish = text[:cut], "stop"
        elif ended:
            finish = finish or "length"
        else:
            text = text.rstrip("\ufffd")
            heads = (stop[:n] for stop in work.stop for n in range(len(stop) - 1, 0, -1))
            text = text[: len(text) - max((len(h) for h in heads if text.endswith(h)), default=0)]
        answer.text = text
        answer.finish = finish  # last: another thread reads the text of what is finished

    def clear(self):
        """Forget the batch."""
        self.batch, self.tokens = [], iter(())


def load_engine(folder: str, size: int, device: str, memory: int | None = None):
    """(Engine, tokenizer) of a folder; memory: bytes, else half of a GPU's free ones or a quarter
    of this machine's."""
    # float32 is fast and exact on a CPU; 16 bits are what GPUs are made for
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = load_model(folder, device, dtype).requires_grad_(False)
    tokenizer = load_tokenizer(folder)
    if not memory and model.lm_head.weight.is_cuda:
        memory = torch.cuda.mem_get_info(device)[0] // 2
    elif not memory:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    ends = tokenizer.eos, *model.end_tokens
    return Engine(model, ends, tokenizer.decode, size, memory), tokenizer
