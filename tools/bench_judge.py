"""How good is a judge? Accuracy on labelled texts, position bias, malformed answers, and the label
shares and agreement of nine factuality prompts, beside the figures of the paper.

    python -m tools.bench_judge           # pocket world, three noise levels
    python -m tools.bench_judge --noise 0 --dials reads=1,judge_knowledge=0.5
    python -m tools.bench_judge --judge_url http://HOST:8000/v1 --judge_model NAME --data x.jsonl
    python -m tools.bench_judge configs/judges.py:gpt_4o configs/judges.py:gpt_oss_120b \\
        --judge_url http://HOST:8000/v1 --data slimpajama/test --policy CKPT

In: one JSON object a line, each with some of: "prefix", "better", "worse" (a labelled pair),
"text", "safe" (true or false), "reference" (with prefix and text: a factuality question), and
"source" (pairs are reported by source). With --policy documents, as for train.py: the text is that
policy's greedy continuation of a held-out prefix, the reference the original one. Judges are rows
of config files, with keys of train.py, or --judge_model a,b of one server; agreement is with the
first. Out: what it costs, before it starts; tables in Markdown. Everybody is asked the same, once.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np

from config import Config, check
from evaluation.evaluate import continue_batch
from evaluation.sets import held_out_sets
from judge import Judge, load_prompts, render, together
from model import load_model
from support import command
from support.chat import Chat
from support.command import UserError
from support.files import markdown
from support.settings import nested, read_arguments
from support.tokenizer import load_tokenizer
from tools.cost import ANSWER_TOKENS
from world import corpus, teacher, truth

FACTUALITY = {  # prompt: its name in prompts/
    **{f"ref v{n}": "factuality" if n == 4 else f"factuality_ref_v{n}" for n in range(1, 6)},
    **{f"no-ref v{n}": f"factuality_noref_v{n}" for n in range(1, 5)},
}
LABELS = ("Definite Hallucination", "Possible Hallucination", "No Hallucination")
ORDERS = ("better first", "worse first")

# The paper's tables 11 and 13-15: accuracy in % by source, and definite / possible / no
# hallucination in % on continuations of a model, prompts ref v1..v5.
SOURCES = ("arxiv", "book", "c4", "github", "stackexchange", "wiki", "cc")
PAPER_ACCURACY = {
    "Llama-3.1-8B-Instruct": (48.4, 45.0, 54.9, 55.1, 51.9, 55.9, 53.0),
    "Llama-3.3-70B-Instruct": (72.7, 84.0, 75.5, 69.9, 66.0, 84.8, 74.1),
    "R1-Distill-Llama-8B": (57.8, 55.3, 57.5, 55.8, 53.2, 63.5, 56.8),
    "R1-Distill-Llama-70B": (73.6, 79.4, 75.4, 72.6, 64.0, 86.0, 74.9),
}
PAPER_SHARES = {  # and the agreement with GPT-4o, mean of ref v1..v5
    "GPT-4o": "94.4/1.0/4.6 77.3/3.5/19.2 71.5/13.0/15.5 62.5/19.5/18.0 44.2/9.6/46.2 reference",
    "GPT-OSS-120B": "93.4/1.0/5.6 79.5/7.0/13.5 65.8/23.1/11.1 54.8/33.3/11.8 43.4/14.8/41.8 73.2",
    "Llama-70B": "81.6/14.8/3.6 45.5/23.0/31.5 20.5/65.5/14.0 24.7/54.8/20.1 15.5/18.5/66.0 54.8",
}


def world_samples(count):
    """Labelled by the pocket world's truth; a pair's source is the worse text's main fault."""
    perfect, samples, index = corpus.Dials(rewriter_knowledge=1, rewriter_flaws=0), [], 0
    while len(samples) < count:
        words = corpus.document(3, index).split()
        index += 1
        prefix, worse = " ".join(words[:56]), " ".join(words[56:88])
        better = teacher.rewrite(prefix, worse, perfect, str(index))
        faults = Counter(s.verdict for s in truth.examine(prefix, worse))
        for fine in (*truth.UNCOUNTED, "sound", "filler"):
            faults.pop(fine, None)
        if faults and truth.quality(prefix, better) > truth.quality(prefix, worse) + 0.05:
            sample = dict(prefix=prefix, better=better, worse=worse, reference=better, text=worse)
            about = dict(safe=truth.safe(worse), source=max(faults, key=faults.get))
            samples.append(sample | about)
    return samples


def read_samples(path):
    """The labelled samples of a .jsonl file; UserError names a line that is none."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        try:
            row = dict(json.loads(line.strip() or "{}"))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}:{number} is not a JSON object: {error}") from None
        needed = ["prefix", "worse"] * ("better" in row) + ["text"] * ("safe" in row)
        if lacking := [name for name in needed if name not in row]:
            raise UserError(f"{path}:{number} lacks {', '.join(lacking)}")
        rows += [row] if row else []
    return rows


def continued(folder, data, count, chunk):
    """Samples for the factuality prompts: what a policy makes of held-out prefixes of documents."""
    tokenizer, policy, samples = load_tokenizer(folder), load_model(folder), []
    size = dict(chunk=chunk, max_seq=min(2048, policy.config.max_seq), count=count)
    for held in held_out_sets(data, tokenizer, **size).values():
        for batch in held.batches:
            texts = continue_batch(policy, batch, tokenizer, chunk)
            for row in zip(batch.prefix_text, batch.suffix_text, texts, strict=True):
                samples.append(dict(zip(("prefix", "reference", "text"), row, strict=True)))
    return samples[:count]


def questions(samples):
    """[(sample, question, kind, how it is asked)]; question: one of ORDERS, "safety", or one of
    FACTUALITY."""
    asked = []
    for sample in samples:
        given = {field: sample.get(field) for field in ("prefix", "reference", "text")}
        if "better" in sample:
            pair = (sample["better"], sample["worse"])
            for order, (a, b) in zip(ORDERS, (pair, pair[::-1]), strict=True):
                asked.append((sample, order, "quality", dict(prefix=sample["prefix"], a=a, b=b)))
        if "safe" in sample:
            asked.append((sample, "safety", "safety", dict(text=sample["text"])))
        if all(given.values()):
            for what, prompt in FACTUALITY.items():
                asked.append((sample, what, "factuality", dict(given, prompt=prompt)))
    return asked


def cost(asked, judges):
    """What asking them costs, in a line; money where a judge's price_in and price_out are set."""
    templates = load_prompts()
    texts = [render(templates[how.get("prompt", kind)], **how) for *_, kind, how in asked]
    read, written = sum(map(len, texts)) // 4, len(asked) * ANSWER_TOKENS
    price = sum(c.price_in * read + c.price_out * written for c, _ in judges.values()) / 1e6
    line = f"{len(asked):,} questions to each of {len(judges)} judges: {read:,} tokens read, "
    line += f"{written:,} written ({ANSWER_TOKENS} an answer, one that reasons writes more)"
    return line + f", {price:,.2f} to pay in all" * bool(price)


def ask_all(judge, asked):
    """[(sample, question, label)]"""
    verdicts = together(judge.verdict(kind, **how) for *_, kind, how in asked)
    found = command.wait(judge.chat.run(verdicts))
    return [(s, what, label) for (s, what, *_), (label, _) in zip(asked, found, strict=True)]


def ask_world(asked, dials):
    """As ask_all, the pocket world's teacher with these dials."""
    with Chat(teacher.teacher_at("world", dials), "judge") as chat:
        return ask_all(Judge(chat, Config()), asked)


def percent(values):
    values = list(values)
    return f"{100 * np.mean(values):.1f}" if values else "-"


def accuracy_table(answers):
    """By source: how often the better one is chosen, in both orders (says A: 50 without bias); and
    how often a text's safety is judged right."""
    rows = [["judge", "source", "pairs", *ORDERS, "mean", "says A"]]
    for judge, given in answers.items():
        pairs = [(s.get("source", "all"), what, say) for s, what, say in given if what in ORDERS]
        for source in [*sorted({row[0] for row in pairs}), None]:
            here = [row[1:] for row in pairs if source in (None, row[0]) and row[2]]
            right = [[(v == "A") == (o == ORDERS[0]) for o, v in here if o == x] for x in ORDERS]
            cells = [*map(percent, right), percent(np.mean(values) for values in right if values)]
            says_a = percent(verdict == "A" for _, verdict in here)
            rows.append([judge, source or "**all**", len(here) // 2, *cells, says_a])
        safe = [(v == "SAFE") == s["safe"] for s, what, v in given if what == "safety" and v]
        rows.append([judge, "safety", len(safe), "", "", percent(safe), ""])
    for name, figures in PAPER_ACCURACY.items():
        by_source = ", ".join(f"{s} {f}" for s, f in zip(SOURCES, figures, strict=True))
        rows.append([f"{name} (paper)", by_source, "", "", "", f"{np.mean(figures):.1f}", ""])
    return rows


def factuality_table(answers):
    """Definite / possible / no hallucination in %, and agreement with the first judge on the
    prompts with reference, as the paper counts it."""
    rows = [["judge", *FACTUALITY, "agreement"]]
    trusted = next(iter(answers.values()))
    for judge, given in answers.items():
        cells = []
        for prompt in FACTUALITY:
            labels = [label for _, what, label in given if what == prompt and label]
            cells.append("/".join(percent(label == kind for label in labels) for kind in LABELS))
        pairs = [
            mine == theirs
            for (_, what, mine), (*_, theirs) in zip(given, trusted, strict=True)
            if what.startswith("ref") and mine and theirs
        ]
        rows.append([judge, *cells, "reference" if given is trusted else percent(pairs)])
    for name, paper in PAPER_SHARES.items():
        *shares, agreement = paper.split()
        rows.append([f"{name} (paper)", *shares, "", "", "", "", agreement])
    return rows


def judges_of(options):
    """name -> (its keys, dials of the pocket world's teacher)"""
    flags = dict(judge_max_tokens=options.max_tokens, concurrency=options.concurrency)
    url, flags = dict(judge_url=options.judge_url), {k: v for k, v in flags.items() if v}
    if options.judge_url == "world" and not options.judges:
        config, dials = Config(**url, **flags), corpus.parse_dials(options.dials)
        return {f"world, noise {x:g}": (config, dials | dict(noise=x)) for x in options.noise}
    rows = {row.rpartition(":")[2]: read_arguments(Config, [row]) for row in options.judges}
    rows = rows or {model: dict(judge_model=model) for model in options.judge_model.split(",")}
    return {name: (check(Config(**(url | keys | flags))), {}) for name, keys in rows.items()}


def main(arguments: list[str]):
    flag = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flag.add_argument("judges", nargs="*", metavar="FILE.py:ROW", help="as configs have them")
    flag.add_argument("--judge_url", default="world", help="up to /v1; replicas: commas")
    flag.add_argument("--judge_model", default="judge", help="several: commas")
    flag.add_argument("--data", default="world", help=".jsonl of labelled samples, or documents")
    flag.add_argument("--policy", help="checkpoint that continues the documents' prefixes")
    flag.add_argument("--chunk", type=int, default=128, help="tokens of a continuation")
    flag.add_argument("--samples", type=int, default=200, help="of the data")
    flag.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.1, 0.3], help="of world")
    flag.add_argument("--dials", default="", help="of world, as for train.py")
    flag.add_argument("--concurrency", type=int, help="as train.py's key")
    flag.add_argument("--max_tokens", type=int, help="as train.py's judge_max_tokens")
    flag.add_argument("--record", help="file of all answers (.sqlite), which are not asked again")
    options = flag.parse_args(arguments)
    if options.policy:
        samples = continued(options.policy, options.data, options.samples, options.chunk)
    elif options.data == "world":
        samples = world_samples(options.samples)
    else:
        samples = read_samples(options.data)[: options.samples]
    judges, asked, answers = judges_of(options), questions(samples), {}
    print(cost(asked, judges), flush=True)
    for name, (config, dials) in judges.items():
        how = dict(extra=nested(config.judge_extra), concurrency=config.concurrency)
        how["cache"] = None if dials else options.record
        with Chat(teacher.teacher_at(config.judge_url, dials), config.judge_model, **how) as chat:
            judge = Judge(chat, config)
            answers[name] = ask_all(judge, asked)
        failed, calls, absent = (judge.tally[what] for what in ("failed", "calls", "absent"))
        told = f"{failed:,} of {calls:,} answers malformed (at most {config.judge_max_tokens} "
        told += f"tokens), {absent:,} of {len(asked):,} questions left open"
        print(f"{name}: {told}\n")
    print(markdown(accuracy_table(answers)), markdown(factuality_table(answers)), sep="\n\n")


if __name__ == "__main__":
    command.run(main)
