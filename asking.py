"""The teachers of a run: who judges and who rewrites, and waiting for them.

In: the config's URLs ("world": the pocket world's own teacher). Out: a Judge and a Rewriter that
keep every answer in judgments.sqlite. A signal is heard while waiting.
"""

from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path

from chat import Chat, Traffic, greet
from config import Config
from judge import open_judge
from rewrite import open_rewriter
from support.command import Interrupted
from teachers.tasks import TaskRewards


class Teachers:
    """The judge and the rewriter of a run, and waiting for them so that a signal is heard."""

    def __init__(self, config: Config, world_url: str):
        run = Path(config.out_dir)
        self.chats, self.strangers = [], []
        self.stopped = False

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

        asked = chat(config.judge_url, config.judge_model)
        self.judge = open_judge(asked, config, store=asked.store)
        self.task = TaskRewards(self.judge) if config.task != "pretrain" else None
        self.rewriter = open_rewriter(chat(config.rewrite_url, config.rewrite_model), config)
        self.examiner = self.judge
        if config.eval_judge_url:
            # A record of its own: the same question to another judge is another question.
            model = config.eval_judge_model or config.judge_model
            exam = chat(config.eval_judge_url, model, "evaluation.sqlite")
            self.examiner = open_judge(exam, config)
        self.spent = Traffic(self.chats)

    def greet(self):
        """A small question to every teacher but the pocket world's, so that a wrong URL, key or
        model name ends the run before it has trained anything; waits for a server that starts."""
        for chat in self.strangers:
            greet(chat, self.judge.small_question())

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
        return self.spent.since_last()

    def close(self):
        for chat in self.chats:
            chat.close()
