"""One step of the method, printed in the order of the code: read it beside train.train.

    python -m tools.lesson                     on a base trained here for a minute
    python -m tools.lesson out/world/base/ckpt on the demo's base

In: the pocket world and its teacher. Out: the document and where it is cut, the candidates, two
questions as sent, the rewards, who is picked, the loss by hand and by the code, what it changed.
docs/one_step.md is what this prints.
"""

import argparse
import copy
import tempfile
from contextlib import ExitStack

import torch

import config as configuration
import train
from candidates import make_pool
from data import document_tokens, open_stream
from judge import first_wins, render
from model import initial_policy, load_model
from optimizer import make_optimizer
from rewrite import Teachers
from support import command
from support.runlog import Clock
from support.tokenizer import load_tokenizer
from update import losses, pick, update
from world.corpus import WorldSource
from world.teacher import teacher_at

FLAGS = ["--batch_size=1", "--rollouts=2", "--warmup_steps=0", "--base_steps=150", "--seed=3"]


def base_policy(config, tokenizer, folder: str | None):
    """The policy of a folder, or one trained here by next-token prediction, with the same loop."""
    if folder:
        return load_model(folder)
    phase = configuration.phases(config)["base"]
    policy = initial_policy(config, tokenizer.vocab_size, "cpu")
    stream = open_stream(WorldSource(config.seed), tokenizer, phase)
    train.train(policy, policy, stream, first_wins, None, tokenizer, phase)
    return policy


def say(title: str, *lines: str):
    indented = ("    " + line for text in lines for line in text.rstrip().split("\n"))
    print(f"\n## {title}\n\n" + "\n".join(indented))


def show_pool(pool, batch, config):
    P, N, C = batch.prefix.shape[1], config.chunk, len(pool.sources)
    say(
        "2. Candidates [B, C, N]: candidates.make_pool",
        f"candidates [{len(batch.prefix)}, {C}, {N}]; as a row of the model, whose prefix is",
        "computed once:",
        f"[ prefix {P} | " + " | ".join(f"{source} {N}" for source in pool.sources) + " ]"
        f" = {P + C * N} positions instead of {C * (P + N)}",
        *(f"{s:8} {n:3d} tokens  {t!r}" for s, n, t in
          zip(pool.sources, pool.lengths[0].tolist(), pool.texts[0], strict=True)),
    )  # fmt: skip


def show_scores(pool, scores, judge, batch):
    seen = {verdict["kind"]: verdict for verdict in reversed(scores.examples)}
    for kind, names in (("quality", ("a", "b")), ("safety", ("text",))):
        verdict = seen[kind]
        shown = dict(zip(names, verdict["candidates"], strict=True), prefix=batch.prefix_text[0])
        question = render(judge.prompts[kind], **shown)
        say(f"3. A question of {kind}, as sent: judge.render, support.chat.Chat.ask", question)
        answer = verdict["answer"], "", f"-> {verdict['verdict']}"
        say("3. Its answer, and the verdict in it: verdicts.parse", *answer)
    columns = scores.by_kind | {"reward": scores.reward}
    rows = [f"{'':9}" + " ".join(f"{kind:>10}" for kind in columns)]
    for c, source in enumerate(pool.sources):
        rows.append(f"{source:9}" + " ".join(f"{x[0, c]:10.2f}" for x in columns.values()))
    say(f"3. Rewards [B, C] = [1, {len(pool.sources)}]: judge.Judge.score", *rows)


def learn(policy, reference, pool, picked, reward, config):
    """Step 4, with the loss worked out by hand beside the code's."""
    batch, pair = pool.batch, picked.columns[0]
    best, worst = pair.tolist()
    say(
        "4. Who is picked: update.pick",
        f"chosen    {pool.sources[best]:8} {reward[0, best]:.2f}  the highest reward",
        f"rejected  {pool.sources[worst]:8} {reward[0, worst]:.2f}  the lowest of the rollouts",
    )
    layout = batch.prefix, batch.pad, pool.tokens[:, pair], pool.lengths[:, pair]
    optimizer = make_optimizer(policy, config)
    for turn in ("before", "after"):
        with torch.no_grad():  # of (chosen, rejected), summed over their tokens: [2]
            logp, frozen = (x.logprobs(*layout)[0].sum(dim=1) for x in (policy, reference))
        margin = (logp - frozen)[0] - (logp - frozen)[1]
        by_code, _ = losses(policy, reference, pool, picked, slice(0, 1), reward, config)
        say(
            f"4. The loss {turn} the update: update.losses, Llama.logprobs, objectives.dpo_loss",
            f"log p of (chosen, rejected): policy {logp[0]:.3f}, {logp[1]:.3f}"
            f"; reference {frozen[0]:.3f}, {frozen[1]:.3f}",
            f"margin = {margin:.3f}: what the policy gained on the chosen, less on the rejected",
            f"by hand      log(1 + exp(-beta margin)) = log(1 + exp(-{config.beta} x {margin:.3f}))"
            f" = {torch.log1p((-config.beta * margin).exp()):.6f}",
            f"by the code  {by_code:.6f}",
        )
        if turn == "before":
            metrics = update(policy, reference, optimizer, pool, picked, reward, 0, config)
    told = f"gradient norm {metrics['grad_norm'][0]:.3f}, clipped at 1; AdamW"
    say("4. The update between them: update.update", told)


def main(arguments: list[str]):
    flag = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag.add_argument("base", nargs="?", help="checkpoint of the pocket world (else trained here)")
    args = flag.parse_args(arguments)
    with ExitStack() as stack:
        run = stack.enter_context(tempfile.TemporaryDirectory())
        config, _ = configuration.parse([*FLAGS, f"--out_dir={run}/world"])
        tokenizer = load_tokenizer("world")
        teachers = Teachers(config, teacher_at("world"), stack)
        reference = base_policy(config, tokenizer, args.base)
        policy = copy.deepcopy(reference)
        document = next(WorldSource(config.seed).documents())[0]
        stream = open_stream(WorldSource(config.seed), tokenizer, config)
        stream.window = 1  # so that the first document of the source is the first of the stream
        batch = next(stream.batches())
        print("# One step\n\nWhat `python -m tools.lesson` prints; open train.py beside it.")
        P, count = batch.prefix.shape[1], len(document_tokens(document, tokenizer))
        say(
            "1. A prefix [B, P] and its original suffix [B, N]: data.Stream, data.cut",
            f"a document of {count} tokens, cut where a chunk of {config.chunk} begins: at ||",
            document.replace(batch.prefix_text[0], f"{batch.prefix_text[0]} ||"),
            f"prefix [1, {P}], suffix [1, {config.chunk}]",
        )
        pool = make_pool(policy, batch, teachers.rewriter, config, tokenizer, Clock())
        show_pool(pool, batch, config)
        scores = command.wait(teachers.score(0, pool))
        show_scores(pool, scores, teachers.judge, batch)
        reward = torch.from_numpy(scores.reward)
        learn(policy, reference, pool, pick(pool, reward, config), reward, config)


if __name__ == "__main__":
    command.run(main)
