"""Every knob of a run in one place: name, default, unit, reason.

In: `train.py [config.py[:row] ...] [--key=value ...]`. A config file is Python that assigns keys,
and may assign `rows`, a dict of named rows with keys of their own; later files and flags win.
Out: one Config. An unknown key or row is an error that names the nearest one, a value of the wrong
type says what was expected; the resolved config is written to the run folder.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import json
import math
import os
import re
import runpy
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from support.command import UserError


def key(default, meaning, group=""):
    return field(default=default, metadata={"meaning": meaning, "group": group})


# The defaults are the pocket world on a laptop. configs/ holds the paper's settings.
@dataclass
class Config:
    out_dir: str = key("out/world", "run folder: config, log, checkpoints, judgments, plots", "Run")
    seed: int = key(0, "keys all randomness together with step, sample and rollout")
    max_steps: int = key(100, "updates by the method, and as many by the next-token baseline")
    init_from: str = key("scratch", "'scratch', a Hugging Face folder, hf://owner/name, 'resume'")
    model: str = key("world", "shape for init_from=scratch: a preset of model.py")
    tokenizer: str = key("auto", "folder with tokenizer.json, hf://..., 'world'; auto: init_from's")
    device: str = key("auto", "'auto', 'cpu', 'cuda' or 'mps'")
    dtype: str = key("auto", "float32, or bfloat16 autocast; auto: bfloat16 on CUDA only")
    save_every: int = key(25, "steps between checkpoints (one is also written at the end)")
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

    base_steps: int = key(1200, "next-token steps from scratch before the method", "Base, baseline")
    base_batch_size: int = key(64, "documents a base step")
    base_learning_rate: float = key(3e-3, "peak, cosine")
    baseline: bool = key(True, "also train the base max_steps further by next-token prediction")

    objective: str = key("dpo", "nll, rf_nll, dpo or grpo", "Method")
    candidates: str = key("suffix,rewrite,rollouts", "the pool: any of suffix, rewrite, rollouts")
    rollouts: int = key(4, "K: continuations sampled from the policy for each prefix")
    temperature: float = key(1.0, "of rollouts and, so that both agree, of all log-probabilities")
    top_p: float = key(1.0, "of rollouts; below 1 they are no longer samples of the policy itself")
    rewards: str = key("quality,safety,factuality", "summed, 'safety:2' twice; empty: first wins")
    beta: float = key(0.1, "DPO: weight of the frozen reference (the initial policy)")
    grpo_clip: float = key(0.2, "GRPO: probability ratios beyond 1 +- this are clipped")
    grpo_kl: float = key(0.0, "GRPO: weight of the KL to the frozen reference (initial policy)")
    nll_prefix: bool = key(False, "nll, rf_nll: the prefix's tokens count too")
    nll_weight: float = key(0.0, "DPO: plus this times the NLL per token of the chosen")

    learning_rate: float = key(5e-4, "peak, cosine to min_lr", "Optimiser")
    min_lr: float = key(0.1, "final learning rate as a share of the peak")
    warmup_steps: int = key(5, "linear warm-up")
    weight_decay: float = key(0.1, "AdamW, on matrices only")
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
    comparisons: str = key("all", "quality pairs: all, pivot, R opponents each, or race")
    overlap: int = key(0, "batches judged while the next are rolled out; 0 is the paper's order")
    rewrite_url: str = key("world", "as judge_url")
    rewrite_model: str = key("rewriter", "model name sent to rewrite_url")
    rewrite_temperature: float = key(1.0, "sampling of the rewriter")
    rewrite_max_tokens: int = key(0, "tokens of a rewrite, its reasoning included; 0: 4 x chunk")
    concurrency: int = key(256, "questions in flight at once, of each process and kind of teacher")
    timeout: float = key(120.0, "seconds for one answer before it is asked again")
    give_up_after: float = key(600.0, "seconds without any answer before the run stops, resumable")
    prompts: str = key("prompts", "folder of prompt files; copy it to change the wording")

    eval_prefixes: int = key(256, "held-out prefixes of each kind, done greedily", "Evaluation")
    eval_judge_url: str = key("", "judge of the evaluation; empty: judge_url")
    eval_judge_model: str = key("", "model name sent to eval_judge_url; empty: judge_model")

    dry_run: bool = key(False, "print what the run will cost, and stop", "Cost (for dry_run alone)")
    gpus: int = key(8, "GPUs that the policy runs on")
    gpu_tflops: float = key(300.0, "TFLOP/s that one of them reaches in practice")
    judge_tokens_per_second: float = key(20000.0, "tokens that all judge replicas write a second")
    price_in: float = key(0.0, "price of a million tokens read by the teachers")
    price_out: float = key(0.0, "price of a million tokens written by the teachers")


OBJECTIVES = ("nll", "rf_nll", "dpo", "grpo")
MONITORS = ("tensorboard", "wandb")
SOURCES = ("suffix", "rewrite", "rollouts")
# Kinds of judgment: verdicts.py says what a verdict is worth, prompts/ how it is asked for.
REWARDS = ("quality", "safety", "factuality")

# No number may be negative, and none of these 0.
POSITIVE = ["max_steps", "batch_size", "base_batch_size", "rollouts", "window", "save_every"]
POSITIVE += ["keep", "example_every", "judge_samples", "judge_max_tokens", "concurrency", "timeout"]
POSITIVE += ["grad_clip", "micro_batch_tokens", "gpus", "gpu_tflops", "judge_tokens_per_second"]
POSITIVE += ["chunk"]
FOLDERS = ["out_dir", "data", "init_from", "tokenizer", "prompts"]  # where ~ is the home folder

# Keys that change no result beyond rounding: they may differ when an unfinished run goes on.
NEUTRAL = {"out_dir", "device", "save_every", "keep", "example_every", "track", "shard"}
NEUTRAL |= {"recompute", "compile", "micro_batch_tokens", "concurrency", "timeout"}
NEUTRAL |= {"give_up_after", "eval_prefixes", "eval_judge_url", "eval_judge_model", "dry_run"}
NEUTRAL |= {"gpus", "gpu_tflops", "judge_tokens_per_second", "price_in", "price_out"}
ADDRESSES = {"judge_url", "rewrite_url"}  # neutral, too, unless one of the two is the pocket world


WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def convert(name: str, value, kind: type, where: str):
    """value as `kind`; text comes from flags. An int serves as a float, 1e3 as an int; no nan."""
    with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
        if kind is bool:
            return WORDS[str(value).lower()]
        if kind is str and isinstance(value, list | tuple):
            return ",".join(map(str, value))
        if kind is str and isinstance(value, str | int | float):
            return str(value)
        if kind is not str and not isinstance(value, bool):
            whole = kind is int and isinstance(value, int | str) and "e" not in str(value)
            number = int(value) if whole else float(value)  # int alone keeps more than 53 bits
            if number == kind(number):
                return kind(number)
    raise UserError(f"{where}: {name} needs {kind.__name__}, not {value!r}")


def apply(values: dict, changes: dict, where: str):
    kinds = typing.get_type_hints(Config)
    for name, value in changes.items():
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1, cutoff=0)[0]
            raise UserError(f"{where}: there is no key {name!r}; the nearest is {near!r}")
        values[name] = convert(name, value, kinds[name], where)


def parse(argv: list[str]) -> tuple[Config, bool]:
    """Command line -> (Config, whether a run is resumed: its own settings, then those given)."""
    given: dict = {}
    for arg in argv:
        if arg in ("-h", "--help"):
            print(help_text())
            sys.exit(0)
        if arg == "--print_config":
            continue
        if arg.startswith("--"):
            name, equals, value = arg[2:].partition("=")
            if not equals and name != "dry_run":
                raise UserError(f"{arg}: write --{name}=value")
            apply(given, {name: value if equals else True}, arg)
        elif re.search(r"\.py(:|$)", arg):
            apply(given, read_file(arg), arg)
        else:
            raise UserError(f"{arg}: neither a config file (.py) nor --key=value")
    resume = given.get("init_from") == "resume"
    if resume:
        path = Path(expand(given.get("out_dir", Config.out_dir))) / "config.json"
        if not path.is_file():
            raise UserError(f"init_from=resume: {path} does not exist, there is no run to resume")
        saved = {name: value for name, value in read_saved(path).items() if name not in given}
        given = saved | {name: value for name, value in given.items() if name != "init_from"}
    config = check(Config(**given))
    if "--print_config" in argv:
        print(json.dumps(dataclasses.asdict(config), indent=2))
        sys.exit(0)
    return config, resume


def read_file(argument: str) -> dict:
    """The keys that FILE.py, or FILE.py:ROW, assigns. It is Python: what it raises is its own."""
    file, colon, row = argument.partition(".py:")
    found, rows = execute(file + ".py" * bool(colon))
    if not colon:
        if rows:
            raise UserError(f"{argument} holds rows: say {argument}:ROW, one of {', '.join(rows)}")
        return found
    if row not in rows:
        near = difflib.get_close_matches(row, rows, 1, cutoff=0)
        hint = f"the nearest is {near[0]!r}" if near else "it has no rows"
        raise UserError(f"{file}.py: there is no row {row!r}; {hint}")
    return found | {k: v for k, v in rows[row].items() if k not in ROW_NOTES}


def read_rows(file) -> dict[str, dict]:
    """The rows of a config file by name, as the file has them, ROW_NOTES included."""
    return execute(str(file))[1]


ROW_NOTES = ("label", "paper", "scale")  # what a row says of itself beside keys


def execute(name: str) -> tuple[dict, dict]:
    """(top-level keys, rows) of a config file."""
    if not Path(expand(name)).is_file():
        raise UserError(f"{name}: no such config file")
    try:
        found = runpy.run_path(expand(name))
    except Exception as e:
        raise UserError(f"{name}: {type(e).__name__}: {e}") from e
    found = {k: v for k, v in found.items() if k[0] != "_" and not isinstance(v, types.ModuleType)}
    return found, found.pop("rows", {})


def expand(text: str) -> str:
    """Each of the comma-separated paths with ~ as the home folder, which a shell leaves alone
    behind --key=."""
    return ",".join(os.path.expanduser(part) for part in text.split(","))


# Keys of older versions, with the values that are what is done now.
GONE = {"task": "pretrain", "grpo_std": True, "grpo_length": True, "length_norm": False}


def read_saved(path: Path) -> dict:
    """The settings of a run folder's config.json; keys that are no more are left out."""
    try:
        saved, values = dict(json.loads(path.read_text(encoding="utf-8"))), {}
        if other := [name for name, value in GONE.items() if saved.get(name, value) != value]:
            raise UserError(f"{path} sets {other[0]}, which is no more: the run cannot go on here")
        known = {f.name for f in dataclasses.fields(Config)}
        apply(values, {k: v for k, v in saved.items() if k in known}, str(path))
    except (ValueError, TypeError) as e:
        why = e if isinstance(e, UserError) else f"{path} is damaged: restore or delete it"
        raise UserError(f"{why}, or choose another out_dir") from None
    return values


def differences(config: Config, path: Path) -> list[str]:
    """What makes config another run than that of a saved config.json: 'seed (0, now 1)'."""
    saved, out = read_saved(path), []
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
    count = len(sources) + (config.rollouts - 1 if "rollouts" in sources else 0)
    need(objective == "nll" or count > 1, f"objective={objective} needs 2 candidates")
    if objective == "grpo":
        need(sources == ["rollouts"], "objective=grpo takes samples alone: candidates=rollouts")
        need(config.rewards, "objective=grpo learns from rewards: set some")
    if objective == "nll":
        need(not config.rewards, "objective=nll takes the first: rewards= (empty), or use rf_nll")
    if config.nll_prefix:
        need("nll" in objective, f"nll_prefix=True is for nll and rf_nll, not for {objective=!s}")
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
    password = re.search(r"https?://[^/,]*@", config.data)
    need(not password, "data: a password in a URL would be written into the run's files")
    for name, value in vars(config).items():
        need(isinstance(value, str) or value >= 0, f"{name} must not be negative")
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


def names(text: str) -> list[str]:
    """'suffix, rewrite' -> ['suffix', 'rewrite']."""
    return [word.strip() for word in text.split(",") if word.strip()]


def monitors(config: Config) -> list[str]:
    """The live monitors of a run: those named, or TensorBoard where it is installed."""
    if config.track != "auto":
        return names(config.track)
    return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []


def needs_reference(config: Config) -> bool:
    """Whether the objective compares the policy with the frozen initial one."""
    return config.objective == "dpo" or (config.objective == "grpo" and bool(config.grpo_kl))


def phases(config: Config) -> dict[str, Config]:
    """The run's phases by name: base (from scratch only), baseline (optional), and the method."""
    next_token: dict = dict(
        objective="nll", candidates="suffix", rewards="", nll_prefix=True, overlap=0
    )
    next_token["temperature"] = 1.0  # that of the rollouts is the method's
    out = {}
    if config.init_from == "scratch" and config.base_steps:
        out["base"] = dataclasses.replace(
            config,
            **next_token,
            out_dir=f"{config.out_dir}/base",
            max_steps=config.base_steps,
            batch_size=config.base_batch_size,
            learning_rate=config.base_learning_rate,
            warmup_steps=config.base_steps // 30,
            save_every=250,
        )
    if config.baseline:
        out_dir = f"{config.out_dir}/baseline"
        out["baseline"] = dataclasses.replace(config, **next_token, out_dir=out_dir)
    return out | {"method": config}


def help_text() -> str:
    lines = [
        "usage: python train.py [config.py[:row] ...] [--key=value ...]",
        "       --print_config shows what these resolve to",
    ]
    for f in dataclasses.fields(Config):
        if f.metadata["group"]:
            lines += ["", f.metadata["group"]]
        flag, kind = f"--{f.name}={f.default}", type(f.default).__name__
        lines.append(f"  {flag:<36} {kind:<6} {f.metadata['meaning']}")
    return "\n".join(lines)
