"""Ours beside what one would use instead: same weights, same tokens, one machine, one run.

    python bench.py [sampler update kernels chat data]      all five, or the named sections

Out: a line a measurement, and bench.json. Ratios are of medians over rounds in which the sides take
turns, since machines are noisy. Peers (transformers, openai, datasets, flash-attn, Liger)
are needed here only; a section whose peer is not installed says so. On a GPU `kernels` measures the
Triton kernels, on a CPU the PyTorch definitions.
"""

import json
import statistics
import sys
import tempfile
import time

import torch

from model import Llama, ModelConfig, save_model
from rollout import rollout

ROUNDS = 3


def llama_30m() -> Llama:
    """Small enough for a CPU, shaped like a Llama: 8 layers of width 512, GQA, 8,192 tokens."""
    shape = ModelConfig(8192, n_layer=8, n_head=8, n_kv_head=4, d_model=512, d_ff=1408, head_dim=64)
    return Llama(shape).initialise(0)


def in_turns(sides: dict, rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each callable; the sides take turns, the first round only warms up."""
    seconds = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


@torch.no_grad()
def sampler():
    """K = 16 rollouts of 64 tokens for each of 4 prefixes: ours and transformers' generate."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    ours, B, K, N = llama_30m(), 4, 16, 64
    with tempfile.TemporaryDirectory() as folder:
        save_model(ours, folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for P in (256, 1024):
        prefix = torch.randint(8000, (B, P), generator=torch.Generator().manual_seed(P))
        pad, index = torch.zeros(B, dtype=torch.int32), torch.arange(B)
        how = dict(do_sample=True, top_k=0, max_new_tokens=N, num_return_sequences=K)
        how |= dict(pad_token_id=0, eos_token_id=None)

        def generate(cache, prefix=prefix, how=how):
            theirs.generate(
                prefix, attention_mask=torch.ones_like(prefix), cache_implementation=cache, **how
            )

        def our_rollout(prefix=prefix, pad=pad, index=index):
            rollout(ours, prefix, pad, K, N, eos=-1, seed=0, index=index)

        seconds = in_turns(
            {
                "ours": our_rollout,
                "transformers, default cache": lambda run=generate: run(None),
                "transformers, static cache": lambda run=generate: run("static"),
            }
        )
        for side, value in seconds.items():
            yield {
                "what": f"sampler P={P} K={K} N={N}",
                "side": side,
                "tokens_per_second": B * K * N / value,
                "ours_is_faster_by": value / seconds["ours"],
            }


def update():
    """One DPO pair or a GRPO group of 16: the prefix shared, and as separate rows."""
    policy = llama_30m()
    for P, N, C in ((1920, 128, 2), (960, 64, 16)):
        prefix = torch.randint(8000, (1, P))
        continuations, pad = torch.randint(8000, (1, C, N)), torch.zeros(1, dtype=torch.int32)

        def shared(prefix=prefix, pad=pad, continuations=continuations):
            policy.logprobs(prefix, pad, continuations).sum().backward()

        def separate(prefix=prefix, pad=pad, continuations=continuations):
            rows = continuations[0][:, None]
            copies = len(rows)
            policy.logprobs(prefix.expand(copies, -1), pad.expand(copies), rows).sum().backward()

        seconds = in_turns({"ours": shared, "separate rows": separate})
        for side, value in seconds.items():
            yield {
                "what": f"update P={P} N={N} C={C}",
                "side": side,
                "seconds": value,
                "ours_is_faster_by": value / seconds["ours"],
            }


def kernels():
    from kernels.bench import rows

    yield from rows()


def chat():
    from bench_chat import judge_client

    for concurrency in (256, 1000):
        yield from judge_client(concurrency=concurrency)


def data():
    from bench_data import data_rows

    yield from data_rows()


SECTIONS = {f.__name__: f for f in (sampler, update, kernels, chat, data)}


def main(argv: list[str]):
    if wrong := [name for name in argv if name not in SECTIONS]:
        sys.exit(f"no section {wrong[0]!r}; there are {', '.join(SECTIONS)}")
    rows = []
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in argv or SECTIONS:
        try:
            for row in SECTIONS[name]():
                rows.append({"section": name} | row)
                cells = (f"{v:.4g}" if isinstance(v, float) else v for v in row.values())
                print("  ".join(f"{k} {v}" for k, v in zip(row, cells, strict=True)), flush=True)
        except ImportError as e:
            print(f"{name}: left out, {e}")
    with open("bench.json", "w", encoding="utf-8") as f:
        json.dump(rows, f, indent=2)


if __name__ == "__main__":
    main(sys.argv[1:])
