"""The teachers of a run: who judges and who rewrites, and waiting for them.

In: the config's URLs ("world": the pocket world's own teacher). Out: a Judge and a Rewriter that
keep every answer in judgments.sqlite. A signal is heard while waiting.
"""

from collections import Counter
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path

from chat import Chat
from config import Config, names
from judge import Judge, render
from rewrite import Rewriter
from support.command import Interrupted
from teachers.tasks import TaskRewards


class Teachers:
    """The judge and the rewriter of a run, and waiting for them so that a signal is heard."""

    def __init__(self, config: Config, world_url: str):
        run = Path(config.out_dir)
        self.chats, self.strangers = [], []
        self.stopped = False
        self.seen = Counter()

        def chat(url, model, record="judgments.sqlite"):
            self.chats.append(
                Chat(
                    world_url if url == "world" else url,
                    model,
                    concurrency=config.concurrency,
                    timeout=config.timeout,
                    give_up_after=config.give_up_after,
                    cache=run / record,
                )
            )
            if url != "world":
                self.strangers.append(self.chats[-1])
            return self.chats[-1]

        self.judge = make_judge(
            chat(config.judge_url, config.judge_model), config, store=run / "judgments.sqlite"
        )
        self.task = TaskRewards(self.judge) if config.task != "pretrain" else None
        self.rewriter = Rewriter(
            chat(config.rewrite_url, config.rewrite_model),
            temperature=config.rewrite_temperature,
            max_tokens=4 * config.chunk,
            prompts=config.prompts,
            seed=config.seed,
        )
        self.examiner = self.judge
        if config.eval_judge_url:
            # A record of its own: the same question to another judge is another question.
            model = config.eval_judge_model or config.judge_model
            exam = chat(config.eval_judge_url, model, "evaluation.sqlite")
            self.examiner = make_judge(exam, config)

    def greet(self):
        """A small question to every teacher but the pocket world's, so that a wrong URL, key or
        model name ends the run before it has trained anything; waits for a server that starts."""
        question = render(self.judge.prompts["safety"], text="The sun is out.")
        how = dict(seed=0, temperature=0.0, top_p=1.0, max_tokens=16)
        for chat in self.strangers:
            self.wait(chat.run(chat.ask(question, **how)))

    def score(self, step: int, pool) -> Future:
        """Future of judge.Scores of a candidates.Pool."""
        batch = pool.batch
        if self.task:
            return self.task.score(batch.rows, pool.texts)
        texts = batch.prefix_text, batch.suffix_text, pool.texts
        return self.judge.score(step, *texts, pool.sources, batch.index.tolist())

    def stop(self, *_):
        self.stopped = True

    def check_stop(self):
        if self.stopped:
            raise Interrupted

    def wait(self, future: Future):
        while True:
            try:
                return future.result(timeout=0.2)
            except NotYet:
                self.check_stop()

    def traffic(self) -> dict:
        """Since the last call, as {name: (sum, count)}: requests, tokens, failures by kind, and the
        median and 99th percentile of recent answers in seconds."""
        stats = [chat.stats() for chat in self.chats]
        now = Counter()
        for each in stats:
            now["requests"] += each["calls"]
            now["tokens_in"] += each["tokens_in"]
            now["tokens_out"] += each["tokens_out"]
            now.update({f"failed.{kind}": n for kind, n in each["failed"].items()})
        before, self.seen = self.seen, now
        counts = {f"judge.{name}": now[name] - before[name] for name in now}
        out: dict[str, tuple[float, int]] = {name: (count, 0) for name, count in counts.items()}
        out["judge.tokens"] = (sum(out[f"judge.tokens_{way}"][0] for way in ("in", "out")), 0)
        for name in ("latency_p50", "latency_p99"):
            out[f"judge.{name}"] = (stats[0][name] or 0.0, 1)
        return out

    def close(self):
        for chat in self.chats:
            chat.close()


def make_judge(chat, config: Config, store=None) -> Judge:
    """The judge of a config, asked through `chat`; store: SQLite file that keeps its pools.

    ValueError where config.prompts is no folder, or a prompt in it does not show what ours shows.
    """
    return Judge(
        chat,
        rewards=names(config.rewards),
        comparisons=config.comparisons,
        samples=config.judge_samples,
        temperature=config.judge_temperature,
        top_p=config.judge_top_p,
        max_tokens=config.judge_max_tokens,
        prompts=config.prompts,
        retries=config.judge_retries,
        seed=config.seed,
        store=store,
    )
