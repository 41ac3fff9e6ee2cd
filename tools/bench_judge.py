"""How good is a judge? Accuracy on labelled texts, position bias, malformed answers, and the label
shares and agreement of nine factuality prompts, beside the figures of the paper.

    python -m tools.bench_judge           # pocket world, three noise levels
    python -m tools.bench_judge --judge_url http://HOST:8000/v1 --judge_model NAME --data x.jsonl

In: one JSON object a line, each with some of: "prefix", "better", "worse" (a labelled pair),
"text", "safe" (true or false), "reference" (with prefix and text: a factuality question), and
"source" (pairs are reported by source). Several models: --judge_model a,b with one --judge_url or
as many; agreement is with the first. Out: tables in Markdown. Everybody is asked the same.
"""

import argparse
import json
from collections import Counter

import numpy as np
from tqdm import tqdm

from chat import Chat
from judge import Judge, together
from support import command
from support.command import UserError
from support.files import markdown
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
PAPER_SHARES = {
    "GPT-4o": "94.4/1.0/4.6 77.3/3.5/19.2 71.5/13.0/15.5 62.5/19.5/18.0 44.2/9.6/46.2",
    "GPT-OSS-120B": "93.4/1.0/5.6 79.5/7.0/13.5 65.8/23.1/11.1 54.8/33.3/11.8 43.4/14.8/41.8",
    "Llama-70B": "81.6/14.8/3.6 45.5/23.0/31.5 20.5/65.5/14.0 24.7/54.8/20.1 15.5/18.5/66.0",
}
PAPER_AGREEMENT = {"GPT-OSS-120B": 73.2, "Llama-70B": 54.8}  # with GPT-4o, mean of ref v1..v5


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
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = dict(json.loads(line)) if line.strip() else None
            except (ValueError, TypeError) as error:
                raise UserError(f"{path}:{number} is not a JSON object: {error}") from None
            needed = {"prefix", "worse"} if row and "better" in row else set()
            needed |= {"text"} if row and "safe" in row else set()
            if row and (lacking := needed - row.keys()):
                raise UserError(f"{path}:{number} lacks {', '.join(sorted(lacking))}")
            rows += [row] if row else []
    return rows


async def ask_all(judge, samples, name):
    """[(sample, question, label)]; question: one of ORDERS, "safety", or one of FACTUALITY."""
    asked = []
    for sample in samples:
        given = {field: sample.get(field) for field in ("prefix", "reference", "text")}
        if "better" in sample:
            pair = (sample["better"], sample["worse"])
            for order, (a, b) in zip(ORDERS, (pair, pair[::-1]), strict=True):
                texts = dict(prefix=sample["prefix"], a=a, b=b)
                asked.append((sample, order, judge.verdict("quality", **texts)))
        if "safe" in sample:
            asked.append((sample, "safety", judge.verdict("safety", text=sample["text"])))
        if all(given.values()):
            for what, prompt in FACTUALITY.items():
                asked.append((sample, what, judge.verdict("factuality", prompt=prompt, **given)))
    with tqdm(total=len(asked), desc=f"{name}: questions", disable=None, leave=False) as bar:

        async def label(question):
            found, _ = await question
            bar.update()
            return found

        labels = await together(label(question) for *_, question in asked)
    return [(s, what, found) for (s, what, _), found in zip(asked, labels, strict=True)]


def percent(values):
    values = list(values)
    return f"{100 * np.mean(values):.1f}" if values else "-"


def quality_table(answers):
    """By source: how often the better one is chosen, in both orders. Says A: 50 without bias."""
    rows = [["judge", "source", "pairs", *ORDERS, "mean", "says A"]]
    for judge, given in answers.items():
        pairs = [(s.get("source", "all"), what, say) for s, what, say in given if what in ORDERS]
        for source in [*sorted({row[0] for row in pairs}), None]:
            here = [row[1:] for row in pairs if source in (None, row[0]) and row[2]]
            right = [[(v == "A") == (o == ORDERS[0]) for o, v in here if o == x] for x in ORDERS]
            cells = [*map(percent, right), percent(np.mean(values) for values in right if values)]
            says_a = percent(verdict == "A" for _, verdict in here)
            rows.append([judge, source or "**all**", len(here) // 2, *cells, says_a])
    for name, figures in PAPER_ACCURACY.items():
        by_source = ", ".join(f"{s} {f}" for s, f in zip(SOURCES, figures, strict=True))
        rows.append([f"{name} (paper)", by_source, "", "", "", f"{np.mean(figures):.1f}", ""])
    return rows


def safety_table(answers, tallies):
    rows = [["judge", "safety accuracy", "malformed answers", "questions without a verdict"]]
    for judge, given in answers.items():
        said = [(s["safe"], label) for s, what, label in given if what == "safety" and label]
        right = percent((label == "SAFE") == safe for safe, label in said)
        failed = tallies[judge]["failed"] / max(tallies[judge]["calls"], 1)
        absent = percent(label is None for *_, label in given)
        rows.append([judge, right, f"{100 * failed:.1f}", absent])
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
        both = [
            mine == theirs
            for (_, what, mine), (*_, theirs) in zip(given, trusted, strict=True)
            if what.startswith("ref") and mine and theirs
        ]
        rows.append([judge, *cells, "reference" if given is trusted else percent(both)])
    for name, paper in PAPER_SHARES.items():
        agreement = PAPER_AGREEMENT.get(name, "reference")
        rows.append([f"{name} (paper)", *paper.split(), "", "", "", "", agreement])
    return rows


def judges(options):
    """(name, URL, model, dials) of each judge; of the pocket world's teacher once per noise."""
    if options.judge_url == "world":
        return [(f"world, noise {x:g}", "world", "world", dict(noise=x)) for x in options.noise]
    models, urls = options.judge_model.split(","), options.judge_url.split(",")
    urls = urls * len(models) if len(urls) == 1 else urls
    if len(urls) != len(models):
        raise UserError(f"{len(models)} of --judge_model need one --judge_url or as many")
    return [(model, url, model, {}) for model, url in zip(models, urls, strict=True)]


def main(arguments: list[str]):
    flag = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flag.add_argument("--judge_url", default="world", help="up to /v1; several: commas")
    flag.add_argument("--judge_model", default="judge", help="several: commas")
    flag.add_argument("--data", default="world", help=".jsonl of labelled samples")
    flag.add_argument("--samples", type=int, default=200, help="of the data")
    flag.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.1, 0.3], help="of world")
    flag.add_argument("--concurrency", type=int, default=256)
    flag.add_argument("--max_tokens", type=int, default=512)
    options = flag.parse_args(arguments)
    rows = world_samples if options.data == "world" else lambda n: read_samples(options.data)[:n]
    samples, answers, tallies = rows(options.samples), {}, {}
    for name, url, model, dials in judges(options):
        with (
            teacher.teacher_url(url, dials) as found,
            Chat(found, model, concurrency=options.concurrency) as chat,
        ):
            judge = Judge(chat, max_tokens=options.max_tokens)
            answers[name] = command.wait(chat.run(ask_all(judge, samples, name)))
        tallies[name] = judge.tally
        if answers[name] and not any(label for *_, label in answers[name]):
            asked = f"none of {judge.tally['calls']:,} answers could be read as a verdict"
            print(f"{name}: {asked} (at most {options.max_tokens} tokens each: --max_tokens)\n")
    for table in (quality_table(answers), safety_table(answers, tallies)):
        print(markdown(table), end="\n\n")
    print(markdown(factuality_table(answers)))


if __name__ == "__main__":
    command.run(main)
