"""One page of results with pictures, from the run folders of reproduce.py: RESULTS.md.

    python results.py [--demo RUN]     the page, and docs/results_*.png

In: OUT's finished runs (what is missing is said to be missing), and a run of the demo for the
gallery. Out: verdicts on the paper's findings, three pictures, tables 1, 2 and 6 beside the paper's
figures, and the same prefixes continued by three policies.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from evaluate import held_out_sets
from findings import BEYOND, FINDINGS, ROLLOUTS, Study, verdict
from plot import NAMES, smooth
from reproduce import folder, markdown, records, table
from tables import TABLES, Row
from tokenizer import load_tokenizer

HERE = Path(__file__).parent
INTRO = """\
# Results

The paper's findings, tested in miniature: a 0.4M-parameter policy on the pocket world, {seeds}
seeds, 40 steps of 16 prefixes (from scratch: 300 of 32). A row is the paper's configuration of that
row with only the scale changed, and the scale is the same for all rows; the rule for each verdict
([findings.py](findings.py)) was written down before the runs. The judge is exact unless a row says
otherwise, and the judge of the evaluation always is. So this tests the method's mechanics, not how
much a real model gains. Quality and coherence are win rates in % against the seed's base; the
spread is the standard deviation over seeds.

    python reproduce.py all      # what is missing in out/study; interrupted, it goes on
    python results.py            # this page
"""


def study_of(out: Path, seeds: list[int]) -> Study:
    """Records of all rows by "config --key=value"."""
    study = Study()
    for rows in TABLES.values():
        for row in rows:
            if row.config:
                study[row_name(row)] = records(out, row, seeds)
    circle = out / "circle.json"
    study["circle"] = json.loads(circle.read_text()) if circle.exists() else {}
    return study


def row_name(row: Row) -> str:
    return " ".join([row.config, *(f"--{key}={value}" for key, value in row.changes.items())])


# ------------------------------------------------------------------------------------------------
# Pictures


def points(ax, x, values: list[float], color: str, label: str | None = None):
    """The mean, large, and each seed, small."""
    ax.plot([x] * len(values), values, "o", color=color, alpha=0.35, markersize=4)
    if values:
        ax.plot([x], [statistics.mean(values)], "o", color=color, markersize=8, label=label)


def draw_gains(axes, study: Study):
    """Table 1: a panel a target, a point a run, the paper's figure hollow."""
    rows = [row for row in TABLES["table1"] if row.config]
    for ax, (at, column) in zip(
        axes, ((0, "quality_clean"), (3, "factuality"), (4, "safety")), strict=True
    ):
        runs = [list(study[row_name(row)].values()) for row in rows]
        bases = [record[f"base.{column}"] for record in next((r for r in runs if r), [])]
        everything = [bases, *([record[column] for record in records] for records in runs)]
        for x, values in enumerate(everything):
            points(ax, x, values, "C0", "ours" if x == 0 else None)
        paper = [row.paper[at] for row in TABLES["table1"]]
        ax.plot(range(len(paper)), paper, "D", color="C1", fillstyle="none", label="paper, 1.4B")
        names = ["base", "pretrain\nclean", "pretrain\nunsafe", "quality", "factuality", "safety"]
        ax.set_xticks(range(len(names)), names, fontsize=8)
        ax.set(title=column.replace("_clean", " win rate, clean prefixes"), ylabel="%")
        ax.set_ylim(top=104)
    axes[0].legend(frameon=False)


def draw_ablations(axes, study: Study):
    """Number of rollouts; table 6; cheaper comparisons and weaker judges."""
    quality = {
        row: [r["quality_clean"] for r in study[row].values()] for row in study if row != "circle"
    }
    for color, (reward, rows) in zip(("C0", "C1", "C2"), ROLLOUTS.items(), strict=True):
        Ks = [1, 2, 4, 8, 16][-len(rows) :]
        for K, row in zip(Ks, rows, strict=True):
            points(axes[0], K, quality[row], color)
        means = [
            (K, statistics.mean(quality[row]))
            for K, row in zip(Ks, rows, strict=True)
            if quality[row]
        ]
        axes[0].plot(*zip(*means, strict=True), color=color, label=f"{reward}, ours")
        paper = [row.paper[0] for row in TABLES["rollouts"] if row.label.startswith(reward)]
        axes[0].plot(Ks, paper, "--", color=color, label="paper")
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks([1, 2, 4, 8, 16], [1, 2, 4, 8, 16])
    axes[0].set(xlabel="rollouts K", ylabel="quality win rate, clean prefixes, %")
    axes[0].legend(frameon=False, fontsize=7, ncols=2)
    rows = TABLES["table6"][::-1]
    for y, row in enumerate(rows):
        values = quality[row_name(row)]
        axes[1].plot(values, [y] * len(values), "o", color="C0", alpha=0.35, markersize=4)
        if values:
            axes[1].plot(statistics.mean(values), y, "o", color="C0", markersize=8)
        axes[1].plot(row.paper[0], y, "D", color="C1", fillstyle="none")
    axes[1].set_yticks(range(len(rows)), [row.label for row in rows], fontsize=7)
    axes[1].axvline(50, color="grey", linewidth=0.8, linestyle=":")
    axes[1].set(title="table 6 (hollow: paper)", xlabel="quality win rate, clean prefixes, %")
    bars = [(row.label, row) for name in ("pivot", "judge") for row in TABLES[name]]
    for x, (_, row) in enumerate(bars):
        points(axes[2], x, quality[row_name(row)], "C0")
        if row.paper:
            axes[2].plot(x, row.paper[0], "D", color="C1", fillstyle="none")
    axes[2].set_xticks(
        range(len(bars)),
        [label.replace(", ", "\n").replace(" / ", "\n") for label, _ in bars],
        fontsize=6,
        rotation=30,
    )
    axes[2].set(title="pivot; weaker judge (hollow: paper)")


def draw_training(axes, study: Study, logs: dict):
    """Rollouts among the chosen; what is forgotten; judging late."""
    for name, curves in logs.items():
        mean = [statistics.mean(step) for step in zip(*curves, strict=True)]
        done = [(i + 1) / len(mean) for i in range(len(mean))]
        axes[0].plot(done, smooth(mean, 1 + 2 * (len(mean) // 20)), label=name)
    axes[0].set(xlabel="share of the training", ylabel="rollouts' share of the chosen", ylim=(0, 1))
    axes[0].legend(frameon=False, fontsize=8)
    colors = {"SFT": "C3", "RF-NLL": "C2", "DPO": "C0"}
    shown = [(row.label.split()[0], row) for row in TABLES["table6"]]
    shown += [
        ("DPO", row)
        for name in ("table1", "rollouts")
        for row in TABLES[name]
        if row.config and "pretrain" not in row.label
    ]
    for kind, row in shown:
        runs = study[row_name(row)].values()
        axes[1].plot(
            [r["nll"] for r in runs],
            [r["quality"] for r in runs],
            ".",
            color=colors[kind],
            alpha=0.5,
        )
    for kind, color in colors.items():
        axes[1].plot([], [], ".", color=color, label=kind)
    for row in TABLES["forgetting"]:
        runs = study[row_name(row)].values()
        if runs:
            nll, quality = (statistics.mean(r[c] for r in runs) for c in ("nll", "quality"))
            axes[1].plot(nll, quality, "*", color="k", markersize=9)
            axes[1].annotate(
                row.label, (nll, quality), fontsize=8, xytext=(5, -8), textcoords="offset points"
            )
    axes[1].set(xlabel="held-out NLL, nats a token", ylabel="quality win rate, all prefixes, %")
    axes[1].legend(frameon=False, fontsize=8)
    for x, row in enumerate(TABLES["overlap"]):
        for color, column in (("C0", "quality"), ("C1", "safety")):
            points(
                axes[2],
                x,
                [r[column] for r in study[row_name(row)].values()],
                color,
                column if x == 0 else None,
            )
    axes[2].set_xticks(range(3), [row.label for row in TABLES["overlap"]])
    axes[2].set(ylabel="%", title="batches judged late")
    axes[2].legend(frameon=False)


def chosen_logs(out: Path, seeds: list[int]) -> dict:
    """{name: [a curve a seed]} of the rollouts' share of the chosen."""
    rows = {
        "DPO (rewrite, 1 rollout)": "table6_dpo_rewrite_rollout",
        "DPO (suffix, rewrite, 16 rollouts)": "table6_dpo_suffix_rewrite_16_rollouts",
        "RF-NLL from scratch (rewrite, 1 rollout)": "table2_rf_nll_rollout_rewrite",
    }
    curves = {}
    for name, config in rows.items():
        for seed in seeds:
            run = folder(out, Row("", config), seed)
            if (run / "evaluation.json").exists():
                lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
                curves.setdefault(name, []).append([line["chosen.rollout"] for line in lines])
    return curves


def draw(out: Path, study: Study, seeds: list[int]) -> dict[str, str]:
    """-> {file name: caption}"""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pictures = {
        "results_gains.png": (
            draw_gains,
            "Table 1: next-token training moves nothing; each target is raised by its own run",
            (study,),
        ),
        "results_ablations.png": (
            draw_ablations,
            "Rollouts, objectives, comparisons, judges",
            (study,),
        ),
        "results_training.png": (
            draw_training,
            "Rollouts take over; what it costs in likelihood; judging late",
            (study, chosen_logs(out, seeds)),
        ),
    }
    for name, (function, _, arguments) in pictures.items():
        figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
        function(axes, *arguments)
        figure.savefig(HERE / "docs" / name, dpi=80)
        plt.close(figure)
    return {name: caption for name, (_, caption, _) in pictures.items()}


# ------------------------------------------------------------------------------------------------
# The page


def verdicts(findings, study: Study, numbered: bool) -> str:
    lines = ["| | finding | verdict | figures | command |", "| --- | --- | --- | --- | --- |"]
    for number, finding in enumerate(findings, 1):
        word, evidence = verdict(finding, study)
        command = f"`python reproduce.py {finding.tables}`" if finding.tables else ""
        first = number if numbered else "+"
        lines.append(f"| {first} | {finding.claim} | **{word}** | {evidence} | {command} |")
    return "\n".join(lines)


def gallery(demo: Path, count: int = 2) -> str:
    """The first prefixes of each kind and how the demo's three policies go on; none are picked."""
    summary = json.loads((demo / "summary.json").read_text())
    config = json.loads((demo / "config.json").read_text())
    sizes = dict(chunk=config["chunk"], max_seq=config["max_seq"], count=config["eval_prefixes"])
    sets = held_out_sets("world", load_tokenizer(str(demo / "ckpt")), **sizes)
    blocks = []
    for kind, held in sets.items():
        for i in range(count):
            lines = [f"{kind} prefix".ljust(21) + held.prefixes[i]]
            for policy, texts in summary["continuations"].items():
                lines.append(NAMES[policy].ljust(21) + texts[kind][i])
            blocks.append("\n".join(lines))
    return "```text\n" + "\n\n".join(blocks) + "\n```"


def page(out: Path, demo: Path, seeds: list[int]) -> str:
    study = study_of(out, seeds)
    parts = [INTRO.format(seeds=len(seeds)), verdicts(FINDINGS, study, True)]
    parts += ["\n## Beyond the paper\n", verdicts(BEYOND, study, False), "\n## Pictures\n"]
    parts += [
        f"{caption}:\n\n![{caption}](docs/{name})\n"
        for name, caption in draw(out, study, seeds).items()
    ]
    for name in ("table1", "table2", "table6"):
        title = f"## Table {name[-1]}, mean (each seed) [the paper's]"
        parts.append(f"{title}\n\n{markdown(table(out, name, seeds))}\n")
    parts.append(
        "## Gallery\n\nHeld-out prefixes of the demo, the first of each kind, continued greedily:\n"
    )
    return "\n".join([*parts, gallery(demo)]) + "\n"


def main(argv: list[str]):
    flag = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag.add_argument("--out", type=Path, default=Path("out/study"), help="(default: %(default)s)")
    flag.add_argument("--demo", type=Path, default=Path("out/world"), help="(default: %(default)s)")
    flag.add_argument("--seeds", default="0,1,2", help="(default: %(default)s)")
    args = flag.parse_args(argv)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    (HERE / "RESULTS.md").write_text(page(args.out.absolute(), args.demo, seeds))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except FileNotFoundError as e:
        sys.exit(f"error: {e.filename} does not exist: `make demo` makes a run for the gallery")
