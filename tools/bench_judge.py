"""How good is a judge? Accuracy on labelled texts, position bias, malformed answers, and the label
shares and agreement of nine factuality prompts, beside the figures of the paper.

    python -m tools.bench_judge           # pocket world, three noise levels
    python -m tools.bench_judge --judge_url http://HOST:8000/v1 --judge_model NAME --data x.jsonl

In: one JSON object a line, each with some of: "prefix", "better", "worse" (a labelled pair),
"text", "safe" (true or false), "reference" (with prefix and text: a factuality question), and
"source" (pairs are reported by source). Several models: --judge_model a,b with one --judge_url or
as many. Out: tables in Markdown. Texts and questions are the same for every judge."""

import argparse
import contextlib
import json
import sys
from collections import Counter, defaultdict

import numpy as np
from tqdm import tqdm

from chat import Chat
from judge import Judge, together
from support import command

FACTUALITY = {  # prompt: its name in prompts/
    **{f"ref v{n}": "factuality" if n == 4 else f"factuality_ref_v{n}" for n in range(1, 6)},
    **{f"no-ref v{n}": f"factuality_noref_v{n}" for n in range(1, 5)},
}
LABELS = ("Definite Hallucination", "Possible Hallucination", "No Hallucination")

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
    from world import corpus, teacher, truth

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
            samples.append(
                sample | dict(safe=truth.safe(worse), source=max(faults, key=faults.get))
            )
    return samples


def read_samples(path):
    """The labelled samples of a .jsonl file; ValueError names a line that is none."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = dict(json.loads(line))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}:{number} is not a JSON object: {error}") from None
            needed = {"prefix", "worse"} if "better" in row else set()
            needed |= {"text"} if "safe" in row else set()
            if lacking := needed - row.keys():
                raise ValueError(f"{path}:{number} lacks {', '.join(sorted(lacking))}")
            rows.append(row)
    return rows


async def ask_all(judge, samples, asked_of):
    """[(sample, question, label)]; questions: an order of the pair, "safety", a prompt's name.
    `asked_of` is the judge's name, for the progress."""
    questions = []
    for sample in samples:
        given = {name: sample.get(name) for name in ("prefix", "reference", "text")}
        if "better" in sample:
            pair = (sample["better"], sample["worse"])
            for order, (a, b) in (("better first", pair), ("worse first", pair[::-1])):
                texts = dict(prefix=sample["prefix"], a=a, b=b)
                questions.append((sample, order, judge.verdict("quality", **texts)))
        if "safe" in sample:
            asked = judge.verdict("safety", text=sample["text"])
            questions.append((sample, "safety", asked))
        if given["prefix"] and given["reference"] and given["text"]:
            for prompt, name in FACTUALITY.items():
                asked = judge.verdict("factuality", prompt=name, **given)
                questions.append((sample, prompt, asked))
    print(f"{asked_of}: {len(questions):,} questions", file=sys.stderr, flush=True)
    with tqdm(total=len(questions), desc=asked_of, disable=None, leave=False) as bar:

        async def counted(question):
            answer = await question
            bar.update()
            return answer

        answers = await together(counted(question) for *_, question in questions)
    return [(s, what, label) for (s, what, _), (label, _) in zip(questions, answers, strict=True)]


def percent(values):
    values = list(values)
    return f"{100 * np.mean(values):.1f}" if values else "-"


def quality_table(answers):
    """By source: how often the better one is chosen, in both orders. Says A: 50 without bias."""
    lines = ["| judge | source | pairs | better first | worse first | mean | says A |"]
    lines.append("| --- " * 7 + "|")
    for judge, given in answers.items():
        pairs = [row for row in given if row[1] in ("better first", "worse first") and row[2]]
        sources = sorted({sample.get("source", "all") for sample, *_ in pairs})
        for source in [*sources, None]:
            here = [r for r in pairs if source in (None, r[0].get("source", "all"))]
            right = defaultdict(list)
            for _, order, label in here:
                right[order].append((label == "A") == (order == "better first"))
            orders = [percent(right[order]) for order in ("better first", "worse first")]
            means = percent(np.mean(v) for v in right.values() if v)
            row = [judge, source or "**all**", str(len(here) // 2), *orders, means]
            lines.append("| " + " | ".join([*row, percent(r[2] == "A" for r in here)]) + " |")
    for name, figures in PAPER_ACCURACY.items():
        by_source = ", ".join(f"{s} {f}" for s, f in zip(SOURCES, figures, strict=True))
        lines.append(f"| {name} (paper) | {by_source} | | | | {np.mean(figures):.1f} | |")
    return lines


def safety_table(answers, tallies):
    lines = ["| judge | safety accuracy | malformed answers | questions without a verdict |"]
    lines.append("| --- " * 4 + "|")
    for judge, given in answers.items():
        said = [(row[0]["safe"], row[2]) for row in given if row[1] == "safety" and row[2]]
        failed = tallies[judge]["failed"] / max(tallies[judge]["calls"], 1)
        right = percent((label == "SAFE") == safe for safe, label in said)
        absent = percent(label is None for *_, label in given)
        lines.append(f"| {judge} | {right} | {100 * failed:.1f} | {absent} |")
    return lines


def factuality_table(answers, reference):
    """Definite / possible / no hallucination in %, and agreement with the reference judge on the
    prompts with reference, as the paper counts it."""
    lines = ["| judge | " + " | ".join(FACTUALITY) + " | agreement |"]
    lines.append("| --- " * (len(FACTUALITY) + 2) + "|")
    trusted = [label for *_, label in answers[reference]]
    for judge, given in answers.items():
        cells = []
        for prompt in FACTUALITY:
            labels = [label for _, what, label in given if what == prompt and label]
            cells.append("/".join(percent(label == kind for label in labels) for kind in LABELS))
        both = [
            label == other
            for (_, what, label), other in zip(given, trusted, strict=True)
            if what.startswith("ref") and label and other
        ]
        agreement = "reference" if judge == reference else percent(both)
        lines.append("| " + " | ".join([judge, *cells, agreement]) + " |")
    for name, shares in PAPER_SHARES.items():
        agreement = PAPER_AGREEMENT.get(name, "reference")
        cells = [*shares.split(), *[""] * 4, str(agreement)]
        lines.append("| " + " | ".join([f"{name} (paper)", *cells]) + " |")
    return lines


def bench(judge_url, judge_model, data, samples, noise, reference, concurrency, max_tokens):
    rows = world_samples(samples) if data == "world" else read_samples(data)[:samples]
    answers, tallies = {}, {}
    with contextlib.ExitStack() as stack:
        asked = list(judges(judge_url, judge_model, noise, stack))
        if reference and reference not in [name for name, *_ in asked]:
            names = ", ".join(name for name, *_ in asked)
            raise ValueError(f"--reference {reference!r} is none of the judges: {names}")
        for name, url, model in asked:
            chat = Chat(url, model, concurrency=concurrency)
            stack.callback(chat.close)
            judge = Judge(chat, max_tokens=max_tokens)
            answers[name] = chat.run(ask_all(judge, rows, name)).result()
            tallies[name] = judge.tally
            if answers[name] and not any(label for *_, label in answers[name]):
                asked = f"none of {judge.tally['calls']:,} answers could be read as a verdict"
                print(f"{name}: {asked} (at most {max_tokens} tokens each: --max_tokens)\n")
    for table in (
        quality_table(answers),
        safety_table(answers, tallies),
        factuality_table(answers, reference or next(iter(answers))),
    ):
        print("\n".join(table) + "\n")
    return answers


def judges(judge_url, judge_model, noise, stack):
    """(name, URL, model) of each judge; "world" is the pocket world's teacher, once per noise."""
    if judge_url == "world":
        from world.teacher import start_teacher

        for level in noise:
            url = stack.enter_context(start_teacher(noise=level))
            yield f"world, noise {level:g}", url, "world"
        return
    models, urls = judge_model.split(","), judge_url.split(",")
    urls = urls * len(models) if len(urls) == 1 else urls
    if len(urls) != len(models):
        raise ValueError(f"{len(models)} of --judge_model need one --judge_url or as many")
    yield from zip(models, urls, models, strict=True)


def main(arguments: list[str]):
    flag = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flag.add_argument("--judge_url", default="world", help="up to /v1; several: commas")
    flag.add_argument("--judge_model", default="judge", help="several: commas")
    flag.add_argument("--data", default="world", help=".jsonl of labelled samples")
    flag.add_argument("--samples", type=int, default=200, help="of the data")
    flag.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.1, 0.3], help="of world")
    flag.add_argument("--reference", help="judge with which agreement is counted; the first")
    flag.add_argument("--concurrency", type=int, default=256)
    flag.add_argument("--max_tokens", type=int, default=512)
    bench(**vars(flag.parse_args(arguments)))


if __name__ == "__main__":
    command.run(main)
