"""Tokens per second from packed shards to prefixes and suffixes, beside the `datasets` library.

    python bench_data.py [--megabytes 24] [--data SHARDS] [--tokenizer FOLDER]

Both sides read the same .jsonl.zst shards with the same tokenizer.json and cut the same samples:
ours with `Stream` and tiktoken, theirs with datasets' streaming, `map` and transformers' fast
tokenizer, as its documentation suggests. Every run is a process of its own, the two sides take
turns, and the best of REPEATS counts. Without --data the corpus is Python's own sources and help
texts; without --tokenizer a byte-level BPE of 16,384 tokens is trained on them first.
"""

import argparse
import importlib.util
import json
import pydoc_data.topics
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import zstandard

CHUNK, MAX_SEQ, BATCH = 128, 2048, 64
REPEATS, SHARDS = 2, 4


def local_text() -> list[str]:
    """Paragraphs of prose and code that every Python brings along."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    code = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return "\n\n".join([*pydoc_data.topics.topics.values(), *code]).split("\n\n")


def write_corpus(folder: Path, megabytes: float) -> str:
    """Documents of many lengths, in SlimPajama's format and file names."""
    rng, paragraphs = random.Random(0), local_text()
    writers = [
        zstandard.open(folder / f"example_train_{i}.jsonl.zst", "wt", encoding="utf-8")
        for i in range(SHARDS)
    ]
    size = 0
    while size < megabytes * 1e6:
        count = 1 + int(rng.lognormvariate(2.5, 0.8))
        start = rng.randrange(len(paragraphs) - count)
        record = {"text": "\n\n".join(paragraphs[start : start + count]), "meta": {}}
        size += writers[rng.randrange(SHARDS)].write(json.dumps(record) + "\n")
    for writer in writers:
        writer.close()
    return str(folder)


def train_tokenizer(folder: Path) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=16_384,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(local_text(), trainer)
    library.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


# ------------------------------------------------------------------------------------------------
# One run, in a process of its own


def ours(source: str, folder: str, rank: int, world_size: int) -> int:
    from data import Stream
    from tokenizer import load_tokenizer

    options = dict(chunk=CHUNK, max_seq=MAX_SEQ, batch_size=BATCH, split="all", epochs=1)
    options |= dict(rank=rank, world_size=world_size)
    return sum(len(b.index) for b in Stream(source, load_tokenizer(folder), **options))


def theirs(source: str, folder: str, rank: int, world_size: int) -> int:
    from datasets import load_dataset
    from datasets.distributed import split_dataset_by_node
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    files = sorted(map(str, Path(source).glob("*.jsonl.zst")))
    stream = load_dataset("json", data_files=files, split="train", streaming=True)
    if world_size > 1:
        stream = split_dataset_by_node(stream, rank, world_size)
    stream = stream.shuffle(seed=0, buffer_size=1024)
    stream = stream.map(
        lambda rows: {"ids": tokenizer(rows["text"])["input_ids"]},
        batched=True,
        remove_columns=["text", "meta"],
    )
    rng, samples = random.Random(rank), 0
    for row in stream:
        ids = row["ids"] + [tokenizer.eos_token_id]
        boundaries = len(ids) // CHUNK - 1
        if boundaries > 0:
            middle = CHUNK * (1 + rng.randrange(boundaries))
            prefix, suffix = ids[max(0, middle + CHUNK - MAX_SEQ) : middle], ids[middle:][:CHUNK]
            samples += len(prefix) >= CHUNK and len(suffix) == CHUNK
    return samples


def run(side: str, *arguments) -> None:
    """Prints seconds of wall clock and processor, peak memory in MB, and samples."""
    source, warm, folder, rank, world_size = *arguments[:3], *map(int, arguments[3:])
    function = {"ours": ours, "datasets": theirs}[side]
    function(warm, folder, 0, 1)  # imports, first use
    usage = resource.getrusage(resource.RUSAGE_SELF)
    start, cpu = time.perf_counter(), usage.ru_utime + usage.ru_stime
    samples = function(source, folder, rank, world_size)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = time.perf_counter() - start
    used = usage.ru_utime + usage.ru_stime - cpu
    print(json.dumps([seconds, used, usage.ru_maxrss / 1024, samples]))


# ------------------------------------------------------------------------------------------------


def measure(side: str, source: str, warm: str, folder: str, processes: int) -> list[float]:
    """[slowest process's seconds, all processors' seconds, highest peak, samples together]"""
    command = [sys.executable, __file__, "run", side, source, warm, folder]
    running = [
        subprocess.Popen([*command, str(rank), str(processes)], stdout=subprocess.PIPE)
        for rank in range(processes)
    ]
    results = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    seconds, used, peak, samples = zip(*results, strict=True)
    return [max(seconds), sum(used), max(peak), sum(samples)]


def data_rows(megabytes: float = 24, source: str = "", folder: str = "") -> list[dict]:
    """One row per side and number of processes."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        for name in ("corpus", "warm", "tokenizer"):
            (place / name).mkdir()
        source = source or write_corpus(place / "corpus", megabytes)
        folder = folder or train_tokenizer(place / "tokenizer")
        warm = write_corpus(place / "warm", 0.2)
        tokens = count_tokens(source, folder)
        sides = ["ours"] + ["datasets"] * (importlib.util.find_spec("datasets") is not None)
        rows = []
        for processes in (1, 2):
            best = {}
            for _ in range(REPEATS):
                for side in sides:
                    result = measure(side, source, warm, folder, processes)
                    best[side] = min(best.get(side, result), result)
            for side, (seconds, used, peak, samples) in best.items():
                row = {"what": "data", "side": side, "processes": processes, "samples": samples}
                row |= {"tokens_per_second": tokens / seconds, "peak_mb": peak}
                rows.append(row | {"tokens_per_core_second": tokens / used})
        return rows


def count_tokens(source: str, folder: str) -> int:
    from sources import Files, Skips
    from tokenizer import load_tokenizer

    files, tokenizer = Files(source, Skips()), load_tokenizer(folder)
    texts = (text for text, _ in files.documents(files.beginning(0)))
    return sum(len(tokenizer.encode(text)) + 1 for text in texts)


def main() -> None:
    if sys.argv[1:2] == ["run"]:
        return run(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=24)
    parser.add_argument("--data", default="", help="folder of .jsonl.zst shards")
    parser.add_argument("--tokenizer", default="", help="folder with tokenizer.json")
    options = parser.parse_args()
    rows = data_rows(options.megabytes, options.data, options.tokenizer)
    for row in rows:
        print(
            f"{row['side']:9} {row['processes']} process(es)  "
            f"{row['tokens_per_second']:12,.0f} tokens/s  "
            f"{row['tokens_per_core_second']:12,.0f} tokens/s of one core  "
            f"peak {row['peak_mb']:6,.0f} MB  {row['samples']:,} samples"
        )


if __name__ == "__main__":
    main()
