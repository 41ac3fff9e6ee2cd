"""lm-evaluation-harness over our model: its tasks, our log-probabilities and sampler.

    pip install lm_eval
    python harness.py CKPT --baseline CKPT0                     # the paper's standard evaluations
    python harness.py CKPT --tasks truthfulqa --out harness.json
    python harness.py CKPT --tasks mytask --include_path FOLDER   # any task of its or one's own

In: Hugging Face folders, names of tasks. Out: a table, and JSON with every sample's score
(evaluate.py --harness takes TruthfulQA's from it).

Requests are scored where their tokens part: questions that begin alike (the choices of one
question, the questions behind one few-shot head) become one row [prefix | continuations], so that
what they share is computed once (model.py).
"""

from support.command import UserError
import argparse
import contextlib
import itertools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from evaluation.evaluate import aligned, bootstrap, show
from support.hub import local_folder
from model import load_model
from rollout import sample_rollouts
from support.tokenizer import load_tokenizer

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    sys.exit(f"error: harness.py needs lm-evaluation-harness: pip install lm_eval ({error})")

# The paper's standard evaluations and their examples in the prompt; the mean weighs tasks alike.
STANDARD = {
    "boolq": 0,
    "piqa": 0,
    "social_iqa": 0,
    "hellaswag": 0,
    "arc_easy": 0,
    "arc_challenge": 0,
    "openbookqa": 0,
    "mmlu": 5,
}
GROUPS = {"standard": STANDARD, "truthfulqa": {"truthfulqa_mc1": 0, "truthfulqa_mc2": 0}}


# ------------------------------------------------------------------------------------------------
# Rows


@dataclass
class Row:
    """Token sequences that share their first `prefix` tokens."""

    prefix: int
    feeds: list = field(default_factory=list)  # of tuples of tokens

    @property
    def own(self) -> int:
        """N: tokens of the longest continuation."""
        return max(map(len, self.feeds)) - self.prefix

    @property
    def cost(self) -> int:
        return self.prefix + len(self.feeds) * self.own


def common(a: tuple, b: tuple) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def rows_of(feeds, most: int) -> list[Row]:
    """Distinct token sequences in rows of at most `most` positions (or of one sequence), each
    sequence with its neighbours in order wherever that saves work."""
    rows = []
    for feed in sorted(set(feeds)):
        if rows:
            last = rows[-1]
            both = Row(min(last.prefix, common(last.feeds[-1], feed)), [*last.feeds, feed])
            if both.prefix and both.cost <= min(most, last.cost + len(feed) - 1):
                rows[-1] = both
                continue
        rows.append(Row(len(feed), [feed]))
    return rows


def batches_of(rows: list[Row], most: int):
    """Rows of similar shape together, at most `most` positions with their padding."""
    batch = []
    for row in sorted(rows, key=lambda row: (-len(row.feeds), -row.prefix, -row.own)):
        more = [*batch, row]
        shape = (max(r.prefix for r in more), max(len(r.feeds) for r in more))
        if batch and len(more) * (shape[0] + shape[1] * max(r.own for r in more)) > most:
            yield batch
            more = [row]
        batch = more
    if batch:
        yield batch


# ------------------------------------------------------------------------------------------------
# The harness's model


class NanoSIP(TemplateLM):
    """folder: a Llama-family Hugging Face folder. positions: tokens of a forward pass."""

    def __init__(self, folder, device="cpu", dtype=torch.float32, positions: int = 8192):
        super().__init__()
        self.model = load_model(folder, device, dtype)
        self.tokenizer = load_tokenizer(folder)
        self.max_length, self.positions = self.model.config.max_seq, positions
        self._device, self.computed = torch.device(device), 0
        self.start = declared_start(local_folder(folder, weights=False), self.tokenizer)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: the declared start token, or the end."""
        return self.eot_token_id if self.start is None else self.start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """With the token that the tokenizer itself puts before a text, unless told otherwise."""
        bos = self.tokenizer.bos
        return [bos] * (bos is not None and add_special_tokens is not False) + (
            self.tokenizer.encode(string)
        )

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, **_):
        """requests: (key, context tokens, continuation tokens) -> (log-likelihood, whether greedy
        decoding gives the continuation) of each. A context too long is cut at the left."""
        asked = {}  # feed -> what is predicted along it: (number, targets)
        found = [(0.0, True)] * len(requests)  # of nothing, where both merged into one token
        for number, (_, context, continuation) in enumerate(requests):
            tokens = tuple(context + continuation)[-(self.max_length + 1) :]
            if continuation:
                asked.setdefault(tokens[:-1], []).append((number, tokens[-len(continuation) :]))
        for batch in batches_of(rows_of(asked, self.positions), self.positions):
            hidden = self.hidden(batch)
            for row, (values, prefix) in zip(batch, hidden, strict=True):
                for feed, own in zip(row.feeds, values, strict=True):
                    for number, targets in asked[feed]:
                        first = len(feed) - len(targets)
                        at = torch.cat((prefix, own[: len(feed) - row.prefix]))[first:]
                        found[number] = self.score(at, targets)
        for (key, *_), answer in zip(requests, found, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def score(self, hidden, targets) -> tuple[float, bool]:
        """hidden [n, d] that predicts n targets."""
        logp = torch.log_softmax(self.model.logits(hidden).float(), dim=-1)
        wanted = torch.tensor(targets, device=logp.device)
        greedy = bool((logp.argmax(dim=-1) == wanted).all())
        return float(logp.gather(1, wanted[:, None]).sum()), greedy

    def hidden(self, batch: list[Row]):
        """[(own [C, N, d], prefix [P, d])] of every row, without padding at the left."""
        P, N = max(row.prefix for row in batch), max(row.own for row in batch)
        C, eos = max(len(row.feeds) for row in batch), self.eot_token_id
        tokens, pad = [], []
        for row in batch:
            own = [list(feed[row.prefix :]) for feed in row.feeds] if N else []
            own += [[]] * (C - len(own)) if N else []
            flat = [token for each in own for token in each + [eos] * (N - len(each))]
            pad.append(P - row.prefix)
            tokens.append([eos] * pad[-1] + list(row.feeds[0][: row.prefix]) + flat)
        tokens = torch.tensor(tokens, device=self._device)
        self.computed += tokens.numel()
        pads = torch.tensor(pad, dtype=torch.int32, device=self._device)
        hidden = self.model(tokens, pads, P, N)
        own = hidden[:, P:].unflatten(1, (C, N)) if N else hidden[:, None, :0].expand(-1, C, -1, -1)
        return [(own[i, : len(row.feeds)], hidden[i, pad[i] : P]) for i, row in enumerate(batch)]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of max_length that predict each token once."""
        windows, owner = [], []
        for number, request in enumerate(requests):
            found = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            windows += [(None, *make_disjoint_window(window)) for window in found]
            owner += [number] * (len(windows) - len(owner))
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continuations of contexts, up to a stop sequence or the number of tokens asked for."""
        found = [None] * len(requests)
        groups = {}  # requests with equal settings are sampled together
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        for numbers in groups.values():
            how = normalize_gen_kwargs(requests[numbers[0]].args[1], 256)
            until = handle_stop_sequences(how.get("until"), eos=None)
            most = how["max_gen_toks"]
            if (room := self.max_length - most) < 1:
                raise UserError(f"the model reads {self.max_length} tokens, {most} are asked for")
            contexts = {
                i: self.tok_encode(requests[i].args[0])[-room:] or [self.prefix_token_id]
                for i in numbers
            }
            size = max(1, self.positions // (max(map(len, contexts.values())) + most))
            ordered = iter(sorted(numbers, key=lambda i: -len(contexts[i])))
            while some := list(itertools.islice(ordered, size)):
                texts = self.generate([contexts[i] for i in some], until, most, how, some)
                for i, text in zip(some, texts, strict=True):
                    found[i] = postprocess_generated_text(text, until, None)
                    self.cache_hook.add_partial("generate_until", requests[i].args, found[i])
        return found

    def generate(self, contexts: list, until: list[str], most: int, how: dict, numbers: list):
        """Texts of at most `most` tokens; `numbers` key the randomness of each. Sampled in growing
        blocks, each from the longer prefix, so that what has met a stop sequence is sampled no
        further."""
        eos, block = self.eot_token_id, 16
        written, running = [[] for _ in contexts], list(range(len(contexts)))
        while running:
            ids = [contexts[i] + written[i] for i in running]
            length = max(map(len, ids))
            prefix = torch.tensor([[eos] * (length - len(row)) + row for row in ids])
            pad = torch.tensor([length - len(row) for row in ids], dtype=torch.int32)
            drawn = sample_rollouts(
                self.model,
                prefix.to(self._device),
                pad.to(self._device),
                1,
                min(block, most - len(written[running[0]])),
                eos=eos,
                seed=len(written[running[0]]),
                index=torch.tensor([numbers[i] for i in running]),
                temperature=how.get("temperature", 1.0) if how.get("do_sample") else 0.0,
                top_p=how.get("top_p", 1.0),
            )
            still = []
            for i, row, n in zip(
                running, drawn.tokens[:, 0].tolist(), drawn.lengths[:, 0].tolist(), strict=True
            ):
                written[i] += row[:n]
                text = self.tokenizer.decode(written[i])
                over = row[n - 1] == eos or len(written[i]) >= most
                if not over and not any(stop and stop in text for stop in until):
                    still.append(i)
            running, block = still, 2 * block
        return [self.tokenizer.decode(row) for row in written]


def declared_start(folder: Path, tokenizer) -> int | None:
    """Id of the bos_token that tokenizer_config.json names, whether or not the tokenizer puts it
    before a text."""
    if tokenizer.bos is not None:
        return tokenizer.bos
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        name = config.get("bos_token")
        name = name["content"] if isinstance(name, dict) else name
        spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
        return ids.get(name)
    return None


# ------------------------------------------------------------------------------------------------
# Command


def run_tasks(model: NanoSIP, tasks: dict, limit: int | None, include_path: str | None) -> dict:
    """task -> {"metric", "mean", "n", "values": a number a sample, "all": the harness's
    own results}. tasks: name -> examples in the prompt (None: as the task says)."""
    own = include_path is not None
    manager, results = TaskManager(include_path=include_path, include_defaults=not own), {}
    for name, shots in tasks.items():
        out = simple_evaluate(
            model=model,
            tasks=[name],
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=0,
        )
        scores = out["results"][name]
        metric = metric_of(scores)
        values = [
            float(sample[metric])
            for samples in out["samples"].values()
            for sample in samples
            if isinstance(sample.get(metric), int | float | np.number)
        ]
        results[name] = {
            "metric": metric,
            "mean": next(v for k, v in scores.items() if k.partition(",")[0] == metric),
            "n": len(values),
            "values": values,
            "all": {task: dict(found) for task, found in out["results"].items()},
        }
    return results


def metric_of(scores: dict) -> str:
    """Accuracy normalised by length where the task has it, else accuracy, else its first."""
    names = [key.partition(",")[0] for key, value in scores.items() if isinstance(value, float)]
    names = [name for name in names if not name.endswith("_stderr")]
    return next((name for name in ("acc_norm", "acc") if name in names), names[0])


def table(results: dict, tasks: dict) -> str:
    """A row a task, a column a policy, and the mean where all standard tasks were run."""
    rows = [["task", "metric", "n", *results]]
    for name in tasks:
        each = [found[name] for found in results.values()]
        means = [
            show(one["mean"], one["values"] and bootstrap([one["values"]]))
            if one["mean"] <= 1
            else f"{one['mean']:.2f}"  # a perplexity, no share
            for one in each
        ]
        rows.append([name, each[0]["metric"], str(each[0]["n"]), *means])
    if STANDARD.keys() <= tasks.keys():
        means = [show(standard_mean(found)) for found in results.values()]
        rows.append(["standard (mean)", "", "", *means])
    return aligned(rows)


def standard_mean(found: dict) -> float:
    return sum(found[name]["mean"] for name in STANDARD) / len(STANDARD)


def parse_args(argv):
    flag = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag.add_argument("checkpoint", help="Llama-family Hugging Face folder")
    flag.add_argument("--baseline", help="another folder, for the column beside it")
    flag.add_argument("--tasks", default="standard", help="standard, truthfulqa, or the harness's")
    flag.add_argument("--limit", type=int, help="samples of each task (default: all)")
    flag.add_argument("--include_path", help="folder of task files, instead of the harness's")
    flag.add_argument("--device", default="cpu")
    flag.add_argument("--positions", type=int, default=8192, help="tokens of a forward pass")
    flag.add_argument("--out", default="harness.json")
    return flag.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    tasks = {k: v for name in names for k, v in GROUPS.get(name, {name: None}).items()}
    if not tasks:
        sys.exit("error: --tasks names none")
    folders = {"base": args.baseline} if args.baseline else {}
    results = {}
    for name, folder in (folders | {"checkpoint": args.checkpoint}).items():
        model = NanoSIP(folder, args.device, positions=args.positions)
        results[name] = run_tasks(model, tasks, args.limit, args.include_path)
    Path(args.out).write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")
    print(table(results, tasks))


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
    except (ValueError, OSError, KeyError) as e:
        sys.exit(f"error: {e} (tasks load their data sets from the hub, or by --include_path)")
