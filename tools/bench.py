"""Ours beside what one would use instead: same weights, same tokens, one machine, one run.

    python -m tools.bench                          all sections
    python -m tools.bench sampler update step      against transformers and TRL, on a CPU
    python -m tools.bench kernels --minutes 8      the first thing to run on a GPU (docs/gpu.md)

Out: a line a measurement, each written to bench.jsonl as well when it is made.  Ratios are of
medians over rounds in which the sides take turns, since machines are noisy.  The peers
(transformers, trl, datasets, liger-kernel) are needed here only; a section without its peer says
so.
"""

import argparse
import copy
import json
import tempfile
import zlib
from functools import partial
from types import SimpleNamespace

import torch

from candidates import make_pool
from config import Config
from data import Batch
from model import Llama, ModelConfig, preset, save_model
from objectives import dpo_loss
from rollout import sample_rollouts
from support import command
from support.runlog import Clock
from tools.bench_kernels import CUDA, DEVICE, in_turns, peak_gb
from tools.bench_kernels import rows as kernels
from tools.cost import memory
from update import make_optimizer, pick
from update import update as update_policy


def small_llama(layers: int, seed: int = 0) -> Llama:
    """Small enough for a CPU, shaped like a Llama: width 512, GQA, 8,192 tokens."""
    shape = ModelConfig(8192, layers, n_head=8, n_kv_head=4, d_model=512, d_ff=1408, head_dim=64)
    return Llama(shape).initialise(seed)


def peer_of(ours: Llama):
    """The same weights in transformers."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_model(ours, folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def sampler():
    """16 rollouts of 64 tokens of 1 and of 4 prefixes: ours and transformers' generate, whose
    static cache is the faster of its two."""
    ours, K, N = small_llama(layers=8), 16, 64
    theirs = peer_of(ours)
    how = dict(do_sample=True, top_k=0, max_new_tokens=N, num_return_sequences=K)
    how |= dict(pad_token_id=0, eos_token_id=None, cache_implementation="static")
    for B, P in ((1, 256), (4, 256), (1, 1024), (4, 1024)):
        prefix = torch.randint(8000, (B, P), generator=torch.Generator().manual_seed(P))
        pad, mask = torch.zeros(B, dtype=torch.int32), torch.ones_like(prefix)
        keyed = dict(eos=-1, seed=0, index=torch.arange(B))
        sides = {
            "ours": partial(sample_rollouts, ours, prefix, pad, K, N, **keyed),
            "transformers": partial(theirs.generate, prefix, attention_mask=mask, **how),
        }
        for row in in_turns(f"{K} rollouts of {N}: B={B} P={P}", sides):
            yield row | {"tokens_per_second": B * K * N / row["seconds"]}


def trl_trainer(trainer, settings, policy: Llama, reference: Llama, rows: dict, tokens, **given):
    """A trainer of TRL on the same weights; tokens: a `tokenizers` tokenizer, tokens[1] ends."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    # Checkpointing would sample without a cache, and compute every layer twice.
    quiet = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[])
    args = settings(tempfile.mkdtemp(), disable_tqdm=True, **quiet, **given.pop("args", {}))
    ends = dict.fromkeys(("eos_token", "pad_token"), tokens.id_to_token(1))
    given["processing_class"] = PreTrainedTokenizerFast(tokenizer_object=tokens, **ends)
    given |= dict(ref_model=peer_of(reference), train_dataset=Dataset.from_dict(rows))
    return trainer(peer_of(policy), args=args, **given)


def words(V: int):
    """A tokenizer of V words: w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokens


def trl_dpo(policy: Llama, reference: Llama, pair: torch.Tensor, P: int):
    """TRL's DPOTrainer: its loss on its padded pairs [2, P + N], and the gradients."""
    from trl import DPOConfig, DPOTrainer

    rows = dict(prompt=["w0"], chosen=["w0"], rejected=["w0"])
    trainer = trl_trainer(DPOTrainer, DPOConfig, policy, reference, rows, words(2))
    model = trainer.model.train()
    own = (torch.arange(pair.shape[1]) >= P).long().expand_as(pair)
    inputs = dict(input_ids=pair, attention_mask=torch.ones_like(pair), completion_mask=own)

    def run() -> float:
        loss = trainer.compute_loss(model, inputs)
        loss.backward()
        model.zero_grad()
        return loss.item()

    return run


def update():
    """A DPO pair, policy and reference: forward and backward."""
    policy, reference = small_llama(4), small_llama(4, seed=1)
    tokens = partial(torch.randint, 8000, generator=torch.Generator().manual_seed(0))

    def dpo(prefix, continuations) -> float:
        layout = prefix, torch.zeros(len(prefix), dtype=torch.int32), continuations
        with torch.no_grad():
            anchor = reference.logprobs(*layout).sum(dim=2)
        scores = policy.logprobs(*layout).sum(dim=2)
        loss = dpo_loss(scores.view(-1, 2), anchor.view(-1, 2), 0.1).sum()
        loss.backward()
        policy.zero_grad()
        return loss.item()

    prefix, pair = tokens((1, 1920)), tokens((1, 2, 128))
    apart = prefix.expand(2, -1), pair.transpose(0, 1)
    sides = {
        "ours": partial(dpo, prefix, pair),
        "TRL": trl_dpo(policy, reference, torch.cat((apart[0], apart[1][:, 0]), 1), 1920),
        "ours, a row each": partial(dpo, *apart),
    }
    values = [run() for run in sides.values()]
    assert max(values) - min(values) < 1e-3, values  # the same loss
    for row in in_turns("DPO pair P=1920 N=128", sides):
        yield row | {"peak_gb": peak_gb(sides[row["side"]])}


def crc(text: str) -> float:
    """A reward that costs nothing and never ties."""
    return zlib.crc32(text.encode()) / 2**32


def our_step(policy: Llama, tokens, prompts: list, config: Config):
    """train.py's step with `crc` for a judge."""
    B, (policy, reference) = len(prompts), (copy.deepcopy(policy), policy)
    optimizer = make_optimizer(policy, config)
    tokenizer = SimpleNamespace(eos=1, decode=tokens.decode)
    prefix = torch.tensor([tokens.encode(prompt).ids for prompt in prompts], device=DEVICE)
    pad, suffix = prefix.new_zeros(B, dtype=torch.int32), prefix.new_zeros(B, config.chunk)
    batch = Batch(prefix, pad, suffix, torch.arange(B), prompts, [], {})

    def run():
        pool = make_pool(policy, batch, None, config, tokenizer, Clock())
        reward = torch.tensor([[crc(text) for text in row] for row in pool.texts])
        picked = pick(pool, reward, config)
        update_policy(policy, reference, optimizer, pool, picked, reward, 5, config)

    return run


def trl_step(policy: Llama, tokens, prompts: list, config: Config):
    """TRL's OnlineDPOTrainer: sampling, reward function, loss, optimiser."""
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    args = dict(max_new_tokens=config.chunk, max_length=config.max_seq, temperature=1.0)
    args["learning_rate"] = config.learning_rate
    how = OnlineDPOTrainer, OnlineDPOConfig, policy, policy, dict(prompt=prompts), tokens
    reward = lambda completions, **_: [crc(text) for text in completions]  # noqa: E731
    trainer = trl_trainer(*how, args=args, reward_funcs=reward)
    optimizer = trainer.create_optimizer()

    def run():
        trainer.training_step(trainer.model, {"prompt": prompts})
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return run


def step():
    """A whole step of DPO on two rollouts a prefix; on a GPU the paper's, with 16, ours alone.  The
    reward is a Python function on both sides, so that a judge's speed plays no part."""
    shapes = {"world": (846, 32, 64, 32, 2), "smollm2-135m": (49152, 2, 128, 32, 2)}
    shapes = {"llama-1.4b": (32000, 16, 1920, 128, 16)} if CUDA else shapes
    for name, (V, B, P, N, K) in shapes.items():
        ids = torch.randint(2, V, (B, P), generator=torch.Generator().manual_seed(0)).tolist()
        prompts = [" ".join(f"w{i}" for i in row) for row in ids]
        size = dict(rollouts=K, chunk=N, max_seq=P + N, batch_size=B, baseline=False)
        config = Config(candidates="rollouts", learning_rate=1e-5, gpus=1, **size)
        policy = Llama(preset(name, V)).initialise(0).to(DEVICE)
        given = policy, words(V), prompts, config
        sides = {"ours": our_step(*given)} | ({} if CUDA else {"TRL": trl_step(*given)})
        forecast = memory(config, policy.config, bf16=CUDA)["most at once"] / 1e9
        more = dict(peak_gb=peak_gb(sides["ours"]), forecast_gb=forecast) if CUDA else {}
        yield from in_turns(f"step of {name} B={B} P={P} N={N} K={K}", sides, **more)


SECTIONS = {"kernels": kernels, "sampler": sampler, "update": update, "step": step}


def main(arguments: list[str]):
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=[])
    parser.add_argument("--minutes", type=float, default=8.0, help="for `kernels`, about")
    args = parser.parse_args(arguments)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    with open("bench.jsonl", "a", encoding="utf-8") as file:
        for name in args.sections or SECTIONS:
            how = dict(minutes=args.minutes) if name == "kernels" else {}
            try:
                for row in SECTIONS[name](**how):
                    print(json.dumps({"section": name} | row), file=file, flush=True)
                    shown = (f"{v:.4g}" if isinstance(v, float) else v for v in row.values())
                    print(*(f"{k} {v}" for k, v in zip(row, shown, strict=True)), sep="  ")
            except ImportError as e:
                print(f"{name}: left out, {e}")


if __name__ == "__main__":
    command.run(main)
