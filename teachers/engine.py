"""Continuous batching: answers of any length sampled side by side, joining and leaving at will.

In: Rows (a prompt's token ids, and how to sample), one request's at a time by `add`, from any
thread. Out: the same Rows, whose text grows with each `step`.

A step is one forward pass over tokens of many rows laid end to end: the next token of every row
that is being written, and pieces of prompts that are being read, of bounded length in all, so that
a long prompt holds nobody up:

    tokens   [row 0's next | row 1's next | row 2's next | row 3's prompt, tokens 256 ... 511]

Keys and values lie in lanes: [slots, columns], where a row has as many columns as it can ever need,
for its prompt and all of its answer. A row leaves the queue only if these fit into `memory` bytes
beside those in use. Requests take turns: the next row is one of the request with the fewest rows at
work, and a request with none takes the place of another's row. What a prompt has in common with one
that was read before is copied, not computed, as long as that one's slot has not been needed.
"""

import os
import re
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model import Llama, load_model, rope_tables
from rollout import sample
from support.hub import check_folder, end_tokens
from support.tokenizer import load_tokenizer

CHUNK = {"cpu": 256, "cuda": 2048}  # tokens of prompts read in one step
BLOCK = 16  # a prompt waits for another that has so many more tokens in common with it


@dataclass(eq=False)
class Row:
    """One answer: what to sample, and what has been sampled."""

    prompt: tuple[int, ...]
    uniform: np.ndarray  # the random number behind each token; as many as tokens allowed
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    text: str = ""  # of the answer: what no later token can change
    sampled: int = 0  # tokens, the ending one included
    finish: str | None = None  # "stop", "length" or, set by whoever sees it fail, "error"
    gone: bool = False  # set by whoever no longer wants it
    # the engine's own
    tokens: list[int] = field(default_factory=list)  # prompt and answer, but for the ending token
    seen: int = 0  # of the tokens: those whose keys and values are in the cache
    decoded: str = ""  # the answer up to the last whole character
    settled: int = 0  # of the tokens: the prompt and those behind `decoded`
    turn: int = 0  # when it was placed
    begun: bool = False  # reading its prompt
    head: tuple[int, ...] = ()  # tokens that are seen, and some beyond

    def __post_init__(self):
        self.tokens, self.settled = list(self.prompt), len(self.prompt)
        self.known = np.array(self.prompt)

    @property
    def unseen(self) -> int:
        return len(self.tokens) - self.seen


class Lane:
    """Keys and values of rows that need about as many columns."""

    def __init__(self, model: Llama, width: int):
        c, self.width = model.config, width
        empty = model.lm_head.weight.new_zeros(2, 0, c.n_kv_head, width, c.head_dim)
        self.caches = [empty] * c.n_layer  # of each layer [2, slots, Hkv, width, D]
        self.rows = []  # rows[i] stands in slot i
        self.past = []  # (prompt, tokens seen) of what was in the slots behind these

    @property
    def slots(self) -> int:
        return self.caches[0].shape[1]

    @property
    def seen(self) -> list[tuple[np.ndarray, int]]:
        """Of every slot in use: the prompt, and how many tokens' columns are there."""
        return [(row.known, row.seen) for row in self.rows] + self.past

    def resize(self, slots: int):
        """Layer by layer, so that only one of them is ever there twice."""
        self.past = self.past[: slots - len(self.rows)]
        R, T = len(self.seen), max((n for _, n in self.seen), default=0)
        for i, old in enumerate(self.caches):
            # zeros: a masked column's weight is 0, and 0 * nan would be nan
            self.caches[i] = old.new_zeros(2, slots, *old.shape[2:])
            self.caches[i][:, :R, :, :T] = old[:, :R, :, :T]

    def add(self, row: Row):
        """To the first free slot, where the row's beginning may be left from an earlier one."""
        row.lane, row.slot, row.begun = self, len(self.rows), False
        self.rows.append(row)
        left, n = self.past.pop(0) if self.past else (row.known, 0)
        row.seen = min(common(left, row.known), n, len(row.tokens) - 1)

    def remove(self, row: Row):
        """The last row moves to its slot, and what it leaves goes where that was."""
        a, b, n = row.slot, len(self.rows) - 1, max(row.seen, self.rows[-1].seen)
        if a != b:
            for cache in self.caches:
                left = cache[:, a, :, :n].clone()
                cache[:, a, :, :n] = cache[:, b, :, :n]
                cache[:, b, :, :n] = left
        self.rows[a] = self.rows[-1]
        self.rows.pop().slot = a
        self.past.insert(0, (row.known, row.seen))


class Part:
    """What a step reads in one lane: the next N tokens of each of R rows, in the lane's order."""

    def __init__(self, rows: list[Row], N: int, group: int):
        """group: query heads that share a key's."""
        self.rows, self.group, self.shape = rows, group, (len(rows), N)
        self.caches = rows[0].lane.caches
        self.tokens = [token for row in rows for token in row.tokens[row.seen : row.seen + N]]
        device = self.caches[0].device
        slots, seen = torch.tensor([(row.slot, row.seen) for row in rows], device=device).T
        self.at = slots[:, None], seen[:, None] + torch.arange(N, device=device)  # columns [R, N]
        # neighbours are a view of the cache, others have to be copied
        first, last = rows[0].slot, rows[-1].slot + 1
        self.slots = slice(first, last) if last - first == len(rows) else slots
        self.T = max(row.seen for row in rows) + N
        hidden = torch.arange(self.T, device=device) > self.at[1][:, :, None]  # [R, N, T]
        bias = torch.zeros_like(hidden, dtype=self.caches[0].dtype).masked_fill_(hidden, -torch.inf)
        self.bias = (bias if N == 1 else bias.repeat(1, group, 1))[:, None]  # [R, 1, G * N, T]

    def attend(self, layer: int, q, k, v):
        """q [H, R * N, D], k, v [Hkv, R * N, D] -> [R * N, H * D]; k and v go into the cache."""
        cache, (slots, columns) = self.caches[layer], self.at
        new = torch.stack((k, v)).unflatten(2, self.shape)  # [2, Hkv, R, N, D]
        cache[:, slots, :, columns] = new.permute(2, 3, 0, 1, 4)
        keys, values = cache[:, self.slots, :, : self.T]  # [R, Hkv, T, D]
        q = q.unflatten(1, self.shape).unflatten(0, (-1, self.group))  # [Hkv, G, R, N, D]
        q = q.permute(2, 0, 1, 3, 4).flatten(2, 3)  # the heads of a group ask the same keys
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.bias)
        out = out.unflatten(2, (self.group, -1)).permute(0, 3, 1, 2, 4)  # [R, N, Hkv, G, D]
        return out.flatten(2).flatten(0, 1)


class Engine:
    """At most `size` rows at a time, with caches of at most `memory` bytes; others wait their turn.

    ends: ids that end an answer; decode: ids -> text. Not thread-safe but for `add`.
    """

    def __init__(
        self,
        model: Llama,
        ends: set[int],
        decode: Callable[[list[int]], str],
        size: int = 64,
        memory: int | None = None,
    ):
        self.model, self.ends, self.decode, self.size = model, ends, decode, size
        weight, c = model.lm_head.weight, model.config
        self.memory = free_memory(weight.device) // 2 if memory is None else memory
        self.column = 2 * c.n_layer * c.n_kv_head * c.head_dim * weight.element_size()  # bytes
        self.device, self.chunk = weight.device, CHUNK.get(weight.device.type, CHUNK["cuda"])
        self.inbox, self.turns = deque(), 0
        self.clear()

    def clear(self):
        """Forget all rows."""
        self.inbox.clear()
        self.waiting: dict[int, deque[Row]] = {}  # of each request
        self.lanes: list[Lane] = []

    def add(self, rows: list[Row]):
        """The rows of one request."""
        for row in rows:
            row.request = id(rows[0])
        self.inbox.append(rows)

    @property
    def rows(self) -> list[Row]:
        return [row for lane in self.lanes for row in lane.rows]

    @property
    def busy(self) -> bool:
        return bool(self.inbox or self.waiting or self.rows)

    @property
    def longest(self) -> int:
        """Tokens, prompt and answer, of the longest row that can ever be computed."""
        return min(self.model.config.max_seq, self.memory // self.column)

    @torch.no_grad()
    def step(self) -> list[Row]:
        """Admit rows, read and write some tokens. -> the rows that have gone on."""
        self.leave()
        self.admit()
        parts = self.plan()
        if not parts:
            return []
        hidden = self.forward(parts)
        for part in parts:
            for row in part.rows:
                row.seen += part.shape[1]
        rows = [row for part in parts for row in part.rows]
        whole = [i for i, row in enumerate(rows) if not row.unseen]
        rows = [rows[i] for i in whole]
        if rows:
            self.sample(rows, self.model.logits(hidden[whole]))
        self.leave()
        return rows

    # --- Whose turn it is ------------------------------------------------------------------------

    def leave(self):
        """Those leave that are finished or no longer wanted."""
        for row in self.rows:
            if row.finish or row.gone:
                row.lane.remove(row)

    def admit(self):
        """Waiting rows to lanes."""
        while self.inbox:
            rows = self.inbox.popleft()
            self.waiting[rows[0].request] = deque(rows)
        running, content = Counter(row.request for row in self.rows), set()
        while asking := [request for request in self.waiting if request not in content]:
            request = min(asking, key=running.__getitem__)  # the oldest of those with the fewest
            row = self.waiting[request][0]
            if row.gone or self.place(row):
                running[request] += not row.gone
                self.waiting[request].popleft()
                if not self.waiting[request]:
                    del self.waiting[request]
            elif running[request]:
                content.add(request)  # others may pass: it goes on
            elif not self.make_room(running):
                break  # nobody may pass, or it would wait for ever

    def place(self, row: Row) -> bool:
        """The row to a lane; False if there is no room."""
        if len(self.rows) == self.size:
            return False
        own = min(width(len(row.prompt) + len(row.uniform)), self.memory // self.column)
        fitting = [lane for lane in self.lanes if own <= lane.width <= 2 * own]
        lane = max(fitting, key=lambda lane: lane.width, default=None) or Lane(self.model, own)
        if (R := len(lane.rows)) == lane.slots:
            each = lane.width * self.column
            if self.spare() < each:  # free what no row needs
                for other in self.lanes:
                    other.resize(len(other.rows))
                self.lanes = [other for other in self.lanes if other.rows]
            if self.spare() < each:
                return False
            lane.resize(R + min(max(R, 1), self.spare() // each))
        if lane not in self.lanes:
            self.lanes.append(lane)
        lane.add(row)
        row.head = row.prompt[:BLOCK]
        self.turns += 1
        row.turn = self.turns
        return True

    def spare(self) -> int:
        """Bytes that may still be taken."""
        return self.memory - self.column * sum(lane.slots * lane.width for lane in self.lanes)

    def make_room(self, running: Counter) -> bool:
        """The latest row of the request with most rows goes back to wait, if it has others."""
        request, most = max(running.items(), key=lambda item: item[1], default=(0, 0))
        if most < 2:
            return False
        row = max((row for row in self.rows if row.request == request), key=lambda row: row.turn)
        row.lane.remove(row)
        self.waiting.setdefault(request, deque()).appendleft(row)
        running[request] -= 1
        return True

    # --- What is computed ------------------------------------------------------------------------

    def plan(self) -> list[Part]:
        """A token of each row that is being written, and pieces of prompts.

        The prompt that has waited longest gets half of the chunk or more, the shortest of the
        others the rest. Of prompts that begin alike one is read; the others wait for its head.
        """
        reading, heads = [], set()
        for row in sorted((r for r in self.rows if r.unseen > 1), key=lambda row: row.turn):
            if row.head in heads:
                continue
            if not row.begun:
                self.inherit(row)
            if row.unseen > 1 and row.head not in heads:
                heads.add(row.head)
                reading.append(row)
        group = self.model.config.n_head // self.model.config.n_kv_head
        ready = [[row for row in lane.rows if row.unseen == 1] for lane in self.lanes]
        parts = [Part(rows, 1, group) for rows in ready if rows]
        room, oldest = self.chunk, reading[:1]
        own = min(oldest[0].unseen, room // 2) if oldest else 0
        for row in sorted(reading[1:], key=lambda row: row.unseen) + oldest:
            n = min(row.unseen, room if row in oldest else room - own)
            if n:
                parts.append(Part([row], n, group))
                row.begun = True
                room -= n
        return parts

    def inherit(self, row: Row):
        """Copy what is there of the row's beginning already, but for its last token, which is fed
        in any case: it gives the logits."""
        length, most = len(row.tokens) - 1, row.seen
        for lane in self.lanes:
            for slot, (known, seen) in enumerate(lane.seen):
                n = min(common(known, row.known), seen, length)
                if n > most:
                    most, found = n, (lane.caches, slot)
        if most > row.seen:
            for own, cache in zip(row.lane.caches, found[0], strict=True):
                own[:, row.slot, :, :most] = cache[:, found[1], :, :most]
            row.seen = most
        row.head = tuple(row.tokens[: row.seen + BLOCK])

    def forward(self, parts: list[Part]) -> torch.Tensor:
        """-> hidden states [rows, d] of the last token of each row of each part."""
        tokens = torch.tensor([token for part in parts for token in part.tokens])
        positions = torch.cat([part.at[1].flatten() for part in parts])
        cos, sin = rope_tables(self.model.config, positions[None])
        x = self.model.model.embed_tokens(tokens.to(self.device))[None]  # [1, M, d]
        sizes = [len(part.tokens) for part in parts]
        for i, layer in enumerate(self.model.model.layers):
            heads = layer.before(x, cos, sin)  # q [1, H, M, D], k, v [1, Hkv, M, D]
            split = zip(parts, *(t[0].split(sizes, dim=1) for t in heads), strict=True)
            attended = torch.cat([part.attend(i, q, k, v) for part, q, k, v in split])
            x = layer.after(x, attended[None])
        ends = list(accumulate(part.shape[1] for part in parts for _ in part.rows))
        return self.model.model.norm(x[0, torch.tensor(ends, device=self.device) - 1])

    def sample(self, rows: list[Row], logits: torch.Tensor):
        """The next token of every row; logits [R, V]."""
        alike = defaultdict(list)
        for i, row in enumerate(rows):
            alike[row.temperature, row.top_p].append(i)
        for (temperature, top_p), chosen in alike.items():
            u = torch.tensor([float(rows[i].uniform[rows[i].sampled]) for i in chosen])
            mine = logits if len(chosen) == len(rows) else logits[chosen]
            tokens, _ = sample(mine, u.to(self.device), temperature, top_p)
            for i, token in zip(chosen, tokens.tolist(), strict=True):
                self.append(rows[i], token)

    def append(self, row: Row, token: int):
        """The token, and what it changes in the row's text and end."""
        row.sampled += 1
        finish = "length" if row.sampled == len(row.uniform) else None
        if token in self.ends:
            finish = "stop"
        else:
            row.tokens.append(token)
        new = self.decode(row.tokens[row.settled :])
        if not new.endswith("\ufffd"):  # else half a character, perhaps
            row.decoded, row.settled, new = row.decoded + new, len(row.tokens), ""
        if any(stop in row.decoded + new for stop in row.stop):
            finish = "stop"
        row.text = certain(row.decoded + new, row.stop, finish is not None)
        row.finish = finish  # last: another thread reads the text of what is finished


# --- Around it -----------------------------------------------------------------------------------


def width(columns: int) -> int:
    """Of a row's cache: up to an eighth of a power of two above what it needs."""
    step = max(64, (1 << (columns - 1).bit_length()) // 8)
    return -(-columns // step) * step


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many elements they begin with alike."""
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    return int(different.argmax()) if different.any() else n


def certain(text: str, stops: tuple[str, ...], final: bool) -> str:
    """Up to the first stop string; before the end also without what the next token may change:
    half a character, half a stop string."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    if found or final:
        return text[: min(found, default=None)]
    text = text.rstrip("\ufffd")
    halves = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return text[: len(text) - max(halves, default=0)]


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or on this machine (all of its memory, where not on Linux)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if (info := Path("/proc/meminfo")).exists():
        return int(re.search(r"MemAvailable:\s+(\d+)", info.read_text())[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def load_engine(folder: str, size: int, device: str = "cpu", memory: int | None = None):
    """(Engine, tokenizer) of a folder; UserError says what is wrong with it."""
    # float32 is fast and exact on a CPU; 16 bits are what GPUs are made for
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    check_folder(folder)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, device, dtype).requires_grad_(False)
    ends = set(end_tokens(folder, tokenizer))
    return Engine(model, ends, tokenizer.decode, size, memory), tokenizer
