"""Continuous batching: answers of any length sampled side by side, joining and leaving at will.

In: Rows (a prompt's token ids, and how to sample). Out: the same Rows, a token longer each `step`.

All rows write their next key and value into the same column of the cache, `now`, and a row owns the
columns from its start up to there. So one write and one mask serve rows of every age:

        column   0  1  2  3  4  5  6   now
        row 0       x  x  x  x  x  x         prompt of 4, two tokens sampled since
        row 1                x  x  x         prompt of 3, just admitted

Prompts are kept with their keys and values, the latest PROMPT_BYTES of them: n answers to one
prompt, a repeated prompt and the common head of different prompts are computed once.
"""

import json
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model import Llama, load_model, rope_tables
from rollout import sample
from support.hub import check_folder, local_folder
from support.tokenizer import load_tokenizer

PROMPT_BYTES = 1 << 28  # what is kept of prompts for reuse
BLOCK = 16  # prompts share heads of a multiple of this many tokens
ROOM = 128  # columns added when the cache is full
CHUNK = 512  # tokens of a prompt in one forward pass
ADMITTED = 1 << 14  # prompt tokens admitted in one step, padding included


@dataclass
class Row:
    """One answer: what to sample, and what has been sampled."""

    prompt: tuple[int, ...]
    uniform: np.ndarray  # the random number behind each token; as many as tokens allowed
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    top: int | None = None  # report log-probabilities, and of so many alternatives
    score: bool = False  # report those of the prompt, too
    ids: list[int] = field(default_factory=list)  # without the token that ended it
    logprobs: list = field(default_factory=list)  # of each: (log p, [(id, log p), ...])
    prompt_logprobs: list = field(default_factory=list)  # from the second token on
    sampled: int = 0  # tokens, the ending one included
    finish: str | None = None  # "stop", "length" or, set by whoever sees it fail, "error"
    gone: bool = False  # set by whoever no longer wants it


def extend(model: Llama, cache, start, tokens):
    """Feed N more tokens to each of R rows.

    cache [L, 2, R, Hkv, T, D]: keys and values, of which row r owns the columns from start[r] on;
    the last N of them are written here. start int64 [R], tokens int64 [R, N] -> hidden [R, N, d].
    """
    N, T, c = tokens.shape[1], cache.shape[4], model.config
    G = c.n_head // c.n_kv_head
    column = torch.arange(T, device=tokens.device)
    at = column[T - N :, None]
    unseen = (column < start[:, None, None]) | (column > at)  # [R, N, T]
    bias = torch.zeros_like(unseen, dtype=cache.dtype).masked_fill_(unseen, -torch.inf)
    bias = bias.repeat(1, G, 1)[:, None]  # [R, 1, G * N, T]
    cos, sin = rope_tables(c, at.T - start[:, None])
    x = model.model.embed_tokens(tokens)
    for layer, (keys, values) in zip(model.model.layers, cache, strict=True):
        q, k, v = layer.before(x, cos, sin)  # q [R, H, N, D]
        keys[:, :, T - N :], values[:, :, T - N :] = k, v
        q = q.unflatten(1, (-1, G)).flatten(2, 3)  # the heads of a group ask the same keys
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)
        out = out.unflatten(2, (G, N)).flatten(1, 2)  # [R, H, N, D]
        x = layer.after(x, out.transpose(1, 2).flatten(2))
    return model.model.norm(x)


def describe(logits, tokens, top: int) -> list:
    """(log p of the token, the `top` likeliest as (id, log p)) of each row of logits [M, V]."""
    logp = torch.log_softmax(logits.float(), dim=-1)
    own = logp.gather(1, tokens[:, None])[:, 0].tolist()
    best = logp.topk(top)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        (p, list(zip(ids, values, strict=True)))
        for p, (ids, values) in zip(own, pairs, strict=True)
    ]


class Prompts:
    """Keys, values [L, 2, Hkv, P, D] and last logits [V] of the latest prompts."""

    def __init__(self):
        self.kept, self.heads, self.bytes = OrderedDict(), {}, 0

    def longest(self, prompt):
        """(n, keys and values) of the longest head of the prompt that is known; (0, None)."""
        for n in range((len(prompt) - 1) // BLOCK * BLOCK, 0, -BLOCK):
            whole = self.heads.get(hash(prompt[:n]))
            if whole is not None and whole[:n] == prompt[:n]:
                self.kept.move_to_end(whole)
                return n, self.kept[whole][0][..., :n, :]
        return 0, None

    def keep(self, prompt, computed):
        if prompt in self.kept:
            return
        self.kept[prompt] = computed
        self.bytes += sum(part.nbytes for part in computed)
        for n in range(BLOCK, len(prompt) + 1, BLOCK):
            self.heads[hash(prompt[:n])] = prompt
        while self.bytes > PROMPT_BYTES:
            oldest, computed = self.kept.popitem(last=False)
            self.bytes -= sum(part.nbytes for part in computed)
            for n in range(BLOCK, len(oldest) + 1, BLOCK):
                if self.heads.get(hash(oldest[:n])) == oldest:
                    del self.heads[hash(oldest[:n])]


class Engine:
    """At most `size` rows at a time; the others wait their turn.

    ends: ids that end an answer; decode: ids -> text, for stop strings. Not thread-safe but for
    `waiting.append`.
    """

    def __init__(self, model: Llama, ends: set[int], decode, size: int = 64):
        c, self.model, self.ends, self.decode, self.size = model.config, model, ends, decode, size
        weight = model.lm_head.weight
        self.device, self.prompts = weight.device, Prompts()
        self.waiting, self.rows, self.starts = deque(), [], []  # row i stands in slot i
        self.now = 0  # the column that is written next
        self.cache = weight.new_zeros(c.n_layer, 2, 0, c.n_kv_head, 0, c.head_dim)
        self.logits = weight.new_zeros(size, c.vocab_size)  # of each row's next token

    def clear(self):
        """Forget all rows."""
        self.waiting.clear(), self.rows.clear(), self.starts.clear()

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self.rows)

    @torch.no_grad()
    def step(self) -> list[Row]:
        """Admit rows, sample a token of each, feed it to the model. -> the rows that changed."""
        done = self.admit()
        rows = list(self.rows)
        if rows:
            self.sample()
        for i in reversed(range(len(rows))):
            if rows[i].finish or rows[i].gone:
                self.remove(i)
        if self.rows:
            self.feed()
        return done + rows

    def admit(self) -> list[Row]:
        """Waiting rows to free slots, a quarter of all at a time. -> those finished already."""
        free = self.size - len(self.rows)
        if free < min(len(self.waiting), -(-self.size // 4)):
            return []
        new, longest = [], 0
        while self.waiting and len(new) < free:
            longest = max(longest, len(self.waiting[0].prompt))
            if new and longest * (len(new) + 1) > ADMITTED:
                break
            if not (row := self.waiting.popleft()).gone:
                new.append(row)
        computed = self.prefill(new)
        done = [row for row in new if not len(row.uniform)]  # it only wanted its prompt scored
        new = [row for row in new if len(row.uniform)]
        if new:
            self.reserve(len(self.rows) + len(new), max(len(row.prompt) for row in new))
        for row in new:
            i, start = len(self.rows), self.now - len(row.prompt)
            kv, self.logits[i] = computed[row.prompt]
            self.cache[:, :, i, :, start : self.now] = kv
            self.rows.append(row)
            self.starts.append(start)
        for row in done:
            row.finish = "length"
        return done

    def prefill(self, rows: list[Row]) -> dict:
        """The keys, values and last logits of every distinct prompt of the rows."""
        scored = {}  # prompts whose own log-probabilities are wanted: computed from their start
        for row in rows:
            if row.score:
                scored.setdefault(row.prompt, []).append(row)
        known = {row.prompt: self.prompts.kept.get(row.prompt) for row in rows}
        todo = [prompt for prompt, found in known.items() if found is None or prompt in scored]
        while todo:  # of prompts that begin alike, one goes first and the others use its head
            wave, coming, later = [], set(), []
            for prompt in todo:
                n, head = (0, None) if prompt in scored else self.prompts.longest(prompt)
                beginning = prompt[: n + BLOCK]
                if beginning in coming and prompt not in scored:
                    later.append(prompt)
                else:
                    wave.append((prompt, n, head))
                    coming.add(beginning)
            known.update(self.compute(wave, scored))
            todo = later
        return known

    def compute(self, wave: list, scored: dict) -> dict:
        """prompt -> (keys and values, last logits) for each (prompt, length of head, head)."""
        h = max(n for _, n, _ in wave)
        fresh = [len(prompt) - n for prompt, n, _ in wave]
        N, shape = max(fresh), self.cache.shape
        # [head, right-aligned | fresh tokens, left-aligned]: what pads the right is never seen
        cache = self.cache.new_zeros(*shape[:2], len(wave), shape[3], h + N, shape[5])
        tokens = torch.zeros(len(wave), N, dtype=torch.int64)
        for r, (prompt, n, head) in enumerate(wave):
            tokens[r, : fresh[r]] = torch.tensor(prompt[n:])
            if n:
                cache[:, :, r, :, h - n : h] = head
        tokens = tokens.to(self.device)
        start = torch.tensor([h - n for _, n, _ in wave], device=self.device)
        hidden = [
            extend(
                self.model, cache[..., : h + min(i + CHUNK, N), :], start, tokens[:, i : i + CHUNK]
            )
            for i in range(0, N, CHUNK)
        ]
        hidden = torch.cat(hidden, dim=1)  # [R, N, d]
        last = torch.tensor(fresh, device=self.device) - 1
        logits = self.model.logits(hidden[torch.arange(len(wave)), last])
        computed = {}
        for r, (prompt, n, _) in enumerate(wave):
            kv = cache[:, :, r, :, h - n : h + fresh[r]].clone()
            computed[prompt] = kv, logits[r].clone()
            self.prompts.keep(prompt, computed[prompt])
            for row in scored.get(prompt, ()):
                for i in range(0, fresh[r] - 1, CHUNK):
                    ahead = tokens[r, i + 1 : min(i + CHUNK + 1, fresh[r])]
                    logit = self.model.logits(hidden[r, i : i + len(ahead)])
                    row.prompt_logprobs += describe(logit, ahead, row.top)
        return computed

    def reserve(self, rows: int, columns: int):
        """Slots for so many rows, `now` at `columns` at least, and a column to write to."""
        R, size = len(self.rows), list(self.cache.shape)
        width = self.now - min(self.starts, default=self.now)
        if not R:
            self.now = columns
        if rows <= size[2] and columns <= self.now < size[4]:
            return
        now = max(width, columns)
        size[2] = max(size[2], min(self.size, 1 << (rows - 1).bit_length()))
        size[4] = now + ROOM
        cache = self.cache.new_zeros(size)
        old = self.cache[:, :, :R, :, self.now - width : self.now]
        cache[:, :, :R, :, now - width : now] = old
        self.starts = [start + now - self.now for start in self.starts]
        self.cache, self.now = cache, now

    def sample(self):
        """The next token of every row."""
        alike = defaultdict(list)
        for i, row in enumerate(self.rows):
            alike[row.temperature, row.top_p].append(i)
        for (temperature, top_p), group in alike.items():
            logits = self.logits[group]
            u = torch.tensor([float(self.rows[i].uniform[self.rows[i].sampled]) for i in group])
            tokens, _ = sample(logits, u.to(self.device), temperature, top_p)
            for j, (i, token) in enumerate(zip(group, tokens.tolist(), strict=True)):
                row = self.rows[i]
                row.sampled += 1
                if token in self.ends:
                    row.finish = "stop"
                    continue
                row.ids.append(token)
                if row.top is not None:
                    row.logprobs += describe(logits[j : j + 1], tokens[j : j + 1], row.top)
                if row.stop and (text := self.decode(row.ids)) and any(s in text for s in row.stop):
                    row.finish = "stop"
                elif row.sampled == len(row.uniform):
                    row.finish = "length"

    def feed(self):
        """The sampled tokens to the model: one more column, the next logits."""
        R = len(self.rows)
        self.reserve(R, 0)
        first = min(self.starts)
        tokens = torch.tensor([[row.ids[-1]] for row in self.rows], device=self.device)
        start = torch.tensor(self.starts, device=self.device) - first
        hidden = extend(self.model, self.cache[:, :, :R, :, first : self.now + 1], start, tokens)
        self.logits[:R] = self.model.logits(hidden[:, 0])
        self.now += 1

    def remove(self, i: int):
        """Free slot i; the last row moves there."""
        row, start = self.rows.pop(), self.starts.pop()
        if (last := len(self.rows)) != i:
            self.rows[i], self.starts[i] = row, start
            self.cache[:, :, i, :, start : self.now] = self.cache[:, :, last, :, start : self.now]
            self.logits[i] = self.logits[last]


# --- Around it -----------------------------------------------------------------------------------


def load_engine(folder: str, size: int, device: str = "cpu"):
    """(Engine, tokenizer) of a folder; ValueError says what is wrong with it."""
    # float32 is fast and exact on a CPU; 16 bits are what GPUs are made for
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    check_folder(folder)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, device, dtype).requires_grad_(False)
    ends = {tokenizer.eos, *end_tokens(local_folder(folder, weights=False))}
    return Engine(model, ends, tokenizer.decode, size), tokenizer


def end_tokens(folder: Path) -> list[int]:
    """The ids that end an answer by config.json and generation_config.json."""
    found = []
    for path in (folder / "config.json", folder / "generation_config.json"):
        if path.exists():
            try:
                eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{path} can't be read: {error}") from None
            found += eos if isinstance(eos, list) else [eos]
    return [i for i in found if type(i) is int]


def plain(tokenizer, text: str) -> list[int]:
    """A text as a prompt: at least one token, and the one that the tokenizer puts first."""
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    return start + tokenizer.encode(text) or [tokenizer.eos]


def certain(text: str, stops: tuple[str, ...], final: bool) -> str:
    """Up to the first stop string; before the end also without what the next token may change:
    half a character, half a stop string."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    if found or final:
        return text[: min(found, default=None)]
    text = text.rstrip("\ufffd")
    halves = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return text[: len(text) - max(halves, default=0)]
