"""A run as one HTML page that needs no network: python report.py RUN [--pools=200]

In: a run folder's log.jsonl, config.json, summary.json and judgments.sqlite, finished or not. Out:
RUN/report.html: curves, then pools spread evenly over the run, with candidates side by side, their
sources and rewards, and what the judge said about each; filtered by step and source.

Candidates and verdicts are text of models, which may hold anything: they reach the page as JSON in
which no tag can start, the page's script shows them as text only, and its policy lets no other run.
"""

import argparse
import base64
import hashlib
import html
import json
import math
import sqlite3
import sys
from pathlib import Path

from config import Config
from evaluation.results import NAMES, overall
from tools.plot import plot_run, read_log, read_summary
from tools.replay import pools_by_step, recorded_judge

VERDICT_CHARACTERS = 600  # kept of an answer, from its end, where the verdict stands

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1em;
       color: #1c2733; background: #fff }
img { max-width: 100% } h1, h2 { font-weight: 600 } .quiet { color: #66727f }
table.settings { border-collapse: collapse; font-size: 13px; columns: 3 } details { margin: .6em 0 }
td, th { padding: 2px 12px 2px 0; text-align: left; vertical-align: top }
#filters { position: sticky; top: 0; background: #fff; padding: .7em 0; z-index: 1;
           border-bottom: 1px solid #d5dbe1 }
#filters label { margin-right: 1.2em }
.pool { margin: 1.4em 0 2.2em } .prefix { background: #f3f5f7; padding: .6em .8em }
.prefix, .text, .answer { white-space: pre-wrap; overflow-wrap: anywhere }
.candidates { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr));
              gap: 10px; margin-top: 10px }
.candidate { border: 1px solid #d5dbe1; border-top: 4px solid #98a5b3; padding: .5em .7em }
.suffix { border-top-color: #d2691e } .rewrite { border-top-color: #2e8b57 }
.rollout { border-top-color: #3367b0 }
.best { background: #eef7ee } .worst { background: #fbf0ee }
.head { display: flex; justify-content: space-between; font-weight: 600; margin-bottom: .3em }
.answer { font-size: 12.5px; color: #45525f; border-left: 3px solid #d5dbe1; padding-left: .6em;
          margin: .5em 0 }
"""

SCRIPT = """
const data = JSON.parse(document.getElementById('data').textContent);
const by = id => document.getElementById(id);
function make(tag, name, text) {            // text is only ever text, never markup
  const node = document.createElement(tag);
  node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
}
function option(select, value, text) {
  const node = make('option', '', text);
  node.value = value;
  select.append(node);
}
function candidate(c) {
  const card = make('div', 'candidate ' + (['suffix', 'rewrite', 'rollout'].includes(c.source)
    ? c.source : '') + (c.best ? ' best' : c.worst ? ' worst' : ''));
  const head = make('div', 'head');
  head.append(make('span', '', c.source + (c.best ? ', best' : c.worst ? ', worst' : '')));
  head.append(make('span', '', c.reward === null ? 'no reward' : c.reward.toFixed(2)));
  card.append(head, make('div', 'text', c.text === null ? '(the rewriter failed)' : c.text));
  if (c.verdicts.length) {
    const more = make('details', '');
    more.append(make('summary', 'quiet', c.verdicts.length + ' verdicts'));
    for (const v of c.verdicts) {
      const box = make('div', 'answer');
      box.append(make('b', '', v.kind + ': ' + (v.verdict === null ? 'none readable' : v.verdict)));
      if (v.against !== null) box.append(make('div', 'quiet', v.against));
      box.append(make('div', '', v.answer === null ? '(not recorded)' : v.answer));
      more.append(box);
    }
    card.append(more);
  }
  return card;
}
function show() {
  const step = by('step').value, source = by('source').value, won = by('won').value;
  const pools = data.filter(p => (step === '' || p.step === +step) &&
    (won === '' || p.candidates.some(c => c.best && c.source === won)));
  by('count').textContent = pools.length + ' of ' + data.length + ' pools';
  by('pools').replaceChildren(...pools.map(p => {
    const box = make('section', 'pool');
    box.append(make('div', 'quiet', 'step ' + p.step + ', sample ' + p.key));
    box.append(make('div', 'prefix', p.prefix));
    const cards = make('div', 'candidates');
    cards.append(...p.candidates.filter(c => source === '' || c.source === source).map(candidate));
    box.append(cards);
    return box;
  }));
}
option(by('step'), '', 'all');
for (const step of new Set(data.map(p => p.step))) option(by('step'), step, step);
const sources = new Set(data.flatMap(p => p.candidates.map(c => c.source)));
for (const id of ['source', 'won']) {
  option(by(id), '', 'all');
  for (const source of sources) option(by(id), source, source);
}
for (const id of ['step', 'source', 'won']) by(id).addEventListener('change', show);
if (data.length) by('step').value = data[data.length - 1].step;
show();
"""


def spread(items: list, count: int) -> list:
    """`count` of the items, evenly, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def verdict_of(seen: dict, text: str) -> dict:
    """One verdict as the page shows it, from the point of view of a candidate with this text."""
    against = None
    if len(seen["candidates"]) == 2:
        place = seen["candidates"].index(text)
        against = f"it was {'AB'[place]}, against: {seen['candidates'][1 - place]}"
    answer = seen["answer"]
    if answer is not None and len(answer) > VERDICT_CHARACTERS:
        answer = "[...] " + answer[-VERDICT_CHARACTERS:]
    verdict = {"kind": seen["kind"], "verdict": seen["verdict"]}
    return {**verdict, "against": against, "answer": answer}


def pool_of(step: int, pool: list, judge) -> dict:
    """A recorded pool with the recorded answers about each of its candidates."""
    key, prefix, reference, texts, sources, rewards = pool
    scores = judge.score(step, [prefix], [reference], [texts], sources, [key]).result()
    rewards = [r if r is None else round(r, 9) for r in rewards]  # as in update.py: ties are ties
    given = [r for r in rewards if r is not None and math.isfinite(r)]
    high, low = (max(given), min(given)) if given else (None, None)
    candidates = []
    for text, source, reward in zip(texts, sources, rewards, strict=True):
        reward = reward if reward is not None and math.isfinite(reward) else None
        about = [v for v in scores.examples if text in v["candidates"]]
        candidates.append(
            {
                "source": source,
                "text": text,
                "reward": reward,
                "best": reward is not None and high != low and reward == high,
                "worst": reward is not None and high != low and reward == low,
                "verdicts": [verdict_of(v, text) for v in about],
            }
        )
    candidates.sort(key=lambda c: (c["reward"] is None, -(c["reward"] or 0)))
    return {"step": step + 1, "key": key, "prefix": prefix, "candidates": candidates}


def pools_of(run: Path, count: int) -> list[dict]:
    store = run / "judgments.sqlite"
    if not store.exists():
        return []
    with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as db:
        has = "SELECT 1 FROM sqlite_master WHERE name = 'pools'"
        rows = db.execute(has).fetchone() and db.execute("SELECT step, key FROM pools").fetchall()
    db.close()
    wanted = set(spread(sorted(rows or []), count))
    if not wanted:
        return []
    judge = recorded_judge(run)
    try:
        return [
            pool_of(step, pool, judge)
            for step, pools in pools_by_step(store)
            for pool in pools
            if (step, pool[0]) in wanted
        ]
    finally:
        judge.chat.close()


def evaluation_table(summary: dict) -> str:
    """A row a policy and kind of prefix, and one for its mean: what train.py prints at the end."""
    if "suites" not in summary:
        return ""
    cells = [cell for kinds in summary["policies"].values() for cell in kinds.values()]
    nll = any(cell.get("nll") is not None for cell in cells)
    columns, rows = [*summary["suites"], *["nll"] * nll], []
    head = ["", "prefixes", *summary["suites"], *["held-out NLL"] * nll]
    for policy, kinds in summary["policies"].items():
        for kind, cell in kinds.items():
            rows.append(
                [NAMES.get(policy, policy), kind, *(shown(c, cell.get(c)) for c in columns)]
            )
        if len(kinds) > 1:
            means = [shown(c, overall(kinds, c)) for c in columns]
            rows.append([NAMES.get(policy, policy), "mean", *means])

    def line(cells: list[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    body = "".join(line(cells, "th" if cells[1] == "mean" else "td") for cells in rows)
    return f"<table>{line(head, 'th')}{body}</table>"


def shown(column: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if column == "nll" else f"{value:.1%}"


def page(run: Path, pools: list[dict]) -> str:
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    picture = base64.b64encode(plot_run(run).read_bytes()).decode()
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    data = json.dumps(pools, ensure_ascii=True)
    for sign in "<>&":  # no tag or comment can start inside the element
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    settings = "".join(
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>"
        for k, v in config.items()
    )
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    policy += f"script-src 'sha256-{script}'"
    judge = config["judge_model"]
    if judge == Config.judge_model:  # no name of its own: its place says more
        judge = config["judge_url"]
    title = html.escape(f"{run.resolve().name}: {config['objective']}, {config['candidates']}")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p class="quiet">{len(read_log(run)):,} of {config["max_steps"]:,} steps, policy from
{html.escape(config["init_from"])}, data {html.escape(config["data"])}, judge
{html.escape(judge)}</p>
<img alt="reward, share of the chosen, evaluation" src="data:image/png;base64,{picture}">
{evaluation_table(read_summary(run))}
<details><summary>settings</summary><table class="settings">{settings}</table></details>
<h2>Candidates</h2>
<div id="filters"><label>step <select id="step"></select></label>
<label>show <select id="source"></select></label>
<label>won by <select id="won"></select></label><span id="count" class="quiet"></span></div>
<div id="pools"></div>
<script type="application/json" id="data">{data}</script>
<script>{SCRIPT}</script>
</body></html>
"""


def write_report(run: Path, count: int) -> Path:
    """Write RUN/report.html and give its path."""
    path = run / "report.html"
    path.write_text(page(run, pools_of(run, count)), encoding="utf-8")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--pools", type=int, default=200, help="shown at most, evenly spread")
    options = parser.parse_args()
    try:
        print(write_report(options.run, options.pools))
    except KeyError as error:
        sys.exit(f"error: {options.run}/config.json or summary.json lacks {error}")
    except (OSError, ValueError, sqlite3.Error) as error:
        sys.exit(f"error: {options.run} cannot be read as a run: {error}")
