"""Live monitors of a run: TensorBoard, Weights & Biases, trackio; imported only when used.

In: the lines of log.jsonl and example candidates as text. Out: what each library writes;
TensorBoard's files are under RUN/tensorboard. A monitor that fails says so once and is left out: it
never stops a run.
"""

import dataclasses
import importlib.util
import uuid
from pathlib import Path

from tqdm import tqdm

from config import Config, names

PROJECT = "nanosip"


class TensorBoard:
    def __init__(self, run: Path, config: Config, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step, flush_secs=10)
        if step == 0:
            settings = dataclasses.asdict(config).items()
            self.text("config", "\n".join(f"{name} = {value}" for name, value in settings), 0)

    def numbers(self, line: dict, step: int):
        for name, value in line.items():
            self.writer.add_scalar(name.replace(".", "/"), value, step)

    def text(self, name: str, text: str, step: int):
        self.writer.add_text(
            name, "    " + text.replace("\n", "\n    "), step
        )  # as is, no Markdown

    def close(self):
        self.writer.close()


class Wandb:
    """Needs a login, or WANDB_MODE=offline. A resumed run goes on under the id in its folder."""

    def __init__(self, run: Path, config: Config, step: int):
        import wandb

        kept = run / "wandb_id"
        if step == 0 or not kept.exists():
            kept.write_text(uuid.uuid4().hex)
        self.html = wandb.Html
        self.run = wandb.init(
            project=PROJECT,
            name=str(run),
            dir=str(run),
            id=kept.read_text(),
            resume="allow",
            config=dataclasses.asdict(config),
            settings=wandb.Settings(silent=True, init_timeout=30),
        )

    def numbers(self, line: dict, step: int):
        self.run.log({name.replace(".", "/"): value for name, value in line.items()}, step=step)

    def text(self, name: str, text: str, step: int):
        safe = text.replace("&", "&amp;").replace("<", "&lt;")
        self.run.log({name: self.html(f"<pre>{safe}</pre>")}, step=step)

    def close(self):
        self.run.finish()


class Trackio:
    """Local; `trackio show` opens what it wrote."""

    def __init__(self, run: Path, config: Config, step: int):
        import trackio

        self.trackio = trackio
        settings = dataclasses.asdict(config)
        resume = "allow" if step else "never"
        trackio.init(project=PROJECT, name=str(run), config=settings, resume=resume, embed=False)

    def numbers(self, line: dict, step: int):
        self.trackio.log({name.replace(".", "/"): value for name, value in line.items()}, step=step)

    def text(self, name: str, text: str, step: int):
        quoted = "    " + text.replace("\n", "\n    ")
        self.trackio.log({name: self.trackio.Markdown(quoted)}, step=step)

    def close(self):
        self.trackio.finish()


KINDS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


class Monitors:
    """All monitors of one run; a context manager. step: where the run begins or goes on."""

    def __init__(self, config: Config, step: int, active: bool = True):
        wanted = names(config.track)
        if wanted == ["auto"]:
            wanted = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
        self.open: dict = {}
        for name in wanted if active else []:
            self.guard(name, self.start, name, config, step)

    def start(self, name: str, config: Config, step: int):
        self.open[name] = KINDS[name](Path(config.out_dir), config, step)

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
