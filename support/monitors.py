"""Live monitors of a run: TensorBoard, Weights & Biases, trackio; imported only when used.

In: the lines of log.jsonl and example candidates as text. Out: what each library writes;
TensorBoard's files are under RUN/tensorboard. A monitor that fails says so once and is left out: it
never stops a run.
"""

import importlib
import json
import uuid
from pathlib import Path

from tqdm import tqdm

PROJECT = "nanosip"


class TensorBoard:
    def __init__(self, run: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step, flush_secs=10)
        if step == 0:
            settings = settings_of(run).items()
            self.text("config", "\n".join(f"{name} = {value}" for name, value in settings), 0)

    def numbers(self, line: dict, step: int):
        for name, value in line.items():
            self.writer.add_scalar(name.replace(".", "/"), value, step)

    def text(self, name: str, text: str, step: int):
        as_is = "    " + text.replace("\n", "\n    ")  # code to Markdown
        self.writer.add_text(name, as_is, step)

    def close(self):
        self.writer.close()


class Wandb:
    """wandb (needs a login, or WANDB_MODE=offline), or trackio, which has the same interface. A
    resumed run goes on under the id in its folder."""

    def __init__(self, library: str, run: Path, step: int):
        self.library, kept = importlib.import_module(library), run / f"{library}_id"
        if step == 0 or not kept.exists():
            kept.write_text(uuid.uuid4().hex)
        if library == "wandb":
            own: dict = dict(id=kept.read_text(), resume="allow", dir=str(run), name=str(run))
            own["settings"] = self.library.Settings(silent=True, init_timeout=30)
        else:
            own = dict(name=f"{run} {kept.read_text()[:8]}", embed=False)
            own["resume"] = "allow" if step else "never"
        self.library.init(project=PROJECT, config=settings_of(run), **own)

    def numbers(self, line: dict, step: int):
        self.library.log({name.replace(".", "/"): v for name, v in line.items()}, step=step)

    def text(self, name: str, text: str, step: int):
        if self.library.__name__ == "wandb":
            safe = text.replace("&", "&amp;").replace("<", "&lt;")
            shown = self.library.Html(f"<pre>{safe}</pre>")
        else:
            shown = self.library.Markdown("    " + text.replace("\n", "\n    "))
        self.library.log({name: shown}, step=step)

    def close(self):
        self.library.finish()


def settings_of(run: Path) -> dict:
    file = run / "config.json"  # a phase below the run has none
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def start(name: str, run: Path, step: int):
    return TensorBoard(run, step) if name == "tensorboard" else Wandb(name, run, step)


class Monitors:
    """All monitors of one phase; a context manager. step: where it begins or goes on."""

    def __init__(self, run: Path, names: list[str], step: int):
        self.open: dict = {}
        for name in names:
            self.guard(name, lambda name=name: self.open.update({name: start(name, run, step)}))

    def guard(self, name: str, act, *arguments):
        try:
            act(*arguments)
        except Exception as e:  # whatever a monitor's library or server does, training goes on
            self.open.pop(name, None)
            reason = str(e).strip().partition("\n")[0] or type(e).__name__
            tqdm.write(f"{name} is left out from here on: {reason}")

    def numbers(self, line: dict):
        """A line of log.jsonl, under its step."""
        values = {k: v for k, v in line.items() if k != "step" and v is not None}
        for name, monitor in list(self.open.items()):
            self.guard(name, monitor.numbers, values, line["step"])

    def text(self, name: str, text: str, step: int):
        for each, monitor in list(self.open.items()):
            self.guard(each, monitor.text, name, text, step)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for name, monitor in list(self.open.items()):
            self.guard(name, monitor.close)
