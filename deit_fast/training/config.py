"""Every setting of a training run, each written once.

Six frozen dataclasses, one for each part of the program, so that no `args` object travels through the code: the data
loader sees `DataConfig`, the optimiser `OptimConfig`. A field's annotation and metadata give its flag, YAML key, help,
default and checks (`cli.py`). The defaults are the report's DeiT; other recipes are presets (`presets.yaml`).

Order, later wins: defaults < preset < `-c file.yaml` < flags. A file may name its preset with the key `preset`; the
flag `--preset` then replaces it. `to_dict` is what a run writes as `config.yaml`; read again with -c it is the same
run.

A combination that cannot be trained as asked is a ConfigError. A setting that merely does nothing beside the others is
a line of `warnings` (`no_effect.py`), but only where somebody gave it: `Config.explicit` holds the flags, and those
keys of a file that differ from the preset and the default. (A config.yaml names every key; what its run left alone is
no reason to complain.)

This module imports no torch, so that settings can be read and checked without it. (`--help` still waits for torch: the
package's `__init__` imports the ops.)
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .cli import Parser, Section, Setting, convert, from_mapping, nearest, read_yaml, setting, settings
from .no_effect import warnings

__all__ = ["PRESETS", "SETTINGS", "AugmentationConfig", "Config", "DataConfig", "DistillationConfig", "ModelConfig",
           "OptimConfig", "RunConfig", "from_dict", "parse", "to_dict", "warnings"]

SEED = "[0, 4294967295]"  # 32 bits: exact as a float, and taken by every generator


@dataclass(frozen=True)
class DataConfig(Section):
    """Data."""

    data_set: str = setting("auto", "auto: CIFAR-10 if present or downloadable, else scikit-learn's digits",
                            choices=("auto", "cifar10", "cifar100", "folder", "digits"), flags=("--dataset",))
    data_path: str | None = setting(None, "where the data lies or is downloaded to; for folder a directory or archive "
                                    "of train/<class>/* and test/<class>/*", flags=("--data-dir",), metavar="PATH")
    data_name: str | None = setting(None, "folder: what logs and reports call it; none: its file name", metavar="TEXT")
    download: bool = setting(True, "download a data set that is missing")
    input_size: int | None = setting(None, "side of the training images in pixels; none: the model's own",
                                     within="[1, inf)", flags=("--img-size",))
    val_split: float = setting(0.1, "share of the training set that chooses the best epoch", within="[0, 0.5]")
    batch_size: int = setting(64, "images per forward pass", within="[1, inf)", flags=("-b",))
    eval_batch_size: int = setting(256, "images per forward pass in evaluation", within="[1, inf)")
    data_loading: str = setting("auto", "resident: all images on the device; stream: copied there batch by batch, from "
                                "memory or, of a folder, from its files; auto: resident where they fit",
                                choices=("auto", "resident", "stream"))
    workers: int = setting(2, "processes that apply --aa and decode streamed files; nothing else needs any",
                           within="[0, inf)", flags=("-j", "--num-workers"))
    repeated_aug: bool = setting(False, "each chosen image comes --aug-repeats times in an epoch of unchanged length, "
                                 "every time augmented differently; works on one process")
    aug_repeats: int = setting(3, "copies of an image under --repeated-aug", within="[1, inf)")
    skip_bad_images: bool = setting(False, "leave out images that cannot be decoded, and count them")
    data_seed: int = setting(0, "seed of the order, the augmentation and the validation split", within=SEED)


@dataclass(frozen=True)
class AugmentationConfig(Section):
    """Augmentation.

    With `aug=False` every other field, smoothing included, is stored as its neutral default: what the object (and the
    config.yaml of the run) says is what was applied.
    """

    aug: bool = setting(True, "--no-aug turns off all of this section and repeated augmentation")
    train_crop_mode: str = setting("none", "rrc: resize a random part of the image; none: the whole image, or "
                                   "--crop-pad; auto: rrc above 32 pixels, as DeiT's code",
                                   choices=("none", "rrc", "auto"))
    scale: tuple[float, float] = setting((0.08, 1.0), "rrc: share of the image's area", within="(0, 1]",
                                         metavar="MIN MAX")
    ratio: tuple[float, float] = setting((3 / 4, 4 / 3), "rrc: width by height", within="[0.001, 1000]",
                                         metavar="MIN MAX")
    train_interpolation: str = setting("bicubic", "rrc: how it resizes, antialiased; random: either for each image",
                                       choices=("bilinear", "bicubic", "random"))
    crop_pad: int = setting(0, "random crop after padding with so many pixels", within="[0, inf)")
    padding_mode: str = setting("constant", "--crop-pad with black pixels or the mirrored image",
                                choices=("constant", "reflect"))
    hflip: float = setting(0.0, "probability of a horizontal flip", within="[0, 1]")
    alternating_flip: bool = setting(False, "--hflip is drawn in the first epoch; every next one shows the other side")
    vflip: float = setting(0.0, "probability of a vertical flip", within="[0, 1]")
    color_jitter: float = setting(0.0, "brightness, contrast and saturation change by a factor in 1 +- X; also with "
                                  "--aa, where DeiT's code drops it silently", within="[0, 10]")
    hue: float = setting(0.0, "hue shifts by up to X turns of the color wheel, in --color-jitter's random order",
                         within="[0, 0.5]", metavar="X")
    grayscale_prob: float = setting(0.0, "probability of losing all color", within="[0, 1]")
    aa: str = setting("none", "none, ra (RandAugment), ta_wide (TrivialAugment), or timm's notation such as "
                      "rand-m9-mstd0.5-inc1", pattern=r"none|ra|ta_wide|rand(-[a-z]+[0-9.]+)*")
    reprob: float = setting(0.0, "probability of random erasing", within="[0, 1]")
    remode: str = setting("pixel", "erase with normal noise, one normal color per box, or the mean",
                          choices=("pixel", "rand", "const"))
    recount: int = setting(1, "most boxes erased in an image", within="[1, 16]")
    mixup: float = setting(0.0, "alpha of MixUp's Beta(alpha, alpha); 0: no MixUp", within="[0, 10000]")
    cutmix: float = setting(0.0, "alpha of CutMix's Beta(alpha, alpha); 0: no CutMix", within="[0, 10000]")
    cutmix_minmax: tuple[float, float] | None = setting(
        None, "CutMix with a box whose sides are such shares of the image's, instead of --cutmix", within="(0, 1]",
        metavar="MIN MAX")
    mixup_prob: float = setting(1.0, "probability of any mixing", within="[0, 1]")
    mixup_switch_prob: float = setting(0.5, "probability of CutMix where both are on", within="[0, 1]")
    mixup_mode: str = setting("batch", "one draw for a batch, a pair of images or each image",
                              choices=("batch", "pair", "elem"))
    mixup_off_epoch: int = setting(0, "no mixing from this epoch on; 0: never off", within="[0, inf)")
    smoothing: float = setting(0.0, "label smoothing, inside the mixed target", within="[0, 1)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.aug:
            for s in settings(type(self))[1:]:
                object.__setattr__(self, s.name, s.default)

    @property
    def mixes(self) -> bool:
        """Whether MixUp or CutMix is on."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


@dataclass(frozen=True)
class ModelConfig(Section):
    """Model."""

    model: str = setting("deit_nano_distilled_patch4_32", "name of the architecture, as timm writes them")
    tokens: str | None = setting(None, "tokens before the patches; none: the model's own",
                                 choices=("cls", "cls+cls", "cls+dist"))
    drop: float | None = setting(None, "dropout of embeddings, projections and MLPs; none: the model's own",
                                 within="[0, 1)")
    attn_drop: float = setting(0.0, "dropout of attention probabilities", within="[0, 1)")
    drop_path: float = setting(0.0, "stochastic depth of the last block, rising linearly from 0", within="[0, 1)")
    finetune: str | None = setting(None, "checkpoint whose weights the model starts from", metavar="PATH")
    model_ema: bool = setting(False, "average the weights over the steps, and evaluate the average too")
    model_ema_decay: float = setting(0.99996, "decay of that average per step", within="[0, 1)")
    model_ema_warmup: bool = setting(False, "let the decay rise from 0, for runs shorter than 1 / (1 - decay) steps")

    @property
    def distilled(self) -> bool:
        """Whether tokens, or else the model's name, say that there is a distillation token."""
        return self.tokens == "cls+dist" if self.tokens else "distilled" in self.model


@dataclass(frozen=True)
class DistillationConfig(Section):
    """Distillation and teacher."""

    distillation_type: str = setting("soft", "what the distillation token learns: nothing, the teacher's softened "
                                     "probabilities, or its decision", choices=("none", "soft", "hard"))
    distillation_alpha: float = setting(0.5, "weight of the teacher's part of the loss", within="[0, 1]")
    distillation_tau: float = setting(3.0, "temperature of soft distillation", within="(0, inf)")
    distillation_reduction: str = setting("batchmean", "KL divergence per image (the equation) or per image and class "
                                          "(DeiT's code)", choices=("batchmean", "numel"))
    teacher_model: str = setting("resnet50", "torchvision classifier")
    teacher_stem: str = setting("auto", "first layers for 224 or for 32 pixels; auto: by device",
                                choices=("auto", "imagenet", "cifar"))
    teacher_weights: str = setting("none", "what the teacher's own training starts from; DEFAULT: torchvision's "
                                   "ImageNet weights", choices=("none", "DEFAULT"))
    teacher_path: str | None = setting(None, "checkpoint of a teacher that is trained already", metavar="PATH")
    teacher_epochs: int = setting(10, "epochs of the teacher's training", within="[1, inf)")
    teacher_lr: float = setting(0.001, "peak learning rate of the teacher's training", within="(0, inf)")
    teacher_batch_size: int = setting(128, "batch size of the teacher's training", within="[1, inf)")
    teacher_input_size: int | None = setting(None, "resize images for the teacher; none: it sees the student's",
                                             within="[1, inf)")
    teacher_cache: str | None = setting(None, "folder of trained teachers; none: the user's cache", metavar="DIR")
    teacher_logits: str = setting("auto", "online: the teacher sees every batch; stored: kept in that folder for all "
                                  "runs with the same data seed and augmentation; auto: stored where nothing is "
                                  "augmented (once per image), else online", choices=("auto", "online", "stored"))


@dataclass(frozen=True)
class OptimConfig(Section):
    """Optimisation."""

    epochs: int = setting(20, "passes over the training set", within="[1, inf)")
    opt: str = setting("adam", "optimizer", choices=("adam", "adamw", "sgd"))
    lr: float = setting(1e-3, "learning rate", within="(0, inf)")
    unscale_lr: bool = setting(True, "take --lr as it is; --no-unscale-lr: lr x batch x accumulation / 512, as DeiT")
    sched: str = setting("constant", "course of the learning rate, per step", choices=("constant", "cosine", "step"))
    warmup_epochs: float = setting(0.0, "linear rise from --warmup-lr", within="[0, inf)")
    warmup_lr: float = setting(1e-6, "learning rate at step 0 of the warmup", within="[0, inf)")
    min_lr: float = setting(1e-5, "learning rate at the end of the cosine", within="[0, inf)")
    decay_epochs: float = setting(30.0, "--sched step: epochs between two decays", within="(0, inf)")
    decay_rate: float = setting(0.1, "--sched step: factor of a decay", within="(0, 1]")
    weight_decay: float = setting(0.0, "weight decay; never on biases, norms, tokens and positions", within="[0, inf)")
    momentum: float = setting(0.9, "momentum of sgd", within="[0, 1)")
    opt_eps: float = setting(1e-8, "epsilon of adam and adamw", within="(0, inf)")
    opt_betas: tuple[float, float] | None = setting(None, "betas of adam and adamw; none: PyTorch's", within="[0, 1)",
                                                    metavar="X X")
    clip_grad: float | None = setting(None, "largest norm of the gradient; none: no limit", within="(0, inf)")
    grad_accum_steps: int = setting(1, "batches whose gradients make one step", within="[1, inf)")


@dataclass(frozen=True)
class RunConfig(Section):
    """Run."""

    output_dir: str = setting("runs/deit", "where the run is written", metavar="DIR")
    seed: int = setting(0, "seed of weights and dropout (see --data-seed)", within=SEED)
    device: str = setting("auto", "auto, cpu, cuda or cuda:N", pattern=r"auto|cpu|cuda(:\d+)?")
    fused: bool = setting(False, "the fast backends of this project, where they serve; off: plain PyTorch")
    amp: bool = setting(False, "automatic mixed precision")
    amp_dtype: str = setting("bfloat16", "its lower precision", choices=("bfloat16", "float16"))
    torchcompile: bool = setting(False, "compile the model with torch.compile")
    cuda_graphs: bool = setting(True, "on a GPU, record the training step once and replay it where that can be done")
    channels_last: bool = setting(False, "channels-last memory for images and teacher")
    grad_checkpointing: bool = setting(False, "recompute blocks in the backward pass: less memory, more time")
    deterministic: bool = setting(False, "only deterministic kernels, for bit-exact resuming on a GPU")
    resume: str | None = setting(None, "continue from a checkpoint; auto, or the flag alone: --output-dir's last",
                                 metavar="PATH", bare="auto")
    eval: bool = setting(False, "evaluate the checkpoint of --resume or --finetune, and exit")
    eval_metric: str = setting("top1", "validation metric that chooses the best epoch",
                               choices=("top1", "top5", "auc", "f1", "precision", "recall", "loss"))
    log_interval: int = setting(50, "steps between two looks at the loss (each a sync)", within="[1, inf)")
    checkpoint_interval: int = setting(0, "steps between two checkpoints; 0: at the end of each epoch only",
                                       within="[0, inf)")


@dataclass(frozen=True)
class Config:
    """All settings of a run. `preset` names where they started from; `explicit` the settings that someone gave."""

    data: DataConfig = field(default_factory=DataConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    preset: str | None = None
    explicit: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.augmentation.aug and self.data.repeated_aug:  # copies that do not differ are no augmentation
            object.__setattr__(self, "data", replace(self.data, repeated_aug=False))
        self._check()

    def _check(self) -> None:
        """Raises ConfigError for settings that contradict each other."""
        kind, model = self.distillation.distillation_type, self.model
        _check_preset(self.preset)
        for name in ("cutmix_minmax", "scale", "ratio"):
            low, high = getattr(self.augmentation, name) or (0, 0)
            if low > high:
                raise ConfigError(f"--{name.replace('_', '-')} needs the smaller number first, got {low} {high}.")
        if kind != "none" and not model.distilled:
            has = f"--tokens {model.tokens}" if model.tokens else f"--model {model.model}"
            raise ConfigError(f"--distillation-type {kind} needs a distillation token, and {has} has none. Choose a "
                              "model with `distilled` in its name, or --tokens cls+dist, or --distillation-type none.")
        if self.data.data_set == "folder" and self.data.data_path is None:
            raise ConfigError("--data-set folder needs --data-path: a directory or archive of train/<class>/* and "
                              "test/<class>/*.")
        if self.run.eval and self.run.resume is None and model.finetune is None:
            raise ConfigError("--eval needs a checkpoint to evaluate: --resume PATH or --finetune PATH.")


_PARTS = {"data": DataConfig, "augmentation": AugmentationConfig, "model": ModelConfig,
          "distillation": DistillationConfig, "optim": OptimConfig, "run": RunConfig}
SETTINGS: dict[str, Setting] = {s.name: s for part in _PARTS.values() for s in settings(part)}
assert len(SETTINGS) == sum(len(fields(part)) for part in _PARTS.values()), "two sections share a field name"
PRESETS: dict[str, dict[str, Any]] = {name: values or {} for name, values in read_yaml(
    str(Path(__file__).with_name("presets.yaml"))).items()}


def _check_preset(name: Any) -> None:
    if name is not None and (not isinstance(name, str) or name not in PRESETS):
        raise ConfigError(f"Unknown preset {name!r:.80}. {nearest(str(name), PRESETS)}")


def _assemble(file: dict[str, Any], source: str, flags: dict[str, Any], preset: str | None) -> Config:
    """The Config of defaults < preset < file < flags."""
    file = dict(file)
    preset_in_file = file.pop("preset", None)
    if preset is None:
        preset = preset_in_file
    _check_preset(preset)
    base = {s.name: s.default for s in SETTINGS.values()}
    base |= from_mapping(PRESETS.get(preset, {}), SETTINGS, f"preset {preset}")
    keys = from_mapping(file, SETTINGS, source)
    words = {name: convert(SETTINGS[name], word, SETTINGS[name].flag) for name, word in flags.items()}
    values = base | keys | words
    parts = {part: cls(**{s.name: values[s.name] for s in settings(cls)}) for part, cls in _PARTS.items()}
    changed = {name for name, value in keys.items() if value not in (base[name], SETTINGS[name].default)}
    return Config(**parts, preset=preset, explicit=frozenset(changed | words.keys()))


def parse(argv: Sequence[str], prog: str = "python -m deit_fast.train") -> Config:
    """The Config of a command line (without the program's name); --help prints the settings and exits with 0."""
    parser = Parser(_PARTS.values(), PRESETS, prog, "Train a small Vision Transformer. Without flags: the report's "
                    "DeiT, distilled from a ResNet-50 for 20 epochs.")
    words = parser.words(argv)
    preset, path = words.pop("preset", None), words.pop("config", None)
    return _assemble(read_yaml(path) if path is not None else {}, str(path), words, preset)


def to_dict(config: Config) -> dict[str, Any]:
    """All settings with flat keys and YAML's types, as in config.yaml; `preset` first."""
    flat: dict[str, Any] = {"preset": config.preset}
    for part, cls in _PARTS.items():
        for s in settings(cls):
            value = getattr(getattr(config, part), s.name)
            flat[s.name] = list(value) if isinstance(value, tuple) else value
    return flat


def unread_settings(*runs: Mapping[str, Any]) -> set[str]:
    """The settings that none of these runs (flat, as in config.yaml) reads: a teacher's, where all go without one."""
    if any(run.get("distillation_type") != "none" for run in runs):
        return set()
    return {setting.name for setting in fields(DistillationConfig)} - {"distillation_type"}


def from_dict(flat: dict[str, Any]) -> Config:
    """The Config of flat keys as in a YAML file; keys that are missing come from the preset or the defaults."""
    return _assemble(flat, "configuration", {}, None)
