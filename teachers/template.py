"""Chat messages to token ids, by the chat template that a model's folder brings.

In: [{"role", "content"}]. Out: ids, special tokens where the template writes them and nowhere else:
a message that spells one keeps it as ordinary text. A folder without a template gets a plain
prompt, the contents joined by newlines.

The environment is transformers': sandboxed and immutable, with loop controls, tojson, strftime_now,
raise_exception and {% generation %}. It lies in chat_template.jinja, or in tokenizer_config.json.
"""

import json
import re
from datetime import datetime
from pathlib import Path

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from support.command import UserError
from support.hub import read_object, without_null


def plain(tokenizer, text: str) -> list[int]:
    """A text as a prompt: at least one token, and the one that the tokenizer puts first."""
    return [*tokenizer.start_ids, *tokenizer.encode(text)] or [tokenizer.eos]


class Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks what the assistant says: here, its content."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Unlike jinja2's own, without escapes for HTML."""
    how = dict(indent=indent, separators=separators, sort_keys=sort_keys)
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def refuse(message):
    raise TemplateError(message)


class Template:
    """The chat template of a folder: messages to token ids. UserError where it can't be read."""

    def __init__(self, folder: Path, tokenizer):
        self.tokenizer, self.path = tokenizer, folder / "chat_template.jinja"
        longest_first = sorted(map(re.escape, tokenizer.specials), key=len, reverse=True)
        self.special = "|".join(longest_first) or "(?!)"
        files = [folder / "special_tokens_map.json", folder / "tokenizer_config.json"]
        read = [without_null(read_object(path)) for path in files if path.exists()]
        settings = {name: value for each in read for name, value in each.items()}
        tokens = {k: v.get("content") if isinstance(v, dict) else v for k, v in settings.items()}
        # bos_token, eos_token and whatever else there is
        self.names = {k: v for k, v in tokens.items() if k.endswith("_token") and type(v) is str}
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        source = settings.get("chat_template")
        try:
            if self.path.exists():
                source = self.path.read_text(encoding="utf-8")
            else:
                self.path = files[-1]
            if isinstance(source, list):  # several by name
                source = {named["name"]: named["template"] for named in source}["default"]
            self.source = None if source is None else environment.from_string(source)
        except Exception as error:  # somebody else's file
            raise UserError(f"{self.path}: the chat template can't be read: {error}") from None

    def encode(self, messages: list[dict]) -> list[int]:
        """Ids of the messages and of the beginning of an answer; UserError where the template
        refuses the messages or fails."""
        if self.source is None:
            return plain(self.tokenizer, "\n".join(message["content"] for message in messages))
        # A character that occurs nowhere breaks up whatever looks like a special token.
        said = "".join(message["content"] for message in messages)
        mark = next(c for c in map(chr, range(0xF0000, 0x10FFFE)) if c not in said)
        first = re.compile(f"(?=(?:{self.special}))(.)", re.DOTALL)
        broken = [m | {"content": first.sub(rf"\1{mark}", m["content"])} for m in messages]
        names = dict(tools=None, documents=None, add_generation_prompt=True, **self.names)
        try:
            text = self.source.render(messages=broken, **names)
        except Exception as error:  # whatever a template may do
            raise UserError(f"{self.path}: {error or type(error).__name__}") from None
        hidden = self.tokenizer.hidden  # in one piece, as white space may belong to a token
        text = re.sub(f"({self.special})(?!{mark})", lambda found: hidden[found[0]], text)
        return self.tokenizer.encode(text.replace(mark, ""))
