"""What one run is: frozen dataclasses, and the bridge between YAML and them.

Dicts live outside (YAML, Ray, MLflow), dataclasses inside. Every value is checked when its section is built, so a
`Config` that exists is one that can be trained.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import os
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

SAMPLE_RATE = 16_000  # Hz, everywhere inside raysv; audio of any other rate is resampled when it is read
T = TypeVar("T")

SYNTHETIC = "synthetic"  # the value of data.root that stands for the embedded corpus


def knob(
    default: Any,
    doc: str,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float = -math.inf,
    choices: tuple[str, ...] = (),
    hint: str = "",
) -> Any:
    """One configurable value: its default, its meaning and what it may be.

    Args:
        low, high: the closed range of a number.
        above: an open lower end, for values that must be strictly larger.
        choices: the allowed words of a text, or of each element of a list of texts.
        hint: a sentence that an error about this value ends with.
    """
    limits = {"low": low, "high": high, "above": above, "choices": choices}
    metadata = {"doc": doc, "hint": hint, **limits}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


class Section:
    """A part of the configuration that checks its own values."""

    def __post_init__(self) -> None:
        section = _section_name(type(self))
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            _check_value(f"{section}.{item.name}", getattr(self, item.name), item.metadata)


@dataclass(frozen=True)
class DataConfig(Section):
    """Where the audio is and which lists describe it. Lists are looked up below `root`, and so are their paths."""

    root: str = knob(SYNTHETIC, "folder of the corpus; `synthetic` is the embedded one, made and cached on first use")
    train: str = knob(
        "train.csv", "training utterances: CSV `speaker,path[,duration_s,session]` or a Kaldi data folder"
    )
    dev_pairs: str = knob("dev_pairs.txt", "pairs of the search's objective; their speakers must not be in training")
    test_pairs: dict[str, str] = knob(
        {"test": "test_pairs.txt"}, "name of each test list and its file; a search never looks at them"
    )
    utterances: list[str] = knob(
        ["dev.csv", "test.csv"], "manifests or Kaldi folders that say who speaks in the recordings of the pair lists"
    )
    enrolments: list[str] = knob([], "lists `model utterance [utterance ...]` of enrolments made of several recordings")
    noise: str = knob("noise.csv", "noise clips: a folder, a MUSAN folder, or CSV `path[,split]`; empty for none")
    music: str = knob("", "music clips, given like noise")
    babble: str = knob("", "speech clips for babble, given like noise; empty: other training speakers babble")
    rir: str = knob("rir.csv", "room impulse responses, given like noise")
    cache: str = knob("", "folder of the decoded waveforms; empty: $RAYSV_CACHE or ~/.cache/raysv")
    outside_root: bool = knob(
        False, "whether lists may name recordings outside `root`, by absolute paths or `..`; links are followed anyway"
    )
    skip_bad_audio: bool = knob(False, "leave out unusable recordings instead of refusing to start")
    loader_workers: int | None = knob(
        None, "processes that read audio ahead, per worker; none given: 4 beside a GPU, otherwise 0", 0
    )


@dataclass(frozen=True)
class BatchConfig(Section):
    """What the global batch is made of; the workers of a trial share it out between them."""

    speakers: int = knob(32, "speakers in a batch, all different", 2)
    utterances_per_speaker: int = knob(2, "utterances of each of them, all different", 1)
    views: int = knob(2, "augmented views of each utterance", 1)
    crop_seconds: float = knob(2.0, "length of the random crop; shorter utterances are repeated", 0.2, 60)

    @property
    def size(self) -> int:
        """Utterances in the global batch."""
        return self.speakers * self.utterances_per_speaker


@dataclass(frozen=True)
class AugmentConfig(Section):
    """How hard the views are made; see `raysv.speech.augmentation.recipe`."""

    strength: float = knob(0.5, "0: samples untouched, 0.5: the field's customary recipe, 1: harsh", 0, 1)
    kinds: list[str] = knob(
        ["noise", "babble", "reverb"], "what is added to a view", choices=("noise", "music", "babble", "reverb")
    )


@dataclass(frozen=True)
class ModelConfig(Section):
    """The ECAPA-TDNN encoder."""

    channels: int = knob(512, "channels C of the convolutions: 512 and 1024 are the published sizes", 16, 4096)
    embedding_dim: int = knob(192, "length of an embedding", 2, 4096)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels % 16:
            raise ValueError(f"model.channels must be a multiple of 16, got {self.channels}.")


@dataclass(frozen=True)
class LossConfig(Section):
    """AAM-Softmax plus `contrast_weight` times SupCon, or one of the two alone."""

    kind: str = knob(
        "aam_supcon",
        "aam_supcon: both terms, aam: AAM-Softmax alone, supcon: SupCon alone",
        choices=("aam_supcon", "aam", "supcon"),
    )
    margin: float = knob(
        0.2,
        "additive angular margin m of AAM-Softmax, in radians",
        0,
        1.57,
        hint="Margins are radians, not degrees: the usual 0.2 is about 11 degrees.",
    )
    scale: float = knob(30.0, "scale s of AAM-Softmax", above=0)
    temperature: float = knob(0.07, "temperature τ of SupCon; does not change the weight of the term", above=0)
    contrast_weight: float = knob(1.0, "weight λ of SupCon beside AAM-Softmax; 0 leaves that alone", 0)
    contrast_margin: float = knob(
        0.0, "what SupCon takes from the cosines of positives, so that they must stand out by as much", 0, 1
    )
    aam_views: str = knob("all", "views that AAM-Softmax classifies", choices=("all", "first"))
    fallback: str = knob(
        "mm",
        "line in place of cos(θ + m) where θ + m exceeds π: mm is cos θ − m·sin m, mmm is cos θ − (1 − cos m)",
        choices=("mm", "mmm"),
    )
    margin_warmup_epochs: float = knob(0.0, "epochs over which the margin grows from 0 to its value", 0)

    @property
    def classifies(self) -> bool:
        """Whether AAM-Softmax is part of the loss."""
        return self.kind != "supcon"

    @property
    def contrasts(self) -> bool:
        """Whether SupCon is part of the loss."""
        return self.kind == "supcon" or (self.kind == "aam_supcon" and self.contrast_weight > 0)


# the keys of `loss` that mean nothing unless their term is there, by the kinds that have it
LOSS_KEYS = {
    ("aam_supcon", "aam"): ("margin", "scale", "aam_views", "fallback", "margin_warmup_epochs"),
    ("aam_supcon", "supcon"): ("temperature", "contrast_margin"),
    ("aam_supcon",): ("contrast_weight",),
}


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """The optimiser and its schedule, counted in epochs so that it means the same at any batch size."""

    name: str = knob("adamw", "optimiser", choices=("adamw", "sgd"))
    learning_rate: float = knob(1e-3, "learning rate at the end of the warm-up", above=0)
    final_learning_rate: float = knob(0.01, "learning rate at the end, as a share of `learning_rate`", 0, 1)
    warmup_epochs: float = knob(1.0, "epochs of linear warm-up, before a cosine to the end", 0)
    weight_decay: float = knob(1e-4, "weight decay, on weights but not on biases and norms", 0)
    momentum: float = knob(0.9, "Nesterov momentum of sgd", 0, 0.999)
    clip_norm: float = knob(5.0, "largest norm of the whole gradient", above=0)


@dataclass(frozen=True)
class TrainingConfig(Section):
    """How long, from which seed and in which precision."""

    epochs: int = knob(20, "passes over the training list", 1)
    seed: int = knob(0, "seed of weights, batches, crops and augmentation", 0, 2**31 - 1)
    precision: str = knob("auto", "auto: bf16 autocast where the device has it fast", choices=("auto", "fp32", "bf16"))


@dataclass(frozen=True)
class Config:
    """Everything one run depends on, beside the recordings themselves."""

    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        warmups = {
            "optimizer.warmup_epochs": self.optimizer.warmup_epochs,
            "loss.margin_warmup_epochs": self.loss.margin_warmup_epochs,
        }
        for key, epochs in warmups.items():
            if epochs > self.training.epochs:
                raise ValueError(f"{key} is {epochs:g}, but training ends after {self.training.epochs} epochs.")
        if self.loss.contrasts and self.batch.views * self.batch.utterances_per_speaker < 2:
            raise ValueError(
                "The contrastive term needs two views or two utterances of a speaker in a batch, got batch.views 1 and "
                "batch.utterances_per_speaker 1. Raise one of them, or set loss.kind to aam."
            )


def check_shares(batch: BatchConfig, workers: int) -> None:
    """Refuse a global batch that has not an utterance for each worker.

    Raises: ValueError.
    """
    if batch.size < workers:
        raise ValueError(
            f"A batch of {batch.size} utterances (batch.speakers × batch.utterances_per_speaker) cannot be shared by "
            f"{workers} workers: each needs one. Enlarge it or lower resources.workers."
        )


def config_from_dict(tree: dict[str, Any]) -> Config:
    """A checked `Config`; what the tree leaves out takes its default.

    Raises: ValueError naming the key for an unknown key, a value of another type or one out of range.
    """
    return section_from_dict(Config, tree)


def config_to_dict(config: Any) -> dict[str, Any]:
    """The full tree of a configuration or of one of its sections, as YAML, Ray and MLflow take it."""
    return dataclasses.asdict(config)


def section_from_dict(cls: type[T], tree: Any, where: str = "") -> T:
    """An instance of a configuration dataclass from the dict that YAML holds for it; `where` is its dotted key."""
    tree = {} if tree is None else tree  # YAML's word for a section with nothing in it
    if not isinstance(tree, dict):
        raise ValueError(f"{where or 'The configuration'} must be a mapping of keys to values, got {tree!r}.")
    hints = typing.get_type_hints(cls)
    known = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in tree:
        if key not in known:
            raise ValueError(unknown_key(f"{where}.{key}" if where else str(key), str(key), known))
    values = {}
    for key, value in tree.items():
        path = f"{where}.{key}" if where else key
        nested = dataclasses.is_dataclass(hints[key])
        values[key] = section_from_dict(hints[key], value, path) if nested else _convert(path, value, hints[key])
    return cls(**values)


def unknown_key(path: str, key: str, known: list[str]) -> str:
    """The message for a key that means nothing here, with the one that was probably meant."""
    close = difflib.get_close_matches(key, known, n=1)
    guess = f" Did you mean {close[0]}?" if close else ""
    return f"Unknown key {path}.{guess} Known keys here: {', '.join(known)}."


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"loss": {"margin": 0.2}}` as `{"loss.margin": 0.2}`, the spelling of `--set` and of MLflow's parameters."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def with_values(tree: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A copy of a tree with some leaves, named by dotted keys, set to other values."""
    result = copy.deepcopy(tree)
    for dotted, value in values.items():
        *sections, name = dotted.split(".")
        branch = result
        for section in sections:
            if branch.get(section) is None:
                branch[section] = {}
            branch = branch[section]
            if not isinstance(branch, dict):
                raise ValueError(f"{dotted} cannot be set: {section} is a value, not a section.")
        branch[name] = value
    return result


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """`["loss.margin=0.3"]`, as the doors' `--set` takes it, as dotted keys and YAML values."""
    values = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set takes KEY=VALUE, for example --set loss.margin=0.3; got {setting!r}.")
        try:
            values[key.strip()] = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {setting}: the value is not valid YAML: {error}") from error
        except RecursionError as error:
            raise ValueError(f"--set {setting[:80]}: the value is nested too deeply.") from error
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds, with `${NAME}` in its texts replaced from the environment.

    Raises: ValueError naming the file, and line where YAML gives one.
    """
    if not path.is_file():
        raise ValueError(f"No file {path}. Name a YAML file, for example one from search_spaces/.")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply.") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a mapping of sections, such as `loss: {{margin: 0.2}}`.")
    return {key: _expand(value, f"{path}: {key}") for key, value in tree.items()}


def write_yaml(tree: dict[str, Any], path: Path, header: str = "") -> None:
    """Write a tree as YAML, below a comment."""
    path.write_text(dump_yaml(tree, header), encoding="utf-8")


def dump_yaml(tree: dict[str, Any], header: str = "") -> str:
    """A tree as the text of a YAML file that `read_yaml` reads as it was, below a comment."""
    lines = "".join(f"# {line}\n" for line in header.splitlines())
    return lines + str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in YAML 1.2, and no key hides another of the same name.

    Nor are there aliases (`*name`), by which a few lines can stand for more than any memory holds.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(problem="an alias; write out what it stands for", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for position, (key, _) in enumerate(node.value):
            if key.value in names[:position]:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is there twice", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts a text such as 1e3 between quotes, as `_Loader` would read a number; and uses no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for kind in (_Loader, _Dumper):
    kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def _section_name(cls: type) -> str:
    return cls.__name__.removesuffix("Config").lower()


def _check_value(path: str, value: Any, limits: Any) -> None:
    choices = limits["choices"]
    words = value if isinstance(value, list) else [value]
    if choices and (wrong := [word for word in words if word not in choices]):
        raise ValueError(f"{path} must be one of {', '.join(choices)}; got {wrong[0]!r}.")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    low, high, above = limits["low"], limits["high"], limits["above"]
    if low <= value <= high and value > above and math.isfinite(value):
        return
    if not math.isfinite(value):
        expected = "must be finite"
    elif above > -math.inf:
        expected = f"must be larger than {above}"
    elif high < math.inf:
        expected = f"must lie in [{low}, {high}]"
    else:
        expected = f"must be at least {low}"
    hint = f" {limits['hint']}" if limits["hint"] else ""
    raise ValueError(f"{path} {expected}, got {value}.{hint}")


def _convert(path: str, value: Any, hint: Any) -> Any:
    """The value as the type a field declares; 1 passes for 1.0, and 1.0 for 1."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    kind = typing.get_origin(hint) or hint
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind is str and value is None:
        value = ""
    inner = typing.get_args(hint)[-1] if typing.get_args(hint) else None
    elements = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []
    fits = isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool))
    if not fits or (inner is not None and not all(isinstance(element, inner) for element in elements)):
        names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        names |= {list: "a list of texts", dict: "a mapping of names to texts"}
        raise ValueError(f"{path} must be {names[kind]}, got {value!r}.")
    return value


def _expand(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {key: _expand(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, where) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        if not os.environ.get(name):
            raise ValueError(f"{where} uses ${{{name}}}, which is not set. Set it, for example: export {name}=/data")
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", replace, value)
