"""Reading a judge's answer: strict about where a verdict stands (the end of the answer), tolerant
of how it is written.

In: an answer, as any model may write it. Out: a verdict, or None, never a guess.
"""

import json
import re
import unicodedata

# What each verdict is worth: to the first option of a pair, or to the text itself.
VERDICTS = {
    "quality": {"A": 1.0, "B": 0.0},
    "coherence": {"A": 1.0, "B": 0.0, "TIE": 0.5},
    "factuality_pair": {"A": 1.0, "B": 0.0, "TIE": 0.5},
    "safety": {"SAFE": 1.0, "UNSAFE": 0.0},
    "factuality": {
        "No Hallucination": 1.0,
        "Possible Hallucination": 0.5,
        "Definite Hallucination": 0.0,
    },
}

LABELS = {  # how each label may be written
    "A": r"A",
    "B": r"B",
    "TIE": r"(?:a )?(?:tie|tied|draw)",
    "SAFE": r"safe",
    "UNSAFE": r"(?:un-?|not )safe",
    "No Hallucination": r"no[ _-]?hallucinations?",
    "Possible Hallucination": r"possible[ _-]?hallucinations?",
    "Definite Hallucination": r"definite[ _-]?hallucinations?",
}
KEY = r"(?:verdict|label|answer|decision|judge?ment|winner|choice|conclusion)"
LEAD = r"(?:(?:so|thus|therefore|hence|final|overall|my|the|in conclusion)[,:]? )*"
NOUN = r"(?:(?:the )?(?:continuation|option|passage|text|candidate|version) )?"
REMARK = r"is (?:the |clearly |slightly )*(?:better|best|winner|preferred)|wins|because|since"


def parse(kind, answer):
    """The judge's verdict (a key of VERDICTS[kind]) or None."""
    answer = own_words(answer or "")
    labels = {label: LABELS[label] for label in VERDICTS[kind]}
    if answer.endswith("}") and (label := from_json(answer, labels)):
        return label
    if kind == "factuality" and (label := from_broken_json(answer, labels)):
        return label
    last = answer.rsplit("\n", 1)[-1]
    if last.count('"') % 2 or last.count("“") != last.count("”"):
        return None  # the end of a quotation that began in another line: not the judge's word
    return from_line(last, labels)


def own_words(answer):
    """The end of the answer in plain characters, without reasoning blocks, fences and end marks."""
    answer = re.sub("[\u200b-\u200d\ufeff]", "", unicodedata.normalize("NFKC", answer))
    answer = re.split(r"</think(?:ing)?>|<\|message\|>", answer)[-1]
    if re.match(r"\s*<think(?:ing)?>", answer):
        return ""  # the reasoning never ended
    lines = (line.strip() for line in answer[-20_000:].splitlines())
    answer = "\n".join(line for line in lines if line)
    answer = re.sub(rf"<({KEY})>\s*", r"\n\1: ", answer, flags=re.I)
    closer = re.compile(r"\s*(?:<\|\w+\|>|</\w+>|<end_of_turn>|```|~~~|---+|\*\*\*+)\s*$")
    while (shorter := closer.sub("", answer[-100:])) != answer[-100:]:
        answer = answer[:-100] + shorter
    return answer


def which(text, labels, noun=""):
    """The label that the whole text is, but for marks around it, or None."""
    text = re.sub(r"^[\W_]+|[\W_]+$", "", re.sub(r"[*`\"'\s]+", " ", text))
    found = [k for k, how in labels.items() if re.fullmatch(f"{noun}(?:{how})", text, re.I)]
    return found[0] if found else None


def from_json(answer, labels):
    """A JSON object that ends the answer, whatever stands before it."""
    for brace in list(re.finditer(r"\{", answer))[:50]:
        try:
            value, end = json.JSONDecoder(strict=False).raw_decode(answer, brace.start())
        except (ValueError, RecursionError):
            continue
        if end == len(answer) and isinstance(value, dict):
            said = [v for k, v in value.items() if re.fullmatch(KEY, k.strip(), re.I)]
            alone = len(said) == 1 and isinstance(said[0], str)
            return which(said[0], labels, NOUN) if alone else None
    return None


def from_broken_json(answer, labels):
    """{"reasoning": ..., "label": ...} with unescaped or single quotes, or no closing brace. The
    label must be the last thing said, or the first of an object that speaks of no other label."""
    pair = rf"[\"'`]?label[\"'`]?\s*[:=]\s*[\"'`]?({'|'.join(labels.values())})[\"'`]?\s*"
    if last := re.search(rf"[{{,\n]\s*{pair},?\s*\}}?$", answer, re.I):
        return which(last[1], labels)
    first = re.match(rf"(?:```\w*)?\s*\{{\s*{pair},\s*[\"'`]?reasoning\b", answer, re.I)
    alone = len(re.findall(r"\blabel\b", answer, re.I)) == 1
    return which(first[1], labels) if first and alone else None


def from_line(line, labels):
    """`VERDICT: A`, alone on the last line or after a full stop; a remark may follow."""
    line = re.sub(r"\\(?:boxed|text\w*|math\w+)\b|__|[*`#$\[\]{}【】]", "", line)
    line = re.sub(r"\s+", " ", line).strip()
    if len(line) < 30 and not line.endswith(":") and (label := which(line, labels)):
        return label  # nothing but the label
    any_label = f"(?:{'|'.join(sorted(labels.values(), key=len, reverse=True))})"
    start = rf"(?:^[\"']?|^[-•] |(?<=[.!?)]) ){LEAD}{KEY}(?: is)?(?: ?[:=–—>→-]+)? ?"
    again = rf"(?:{LEAD}{KEY} ?: ?)?[\"'(]?{NOUN}"
    found = list(re.finditer(rf"{start}{again}({any_label})(?![\w/|&])", line, re.I))
    if not found or len(re.findall(rf"\b{KEY}\W*{any_label}\b", line, re.I)) > len(found):
        return None
    if line[: found[-1].start()].count('"') % 2:
        return None  # within a quotation
    rest = line[found[-1].end() :].strip("\"') ")
    other = rf"[\s.,;:(—–-]*(?:(?:or|and)\b|{any_label}\W*$)"
    remark = rf"[^\w?]*$|(?!{other})(?:[.,;:(—–-]|(?:{REMARK})\b)"
    return which(found[-1][1], labels) if re.match(remark, rest, re.I) else None
