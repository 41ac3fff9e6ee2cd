"""Chat messages to token ids, by the chat template that a model's folder brings.

In: [{"role", "content"}]. Out: ids, special tokens where the template writes them and nowhere else:
a message that spells one keeps it as ordinary text. A folder without a template gets a plain
prompt, the contents joined by newlines.
"""

import json
import re
import time
from functools import partial
from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from teachers.engine import plain


class Template:
    """The chat template of a folder: messages to token ids."""

    def __init__(self, folder: Path, tokenizer):
        self.tokenizer, self.names, self.source = tokenizer, {}, None
        longest_first = sorted(map(re.escape, tokenizer.specials), key=len, reverse=True)
        self.special = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        try:
            self.read(folder)
        except Exception as error:  # somebody else's file
            raise ValueError(f"{folder}: its chat template can't be read: {error}") from None

    def read(self, folder: Path):
        own, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        settings = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        source = own.read_text(encoding="utf-8") if own.exists() else settings.get("chat_template")
        if isinstance(source, list):  # several by name
            source = next((t["template"] for t in source if t["name"] == "default"), None)
        if source is None:
            return
        # transformers' environment
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        environment.globals["strftime_now"] = time.strftime
        environment.globals["raise_exception"] = self.complain
        for name in ("bos_token", "eos_token", "pad_token"):
            if token := settings.get(name):
                self.names[name] = token["content"] if isinstance(token, dict) else token
        self.source = environment.from_string(source)

    @staticmethod
    def complain(message):
        raise TemplateError(message)

    def encode(self, messages: list[dict]) -> list[int]:
        if self.source is None:
            return plain(self.tokenizer, "\n".join(message["content"] for message in messages))
        # A character that occurs nowhere breaks up what looks like a special token.
        said = "".join(message["content"] for message in messages)
        mark = next(c for c in map(chr, range(0xF0000, 0x10FFFE)) if c not in said)
        messages = [
            message | {"content": self.special.sub(lambda m: m[0][0] + mark + m[0][1:], text)}
            for message in messages
            for text in [message["content"]]
        ]
        try:
            names = dict(tools=None, documents=None, add_generation_prompt=True, **self.names)
            text = self.source.render(messages=messages, **names)
        except Exception as error:  # whatever a template may do
            raise TemplateError(f"the folder's chat template: {error}") from None
        ids = []
        for i, piece in enumerate(self.special.split(text)):
            if i % 2:
                ids.append(self.tokenizer.specials[piece])
            elif piece:
                ids += self.tokenizer.encode(piece.replace(mark, ""))
        return ids
