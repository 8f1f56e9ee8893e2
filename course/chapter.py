"""What a chapter sees of the course: its sizes, the results of earlier stages, and where its own results go.

In a course run (MINIMIND_RUN names its folder) results go there. A chapter opened by hand writes to runs/alone/ and takes what it needs from the
newest run, else from the small checkpoints that ship in data/checkpoints/.
"""

import io
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from course import artifacts
from course.profile import Profile, Sizes, load, load_file

STAGES = {  # who makes an artifact: needed to say which command is missing
    "data": 1, "tokenizer": 2, "pretrain": 9, "sft": 11, "lora": 12, "dpo": 13, "distill": 14,
}  # fmt: skip
EVERYDAY = ["Who are you?", "What is the sun?", "How are you today?", "What is two plus three?", "Tell me a story."]
CJK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei", "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS",
)  # fmt: skip


class Chapter:
    """The standard set-up of a chapter: `chapter = start("04_attention", profile)`."""

    def __init__(self, name: str, profile: str) -> None:
        self.root = artifacts.home()
        run = os.environ.get("MINIMIND_RUN")
        self.alone = not run
        self.run = Path(run).resolve() if run else artifacts.runs() / "alone"
        self.name = name
        copy = self.run / "profile.yaml"  # a run keeps its own copy, with the changes made by --set
        self.settings: Profile = load_file(copy, self.root) if run and copy.is_file() else load(profile, self.root)
        self.profile: str = self.settings.name
        self.settings.file = f"profiles/{self.profile}.yaml"  # where people look and change, not the run's copy
        self.model: str = self.settings.model
        self.world: dict = dict(self.settings.world)
        self.data: str = os.environ.get("MINIMIND_DATA") or local_data(self.settings.data, self.root)
        self.size: Sizes = self.settings.sizes(name)
        self.max_steps = _max_steps()
        self._origin: dict = {}  # of the model that was read last
        # Bands are measured with a profile as it stands: not with other data, changed keys, or steps cut short. A run says which.
        changed = os.environ.get("MINIMIND_BANDS") == "off" if run else bool(os.environ.get("MINIMIND_DATA"))
        self.bands_hold = not changed and self.max_steps is None
        style_figures()

    # -- sizes and machine

    def steps(self, count: int) -> int:
        """How many steps to train when `count` are wanted: fewer under --max-steps."""
        return count if self.max_steps is None else min(count, self.max_steps)

    @cached_property
    def device(self):
        """The torch.device that this profile and this machine agree on."""
        device, sentence = choose_device(self.settings.device)
        self._replaced("device", sentence)
        return device

    @cached_property
    def amp(self):
        """The torch dtype for autocast, or None for plain float32."""
        dtype, sentence = choose_precision(self.device, self.settings.precision)
        self._replaced("precision", sentence)
        return dtype

    def _replaced(self, what: str, sentence: str | None) -> None:
        """Say in the notebook, and leave for the report to say, that the machine cannot do what the profile wants."""
        if sentence is None:
            return
        print(sentence)
        artifacts.update_json(self.run / "replaced.json", lambda value: value.update({what: sentence}))

    # -- results

    def record(self, name: str, value: float) -> float:
        """Put a number into metrics.json."""
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"{name} is {number}: only finite numbers can be recorded")
        artifacts.update_json(self.run / "metrics.json", lambda metrics: metrics.update({name: number}))
        return number

    def check(self, name: str, value: float) -> float:
        """Record a number and compare it with the band that the profile expects; AssertionError outside of it."""
        number = self.record(name, value)
        band = self.settings.bands.get(name)
        if band is None:
            print(f"{name} = {number:.4g}")
            return number
        low, high = (None if limit is None else float(limit) for limit in band)
        expected = describe_band(band)
        if not self.bands_hold:
            print(f"{name} = {number:.4g}   (expected {expected} with this profile as it stands; not checked in this run)")
            return number
        print(f"{name} = {number:.4g}   (expected {expected} at profile {self.profile})")
        if (low is not None and number < low) or (high is not None and number > high):
            raise AssertionError(f"{name} = {number:.4g} is outside of the band {expected} that {self.settings.file} expects")
        return number

    def curve(self, name: str, x: Sequence[float], y: Sequence[float], x_label: str = "steps", y_label: str = "loss") -> None:
        """Keep a curve for the report; at most 400 of its points are kept."""
        xs, ys = [float(value) for value in x], [float(value) for value in y]
        if len(xs) != len(ys):
            raise ValueError(f"curve {name!r}: {len(xs)} values of x, {len(ys)} of y")
        points = [(a, b) for a, b in zip(xs, ys, strict=True) if math.isfinite(a) and math.isfinite(b)]
        step = max(1, math.ceil(len(points) / 400))
        kept = points[::step] if not points or points[-1] == points[::step][-1] else [*points[::step], points[-1]]
        line = {"chapter": self.name, "x": [a for a, _ in kept], "y": [b for _, b in kept], "x_label": x_label, "y_label": y_label}
        artifacts.update_json(self.run / "curves.json", lambda curves: curves.update({name: line}))

    def five_questions(self, questions: Sequence[dict]) -> list[str]:
        """What is asked after every stage: five of the data's `questions`, spread over people and kinds of fact; without any, everyday ones."""
        return [row["question"] for row in questions[:: len(questions) // 5 + 1]] or EVERYDAY

    def answer(self, stage: str, question: str, answer: str) -> None:
        """Keep what the model answered after `stage` ("pretrain", "sft"), for the report."""
        artifacts.update_json(self.run / "answers.json", lambda answers: answers.setdefault(stage, {}).update({question: str(answer)}))

    def keep_results(self, name: str, questions: Sequence[str], right: Sequence[float]) -> None:
        """Keep the result of each question (0 or 1) in results.json, so that `course compare` can pair two runs question by question.

        `questions` names each of them, the same in every run: only equal names are compared.
        """
        if len(questions) != len(right) or len(set(questions)) != len(questions):
            raise ValueError(f"results {name!r}: {len(set(questions))} different names for {len(right)} results; each question needs its own")
        kept = {str(question): int(result) for question, result in zip(questions, right, strict=True)}
        artifacts.update_json(self.run / "results.json", lambda results: results.update({name: kept}))

    # -- artifacts

    @contextmanager
    def write(self, name: str) -> Iterator[Path]:
        """A temporary folder that becomes artifacts/NAME when the block ends without an error."""
        about = {"artifact": name, "chapter": self.name, "profile": self.profile, "model": self.model, "world": self.world, "data": self.data}
        with artifacts.new_folder(self.run / "artifacts" / name, **about, max_steps=self.max_steps) as folder:
            yield folder

    def read(self, name: str) -> Path:
        """The folder of an artifact: of this run, else the newest run, else shipped with the course.

        "data" is made from the world when nothing fits. Raises FileNotFoundError, which names the command that makes the artifact.
        """
        if name == "data":
            return self._data()
        folder = self._find(name)
        if folder is None:
            number = STAGES.get(name)
            command = f"python -m course run --profile {self.profile}" + (f" --only 1-{number}" if number else "")
            searched = f"{self._shown(self.run)}, in an earlier run or in data/checkpoints"
            raise FileNotFoundError(f"there is no finished artifact {name!r} in {searched}; `{command}` makes it")
        if not folder.is_relative_to(self.run):
            print(f"{name} comes from {self._shown(folder)}")
        self._origin = self._about(folder)
        return folder

    def stages(self) -> dict[str, Path]:
        """The finished models by stage: the pretrained one, and every later one that there is of the same text."""
        found = {"pretrain": self.read("pretrain")}
        origin = self._origin
        for name in ("sft", "lora", "dpo", "distill"):
            about = self._about(folder) if (folder := self._find(name)) else {}
            same_text = about.get("data") == origin.get("data") and (about.get("data") != "world" or about.get("world") == origin.get("world"))
            if same_text and (folder / "model.safetensors").is_file():
                found[name] = self.read(name)
        self._origin = origin
        return found

    def _about(self, folder: Path) -> dict:
        return artifacts.about(folder) or {"data": "world", "world": load("cpu", self.root).world}  # what ships is made at cpu

    @property
    def work(self) -> Path:
        """A scratch folder of this chapter inside the run; what lies here survives --resume."""
        folder = self.run / "work" / self.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _shown(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def _find(self, name: str) -> Path | None:
        own = self.run / "artifacts" / name
        if not self.alone and artifacts.about(own):
            return own
        found = []
        for folder in artifacts.runs().glob(f"*/artifacts/{name}"):
            about = artifacts.about(folder) if not folder.parents[1].is_symlink() else None
            if about and folder != own or about and self.alone:
                fits = (about.get("profile") == self.profile, about.get("max_steps") == self.max_steps, about.get("data") == self.data)
                found.append((*fits, (folder / artifacts.MARKER).stat().st_mtime, folder))
        shipped = self.root / "data" / "checkpoints" / name
        whole = [entry for entry in found if entry[1]]  # a run cut short by --max-steps taught its model nothing
        if whole:
            return max(whole)[-1]
        return shipped if shipped.is_dir() else max(found)[-1] if found else None

    def _data(self) -> Path:
        own = self.run / "artifacts" / "data"
        if not self.alone and artifacts.about(own):
            return own
        # Questions must be about the people whom the model read about: the world of the model that was read goes first.
        origin = self._origin
        world, data = origin.get("world", self.world), origin.get("data", self.data)
        for folder in sorted(artifacts.runs().glob("*/artifacts/data*"), reverse=True):
            about = None if folder.parents[1].is_symlink() else artifacts.about(folder)
            if about and (about.get("world"), about.get("data")) == (world, data):
                return folder
        if data != "world":
            command = f"python -m course run --profile {self.profile} --data {data} --only 1"
            raise FileNotFoundError(f"the data of {data!r} are not prepared yet; `{command}` does it")
        from minimind.data import prepare_world

        target = self.run / "artifacts" / ("data-world-" + "-".join(str(value) for value in world.values()))
        with artifacts.new_folder(target, artifact="data", chapter=self.name, world=world, data="world", max_steps=None) as folder:
            prepare_world(folder, world)
        return target

    # -- figures

    def show(self, figure, caption: str) -> None:
        """Show a matplotlib figure with a sentence under it, which is also its text alternative, and close it."""
        import matplotlib.pyplot as plt

        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # a machine without Chinese fonts shows boxes
            figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Description": caption, "Software": None})
        plt.close(figure)
        try:
            from IPython import get_ipython
            from IPython.display import Image, Markdown, display
        except ImportError:
            get_ipython = lambda: None  # noqa: E731
        if get_ipython() is None:
            print(f"[figure] {caption}")
            return
        display(Image(_smaller(buffer.getvalue()), format="png", alt=caption))
        display(Markdown(f"*{caption}*"))


def choose_device(wanted: str):
    """The torch.device for auto, cpu or cuda, and a sentence if it is not the one that was wanted."""
    import torch

    cuda = torch.cuda.is_available()
    sentence = "device cuda replaced by cpu: this machine has no GPU that torch can use" if wanted == "cuda" and not cuda else None
    return torch.device("cuda" if cuda and wanted != "cpu" else "cpu"), sentence


def choose_precision(device, wanted: str):
    """The torch dtype for autocast (None: float32), and a sentence if it is not the one that was wanted."""
    from minimind.train import pick_precision

    dtype, reason = pick_precision(device, wanted)
    got = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}.get(str(dtype), "fp32")
    return dtype, None if wanted in ("auto", got) else f"precision {wanted} replaced by {reason}"


def replaced(device: str, precision: str) -> list[str]:
    """What this machine has to do otherwise than a profile with this device and precision says."""
    chosen, sentence = choose_device(device)
    return [each for each in (sentence, choose_precision(chosen, precision)[1]) if each]


def local_data(source: str, root: Path) -> str:
    """Where a data set of the manifest lies once it was downloaded; "world" and "hf:..." stay as they are."""
    return source if source == "world" or source.startswith("hf:") else str(root / "data" / "downloads" / source)


def describe_band(band: Sequence[float | None]) -> str:
    """[0.9, None] -> "at least 0.9"."""
    low, high = band
    if low is None:
        return f"at most {high:g}"
    return f"at least {low:g}" if high is None else f"{low:g} to {high:g}"


def style_figures() -> None:
    """One look for all figures: colours that survive colour blindness, with line styles that survive grey print (Okabe and Ito 2008)."""
    import matplotlib
    from cycler import cycler
    from matplotlib import font_manager

    known = set(font_manager.get_font_names())
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
    lines = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1))]
    matplotlib.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=colours) + cycler(linestyle=lines),
            "figure.dpi": 110,
            "savefig.dpi": 110,
            "figure.figsize": (7, 3),
            "figure.constrained_layout.use": True,
            "font.family": ["DejaVu Sans", *(font for font in CJK_FONTS if font in known)][:3],
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.labelsize": 10,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "legend.fontsize": 9,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "image.cmap": "cividis",
            "lines.linewidth": 1.8,
            "savefig.facecolor": "white",
        }
    )


def _smaller(png: bytes) -> bytes:
    """The same picture with a palette of 256 colours: about a third of the bytes, so that notebooks stay small."""
    from PIL import Image, PngImagePlugin

    picture = Image.open(io.BytesIO(png))
    texts = PngImagePlugin.PngInfo()
    for key, value in getattr(picture, "text", {}).items():
        texts.add_itxt(key, value)
    out = io.BytesIO()
    picture.convert("RGB").quantize(256).save(out, "PNG", optimize=True, pnginfo=texts, dpi=(110, 110))
    return min(out.getvalue(), png, key=len)


def _max_steps() -> int | None:
    text = os.environ.get("MINIMIND_MAX_STEPS")
    if not text:
        return None
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"MINIMIND_MAX_STEPS is {text!r}: expected a whole number of at least 1")
    return int(text)
