"""The paper's evaluations: greedy continuations of held-out prefixes, judged.

    python evaluate.py CKPT --baseline CKPT0 --suite quality,coherence,safety,factuality \\
        --data DOCS --judge_url http://HOST:8000/v1 --judge_model NAME --out result.json

In: Hugging Face folders, documents, a judge. Out: a table, and JSON with every continuation.
quality and coherence are win rates against the baseline's continuation of the same prefix, asked in
both orders, ties half; safety is the share called safe by most of `seeds` judgments; factuality the
mean of 1 / 0.5 / 0 with the original suffix as reference.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import sys
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch

from chat import Chat, TeacherError, TeacherGone
from data import DataError, Stream
from judge import VERDICTS, Judge
from model import ModelError, load_model
from rollout import rollout
from tokenizer import load_tokenizer
from world import Dials, WorldSource, start_teacher

SUITES = ("quality", "safety", "factuality", "coherence")


@dataclass
class HeldOut:
    """Prefixes of one kind, the same for every policy."""

    batches: list  # of data.Batch
    prefixes: list
    references: list  # the original suffixes


def held_out(source, tokenizer, *, chunk, max_seq, count, split="validation", text_field=None):
    """The first `count` samples of a split that no training run reads."""
    stream = Stream(
        source,
        tokenizer,
        chunk=chunk,
        max_seq=max_seq,
        batch_size=min(count, 64),
        seed=0,
        text_field=text_field,
        split=split,
        window=count,
        epochs=1,
    )
    with contextlib.closing(iter(stream)) as all_batches:
        batches = list(itertools.islice(all_batches, -(-count // 64)))
    prefixes = [text for batch in batches for text in batch.prefix_text]
    references = [text for batch in batches for text in batch.suffix_text]
    return HeldOut(batches, prefixes, references)


def held_out_sets(data, tokenizer, dials: dict | None = None, **how) -> dict[str, HeldOut]:
    """Clean and unsafe prefixes of the pocket world, or the validation split of a corpus."""
    if data != "world":
        return {"validation": held_out(data, tokenizer, **how)}
    how.pop("text_field", None)
    return {
        kind: held_out(
            WorldSource(0, Dials(**{**(dials or {}), **share}), "validation"), tokenizer, **how
        )
        for kind, share in {
            "clean": dict(share_unsafe=0.0),
            "unsafe": dict(share_unsafe=1.0),
        }.items()
    }


@torch.no_grad()
def continuations(policy, prefixes: HeldOut, tokenizer, chunk: int) -> list[str]:
    """Greedy continuations, one for each prefix."""
    device, texts = next(policy.parameters()).device, []
    for batch in prefixes.batches:
        drawn = rollout(
            policy,
            batch.prefix.to(device),
            batch.pad.to(device),
            1,
            chunk,
            eos=tokenizer.eos,
            seed=0,
            index=batch.index,
            temperature=0.0,
        )
        rows = zip(drawn.tokens[:, 0].tolist(), drawn.lengths[:, 0].tolist(), strict=True)
        texts += [tokenizer.decode(row[:n]) for row, n in rows]
    return texts


@torch.no_grad()
def held_out_nll(policy, prefixes: HeldOut) -> float:
    """Mean negative log-likelihood of the original suffixes, nats per token."""
    device, total, count = next(policy.parameters()).device, 0.0, 0
    for batch in prefixes.batches:
        suffix = batch.suffix[:, None].to(device)
        total -= float(policy.logprobs(batch.prefix.to(device), batch.pad.to(device), suffix).sum())
        count += suffix.numel()
    return total / count


async def pairwise(judge: Judge, kind: str, seeds: int, prefix: str, ours: str, base: str):
    """Share of the comparison that goes to `ours`, both orders; None without a verdict."""
    if ours == base:
        return 0.5
    orders = [dict(a=ours, b=base), dict(a=base, b=ours)]
    asked = [
        judge.verdict(kind, seed, prefix=prefix, **order)
        for seed in range(seeds)
        for order in orders
    ]
    labels = [label for label, _ in await asyncio.gather(*asked)]
    worth = [
        VERDICTS[kind][label] if i % 2 == 0 else 1 - VERDICTS[kind][label]
        for i, label in enumerate(labels)
        if label is not None
    ]
    return sum(worth) / len(worth) if worth else None


async def pointwise(judge: Judge, kind: str, seeds: int, **texts):
    """Mean worth of the verdicts on one text; None without a verdict. Safety goes by majority."""
    answers = await asyncio.gather(*(judge.verdict(kind, seed, **texts) for seed in range(seeds)))
    worth = [VERDICTS[kind][label] for label, _ in answers if label is not None]
    if not worth:
        return None
    mean = sum(worth) / len(worth)
    return float(mean > 0.5) if kind == "safety" else mean


def ask(judge: Judge, kind: str, seeds: int, held: HeldOut, texts: list, base: list) -> Future:
    """Future of one value between 0 and 1 (or None) for each prefix."""
    rows = zip(held.prefixes, held.references, texts, base, strict=True)
    if kind in ("quality", "coherence"):
        asked = [pairwise(judge, kind, seeds, p, t, b) for p, _, t, b in rows]
    elif kind == "safety":
        asked = [pointwise(judge, kind, seeds, text=t) for _, _, t, _ in rows]
    else:
        asked = [
            pointwise(judge, kind, seeds, prefix=p, reference=r, text=t) for p, r, t, _ in rows
        ]

    async def together():
        return await asyncio.gather(*asked)

    return judge.chat.run(together())


def evaluate(
    policies: dict,
    sets: dict,
    judge: Judge,
    tokenizer,
    chunk: int,
    *,
    suites=SUITES,
    seeds: int = 1,
    wait=Future.result,
) -> dict:
    """Compare policies by name; the first is the baseline of the pairwise suites. `wait` gives the
    result of a Future.

    -> {"baseline", "suites", "policies": {name: {kind of prefix: {suite: mean, "nll": nats}}},
    "continuations": {name: {kind of prefix: [texts]}}}
    """
    baseline, results, kept = next(iter(policies)), {}, {}
    for name, policy in policies.items():
        results[name], kept[name] = {}, {}
        for kind, held in sets.items():
            texts = continuations(policy, held, tokenizer, chunk)
            kept[name][kind] = texts
            row = {}
            for which in suites:
                values = wait(ask(judge, which, seeds, held, texts, kept[baseline][kind]))
                values = [value for value in values if value is not None]
                row[which] = sum(values) / len(values) if values else None
            row["nll"] = held_out_nll(policy, held)
            results[name][kind] = row
    return {
        "baseline": baseline,
        "suites": list(suites),
        "policies": results,
        "continuations": kept,
    }


def overall(row: dict, column: str):
    """Mean over the kinds of prefix, which are equally many; None where nothing was judged."""
    values = [cell[column] for cell in row.values() if cell[column] is not None]
    return sum(values) / len(values) if values else None


NAMES = {"base": "base", "baseline": "next-token baseline", "method": "self-improving"}
HEADS = {"quality": "quality win rate", "nll": "held-out NLL"}


def table(summary: dict) -> str:
    """A row a policy: the mean over the kinds of prefix, then each kind in parentheses."""
    columns = [*summary["suites"], "nll"]
    kinds = list(next(iter(summary["policies"].values())))
    head = ["" if len(kinds) == 1 else f"mean ({' / '.join(kinds)})"]
    rows = [head + [HEADS.get(c, c) for c in columns]]
    for name, row in summary["policies"].items():
        cells = [NAMES.get(name, name)]
        for column in columns:
            scale, digits = (1, 2) if column == "nll" else (100, 1)

            def show(value, scale=scale, digits=digits):
                return "-" if value is None else f"{scale * value:.{digits}f}"

            each = " / ".join(show(row[kind][column]) for kind in kinds)
            cells.append(show(overall(row, column)) + (f" ({each})" if len(kinds) > 1 else ""))
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def main(argv=None) -> int:
    flag = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag.add_argument("checkpoint", help="Hugging Face folder")
    flag.add_argument("--baseline", help="folder compared against (default: the checkpoint itself)")
    flag.add_argument("--suite", default=",".join(SUITES), help="which of %(default)s")
    flag.add_argument("--data", default="world", help="documents (validation split), or world")
    flag.add_argument("--text_field", help="JSON field of the text (default: detected)")
    flag.add_argument("--prefixes", type=int, default=256, help="how many of each kind")
    flag.add_argument("--chunk", type=int, default=32, help="tokens of a continuation")
    flag.add_argument("--max_seq", type=int, default=96, help="tokens of prefix and continuation")
    flag.add_argument("--judge_url", default="world", help="OpenAI-compatible URL up to /v1")
    flag.add_argument("--judge_model", default="judge")
    flag.add_argument("--seeds", type=int, default=1, help="judgments of each question")
    flag.add_argument("--device", default="cpu")
    flag.add_argument("--out", default="evaluation.json", help="result with all continuations")
    args = flag.parse_args(argv)
    suites = [name.strip() for name in args.suite.split(",") if name.strip()]
    if wrong := [name for name in suites if name not in SUITES]:
        flag.error(f"--suite: {', '.join(wrong)} is none of {', '.join(SUITES)}")
    tokenizer = load_tokenizer(args.checkpoint)
    folders = {"base": args.baseline or args.checkpoint, "checkpoint": args.checkpoint}
    policies = {name: load_model(f, args.device, torch.float32) for name, f in folders.items()}
    sets = held_out_sets(
        args.data,
        tokenizer,
        chunk=args.chunk,
        max_seq=args.max_seq,
        count=args.prefixes,
        text_field=args.text_field,
    )
    with (
        start_teacher()
        if args.judge_url == "world"
        else contextlib.nullcontext(args.judge_url) as url
    ):
        chat = Chat(url, args.judge_model)
        summary = evaluate(
            policies, sets, Judge(chat), tokenizer, args.chunk, suites=suites, seeds=args.seeds
        )
        chat.close()
    Path(args.out).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(table(summary))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ModelError, DataError, TeacherError, TeacherGone, ValueError) as e:
        sys.exit(f"error: {e}")
