"""Live monitors of a run: TensorBoard, Weights & Biases; imported only when used.

In: the lines of log.jsonl and example candidates as text. Out: what each library writes;
TensorBoard's files are under RUN/tensorboard. A monitor that fails says so once and is left out: it
never stops a run.
"""

import contextlib
import json
import uuid
from pathlib import Path

from tqdm import tqdm


class TensorBoard:
    def __init__(self, run: Path, step: int, settings: dict):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step, flush_secs=10)
        if step == 0:
            self.text("config", json.dumps(settings, indent=2), 0)

    def numbers(self, line: dict, step: int):
        for name, value in line.items():
            self.writer.add_scalar(name.replace(".", "/"), value, step)

    def text(self, name: str, text: str, step: int):
        as_is = "    " + text.replace("\n", "\n    ")  # code to Markdown
        self.writer.add_text(name, as_is, step)

    def close(self):
        self.writer.close()


class Wandb:
    """Needs a login, or WANDB_MODE=offline. A resumed run goes on under the id in its folder."""

    def __init__(self, run: Path, step: int, settings: dict):
        import wandb

        self.wandb, kept = wandb, run / "wandb_id"
        if step == 0 or not kept.exists():
            kept.write_text(uuid.uuid4().hex)
        how: dict = dict(id=kept.read_text(), resume="allow", dir=str(run), name=str(run))
        how["settings"] = wandb.Settings(silent=True, init_timeout=30)
        wandb.init(project="nanosip", config=settings, **how)

    def numbers(self, line: dict, step: int):
        self.wandb.log({name.replace(".", "/"): v for name, v in line.items()}, step=step)

    def text(self, name: str, text: str, step: int):
        safe = text.replace("&", "&amp;").replace("<", "&lt;")
        self.wandb.log({name: self.wandb.Html(f"<pre>{safe}</pre>")}, step=step)

    def close(self):
        self.wandb.finish()


KINDS = {"tensorboard": TensorBoard, "wandb": Wandb}


class Monitors:
    """All monitors of one phase. step: where it begins or goes on."""

    def __init__(self, run: Path, names: list[str], step: int):
        file = run / "config.json"  # a phase below the run has none
        settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self.open: dict = {}
        for name in names:
            with self.left_out_on_failure(name):
                self.open[name] = KINDS[name](run, step, settings)

    def tell(self, what: str, *arguments):
        """Call this method of each: numbers(line, step), text(name, text, step), close()."""
        for name, monitor in list(self.open.items()):
            with self.left_out_on_failure(name):
                getattr(monitor, what)(*arguments)

    @contextlib.contextmanager
    def left_out_on_failure(self, name: str):
        try:
            yield
        except Exception as e:  # whatever a monitor's library or server does, training goes on
            self.open.pop(name, None)
            reason = str(e).strip().partition("\n")[0] or type(e).__name__
            tqdm.write(f"{name} is left out from here on: {reason}")
