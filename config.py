"""Every knob of a run in one place: name, default, unit, reason.

In: `train.py [config.py[:row] ...] [--key=value ...]`; support/settings.py reads them, later ones
win. Out: one Config, checked, and the phases of its run. It is written to the run folder.
"""

import dataclasses
import importlib.util
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from support.command import UserError
from support.settings import (
    convert,
    expand,
    help_text,
    key,
    names,
    nested,
    read_arguments,
    read_saved,
)

USAGE = """usage: python train.py [config.py[:row] ...] [--key=value ...]
       --print_config shows what these resolve to"""


# The defaults are the pocket world on a laptop. configs/ holds the paper's settings.
@dataclass
class Config:
    out_dir: str = key("out/world", "run folder: config, log, checkpoints, judgments, plots", "Run")
    seed: int = key(0, "keys all randomness, with a sample's number, its rollout and token")
    max_steps: int = key(100, "updates by the method, and as many by the next-token baseline")
    init_from: str = key("scratch", "'scratch', a Hugging Face folder, hf://owner/name, 'resume'")
    model: str = key("world", "shape for init_from=scratch: a preset of model.py")
    tokenizer: str = key("auto", "folder with tokenizer.json, hf://..., 'world'; auto: init_from's")
    device: str = key("auto", "'auto', 'cpu', 'cuda' or 'mps'")
    dtype: str = key("auto", "float32, or bfloat16 autocast; auto: bfloat16 on CUDA only")
    save_every: int = key(25, "steps between checkpoints, 250 in the base; one more at the end")
    keep: int = key(2, "checkpoints kept")
    example_every: int = key(20, "steps between printed example candidates with their verdicts")
    track: str = key("auto", "tensorboard, wandb; auto: the first, if installed")

    data: str = key("world", "path, glob, folder or URL of documents, or 'world'", "Data")
    text_field: str = key("auto", "JSON field that holds a document's text")
    window: int = key(1024, "documents shuffled together")
    chunk: int = key(32, "N: tokens of a suffix and of every candidate")
    max_seq: int = key(96, "tokens of prefix + candidate; a prefix has at most max_seq - chunk")
    batch_size: int = key(32, "prefixes a step, over all processes")
    dials: str = key("", "pocket world only, of world/corpus.py, e.g. 'share_unsafe=0.5,noise=0.1'")

    base_steps: int = key(800, "next-token steps from scratch before the method", "Base, baseline")
    base_batch_size: int = key(32, "documents a base step")
    base_optimizer: str = key("muon", "as optimizer")
    base_learning_rate: float = key(6e-3, "peak, cosine")
    baseline: bool = key(True, "also train the base max_steps further by next-token prediction")

    objective: str = key("dpo", "nll, rf_nll, dpo, ipo, dpop or grpo", "Method")
    candidates: str = key("suffix,rewrite,rollouts", "the pool: any of suffix, rewrite, rollouts")
    rollouts: int = key(4, "K: continuations sampled from the policy for each prefix")
    temperature: float = key(1.0, "of rollouts and, so that both agree, of all log-probabilities")
    top_p: float = key(1.0, "of rollouts; below 1 they are no longer samples of the policy itself")
    rewards: str = key("quality,safety,factuality", "summed, 'safety:2' twice; empty: first wins")
    beta: float = key(0.1, "DPO: weight of the frozen reference (the initial policy)")
    reject: str = key("rollouts", "DPO: who may be rejected: rollouts, where there are some; any")
    anchor: str = key("", "DPO, GRPO: plus W x NLL or KL a token on the prefix: nll:W, kl:W")
    grpo_clip: float = key(0.2, "GRPO: probability ratios beyond 1 +- this are clipped")
    grpo_kl: float = key(0.0, "GRPO: weight of the KL to the frozen reference (initial policy)")
    nll_prefix: bool = key(False, "nll, rf_nll: the prefix's tokens count too")
    nll_weight: float = key(0.0, "DPO: plus this times the NLL per token of the chosen")

    optimizer: str = key("adamw", "adamw; or muon for the layers' matrices", "Optimiser")
    learning_rate: float = key(1e-3, "peak, cosine to min_lr")
    min_lr: float = key(0.1, "final learning rate as a share of the peak")
    warmup_steps: int = key(5, "linear warm-up")
    weight_decay: float = key(0.1, "on matrices only")
    grad_clip: float = key(1.0, "largest gradient norm")
    shard: bool = key(False, "weights and optimiser spread over torchrun's processes (FSDP2)")
    recompute: bool = key(False, "activations are computed again in the backward pass: less memory")
    compile: bool = key(False, "torch.compile of the policy's layers; the first step takes longer")
    micro_batch_tokens: int = key(65536, "tokens of one forward pass; larger batches are split")

    judge_url: str = key("world", "OpenAI-compatible base URL(s) up to /v1, or 'world'", "Teachers")
    judge_model: str = key("judge", "model name sent to judge_url")
    judge_samples: int = key(1, "times each question is asked; verdicts are averaged")
    judge_temperature: float = key(1.0, "sampling of the judge")
    judge_top_p: float = key(1.0, "sampling of the judge")
    judge_max_tokens: int = key(512, "tokens of a verdict, its reasoning included")
    judge_retries: int = key(3, "times a malformed answer is asked again before it is left out")
    judge_extra: str = key("", "fields of each request: reasoning_effort=low,a.b=true; null: none")
    comparisons: str = key("all", "quality pairs: all, pivot, R opponents each, or race")
    overlap: int = key(0, "batches judged while the next are rolled out; 0 is the paper's order")
    rewrite_url: str = key("world", "as judge_url")
    rewrite_model: str = key("rewriter", "model name sent to rewrite_url")
    rewrite_temperature: float = key(1.0, "sampling of the rewriter")
    rewrite_max_tokens: int = key(0, "tokens of a rewrite, its reasoning included; 0: 4 x chunk")
    rewrite_extra: str = key("", "as judge_extra")
    concurrency: int = key(256, "questions in flight at once, of each process and kind of teacher")
    timeout: float = key(120.0, "seconds for one answer before it is asked again")
    give_up_after: float = key(600.0, "seconds without any answer before the run stops, resumable")
    prompts: str = key("prompts", "folder of prompt files; copy it to change the wording")

    eval_prefixes: int = key(256, "held-out prefixes of each kind, done greedily", "Evaluation")
    eval_judge_url: str = key("", "judge of the evaluation; empty: judge_url")
    eval_judge_model: str = key("", "model name sent to eval_judge_url; empty: judge_model")
    eval_judge_extra: str = key("", "as judge_extra")

    dry_run: bool = key(False, "print what the run will cost, and stop", "Cost (dry_run, check)")
    check: bool = key(False, "try policy, data, teachers for seconds, estimate the cost, and stop")
    gpus: int = key(8, "GPUs that the policy runs on")
    gpu_tflops: float = key(300.0, "TFLOP/s that one of them reaches in practice")
    judge_tokens_per_second: float = key(20000.0, "tokens that all judge replicas write a second")
    price_in: float = key(0.0, "price of a million tokens read by the teachers")
    price_out: float = key(0.0, "price of a million tokens written by the teachers")


PAIRWISE = ("dpo", "ipo", "dpop")  # objectives that learn from a chosen and a rejected one
OBJECTIVES = ("nll", "rf_nll", *PAIRWISE, "grpo")
MONITORS = ("tensorboard", "wandb")
SOURCES = ("suffix", "rewrite", "rollouts")
# Kinds of judgment: verdicts.py says what a verdict is worth, prompts/ how it is asked for.
REWARDS = ("quality", "safety", "factuality")

# No number may be negative, and none of these 0.
POSITIVE = ["max_steps", "batch_size", "base_batch_size", "rollouts", "window", "save_every"]
POSITIVE += ["keep", "example_every", "judge_samples", "judge_max_tokens", "concurrency", "timeout"]
POSITIVE += ["grad_clip", "micro_batch_tokens", "gpus", "gpu_tflops", "judge_tokens_per_second"]
POSITIVE += ["chunk", "beta"]
FOLDERS = ["out_dir", "data", "init_from", "tokenizer", "prompts"]  # where ~ is the home folder

# Keys that change no result beyond rounding: they may differ when an unfinished run goes on.
NEUTRAL = {"out_dir", "device", "save_every", "keep", "example_every", "track", "shard"}
NEUTRAL |= {"recompute", "compile", "micro_batch_tokens", "concurrency", "timeout"}
NEUTRAL |= {"give_up_after", "eval_prefixes", "eval_judge_url", "eval_judge_model", "dry_run"}
NEUTRAL |= {"eval_judge_extra", "check", "gpus", "gpu_tflops", "judge_tokens_per_second"}
NEUTRAL |= {"price_in", "price_out"}
ADDRESSES = {"judge_url", "rewrite_url"}  # neutral, too, unless one of the two is the pocket world

# Keys of older versions, with the values that are what is done now.
GONE = {"task": "pretrain", "grpo_std": True, "grpo_length": True, "length_norm": False}
# Keys that older versions did not write, with what they did.
WAS = {"reject": "any", "optimizer": "adamw", "base_optimizer": "adamw"}


def parse(argv: list[str]) -> tuple[Config, bool]:
    """Command line -> (Config, whether a run is resumed: its own settings, then those given)."""
    if {"-h", "--help"} & set(argv):
        print(USAGE, help_text(Config), sep="\n")
        sys.exit(0)
    given = read_arguments(Config, [arg for arg in argv if arg != "--print_config"])
    resume = given.get("init_from") == "resume"
    if resume:
        path = Path(expand(given.get("out_dir", Config.out_dir))) / "config.json"
        if not path.is_file():
            raise UserError(f"init_from=resume: {path} does not exist, there is no run to resume")
        del given["init_from"]
        given = read_saved(Config, GONE, WAS, path) | {"out_dir": str(path.parent)} | given
    config = check(Config(**given))
    if "--print_config" in argv:
        print(json.dumps(dataclasses.asdict(config), indent=2))
        sys.exit(0)
    return config, resume


def differences(config: Config, path: Path) -> list[str]:
    """What makes config another run than that of a saved config.json: 'seed (0, now 1)'."""
    saved, out = read_saved(Config, GONE, WAS, path), []
    for f in dataclasses.fields(Config):
        before, now = saved.get(f.name, f.default), getattr(config, f.name)
        moved = f.name in ADDRESSES and "world" not in (before, now)
        if before != now and f.name not in NEUTRAL and not moved:
            out.append(f"{f.name} ({before!r}, now {now!r})")
    return out


def need(condition, message: str):
    if not condition:
        raise UserError(message)


def check(config: Config) -> Config:
    """Refuse values and combinations that cannot run, naming the keys."""
    for name in FOLDERS:
        setattr(config, name, expand(getattr(config, name)))
    check_values(config)
    sources, objective = names(config.candidates), config.objective
    need(sources and len(set(sources)) == len(sources), "candidates: name each source once")
    need(objective == "nll" or pool_size(config) > 1, f"objective={objective} needs 2 candidates")
    if objective == "grpo":
        need(sources == ["rollouts"], "objective=grpo takes samples alone: candidates=rollouts")
        need(config.rewards, "objective=grpo learns from rewards: set some")
    if objective == "nll":
        need(not config.rewards, "objective=nll takes the first: rewards= (empty), or use rf_nll")
    if config.anchor:
        parse_anchor(config.anchor)
        need("nll" not in objective, "anchor is for pairs and grpo; nll takes nll_prefix=True")
    own = dict(nll_prefix=("nll", "rf_nll"), nll_weight=PAIRWISE, grpo_kl=("grpo",))
    for name, objectives in own.items():
        fit = objective in objectives or not getattr(config, name)
        need(fit, f"{name} is for {', '.join(objectives)}, not for {objective=!s}")
    if config.max_seq < 2 * config.chunk:
        raise UserError(f"max_seq={config.max_seq} must hold prefix and suffix, 2 x {config.chunk}")
    return config


def check_values(config: Config):
    """Each key by itself."""

    def among(name, found, allowed):
        wrong = [x for x in found if x not in allowed]
        need(not wrong, f"{name}: {', '.join(wrong)} is none of {', '.join(allowed)}")

    among("objective", [config.objective], OBJECTIVES)
    among("candidates", names(config.candidates), SOURCES)
    among("reject", [config.reject], ("any", "rollouts"))
    for name in ("optimizer", "base_optimizer"):
        among(name, [getattr(config, name)], ("adamw", "muon"))
    among("device", [config.device.partition(":")[0]], ("auto", "cpu", "cuda", "mps"))
    among("dtype", [config.dtype], ("auto", "float32", "bfloat16"))
    if config.track != "auto":
        among("track", names(config.track), MONITORS)
    for name in names(config.track):
        installed = name == "auto" or importlib.util.find_spec(name)
        need(installed, f"track={name} needs a library: pip install {name}")
    parse_rewards(config.rewards)
    need(
        re.fullmatch(r"all|pivot|[1-9]\d*|race(:\d*\.?\d+)?", config.comparisons),
        f"comparisons={config.comparisons}: 'all', 'pivot', 'race' or a number of opponents",
    )
    for name in ("judge_url", "rewrite_url", "eval_judge_url"):  # they go into files of the run
        keyless = not any(sign in getattr(config, name) for sign in "@?")
        need(keyless, f"{name}: a key goes into OPENAI_API_KEY, not into the URL")
    for name in ("judge_extra", "rewrite_extra", "eval_judge_extra"):
        nested(getattr(config, name))
    password = re.search(r"https?://[^/,]*@", config.data)
    need(not password, "data: a password in a URL would be written into the run's files")
    for name, value in vars(config).items():
        fit = isinstance(value, str) or 0 <= value < (2**63 if type(value) is int else math.inf)
        need(fit, f"{name} must not be negative, nor without end")
        need(value or name not in POSITIVE, f"{name} must be above 0")
    for name in ("top_p", "judge_top_p"):
        need(0 < getattr(config, name) <= 1, f"{name} must be above 0 and at most 1")


def parse_rewards(rewards) -> dict[str, float]:
    """ "quality,safety:2" or its items -> {"quality": 1.0, "safety": 2.0}."""
    weights = {}
    for item in names(rewards) if isinstance(rewards, str) else rewards:
        kind, colon, weight = item.partition(":")
        if kind not in REWARDS:
            raise UserError(f"rewards: {kind} is none of {', '.join(REWARDS)}")
        weights[kind] = convert(f"the weight of {kind}", weight, float, "rewards") if colon else 1.0
        if not 0 < weights[kind] < math.inf:
            raise UserError(f"rewards: the weight of {kind} must be positive, leave it out else")
    return weights


def parse_anchor(text: str) -> tuple[str, float]:
    """ "kl:0.5" -> ("kl", 0.5)."""
    kind, _, weight = text.partition(":")
    if kind not in ("nll", "kl") or not weight:
        raise UserError(f"anchor={text}: write nll:W or kl:W, or leave it empty")
    value = convert("the weight of anchor", weight, float, "anchor")
    need(0 < value < math.inf, f"anchor={text}: the weight must be positive")
    return kind, value


def monitors(config: Config) -> list[str]:
    """The live monitors of a run: those named, or TensorBoard where it is installed."""
    if config.track != "auto":
        return names(config.track)
    return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []


def pool_size(config: Config) -> int:
    """C, the candidates of each prefix."""
    sources = names(config.candidates)
    return len(sources) + (config.rollouts - 1 if "rollouts" in sources else 0)


def needs_reference(config: Config) -> bool:
    """Whether the objective compares the policy with the frozen initial one."""
    if config.objective == "grpo":
        return bool(config.grpo_kl) or config.anchor.startswith("kl")
    return config.objective in PAIRWISE


def phases(config: Config) -> dict[str, Config]:
    """The run's phases by name: base (from scratch only), baseline (optional), and the method."""
    next_token: dict = dict(objective="nll", candidates="suffix", rewards="", nll_prefix=True)
    next_token |= dict(overlap=0, anchor="", temperature=1.0)  # those are the method's
    out = {}
    if config.init_from == "scratch" and config.base_steps:
        out["base"] = dataclasses.replace(
            config,
            **next_token,
            out_dir=f"{config.out_dir}/base",
            max_steps=config.base_steps,
            batch_size=config.base_batch_size,
            optimizer=config.base_optimizer,
            learning_rate=config.base_learning_rate,
            warmup_steps=config.base_steps // 30,
            save_every=250,
        )
    if config.baseline:
        out_dir = f"{config.out_dir}/baseline"
        out["baseline"] = dataclasses.replace(config, **next_token, out_dir=out_dir)
    return out | {"method": config}
