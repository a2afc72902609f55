"""The parts of a run, each made from its section of the configuration: data, model, loaders, choice of backends."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deit_fast.backend import record
from deit_fast.data.augmentation import Recipe
from deit_fast.data.datasets import ImageData, load_dataset
from deit_fast.data.loader import EvalLoader, TrainLoader
from deit_fast.errors import CheckpointError, ConfigError
from deit_fast.models import VisionTransformer, create_model, load_weights
from deit_fast.training import checkpoint
from deit_fast.training.config import AugmentationConfig, Config
from deit_fast.training.device import autocast
from deit_fast.training.distillation import Objective
from deit_fast.training.progress import Log


def check_model(config: Config) -> int:
    """The image size that the model wants; ConfigError, before any data is read, for a model that cannot be built."""
    c = config.model
    with torch.device("meta"):  # no memory, no random draws
        model = _create(config, 2, config.data.input_size)
    if model.distilled and config.distillation.distillation_type == "none" and not config.run.eval:
        raise ConfigError(f"--distillation-type none leaves the distillation token of {c.model} untrained, and "
                          "evaluation averages its head in. Use --tokens cls, --tokens cls+cls, or distillation soft "
                          "or hard.")
    return model.patch_embed.img_size


def _create(config: Config, num_classes: int, img_size: int | None) -> VisionTransformer:
    c = config.model
    drop = {} if c.drop is None else {"drop_rate": c.drop}
    try:
        return create_model(c.model, num_classes, tokens=c.tokens, img_size=img_size, attn_drop_rate=c.attn_drop,
                            drop_path_rate=c.drop_path, **drop)
    except ValueError as error:
        size = "" if img_size is None else f" --input-size {img_size}"
        raise ConfigError(f"--model {c.model}{size}: {error}") from error


def load_data(config: Config, size: int, device: torch.device, log: Log) -> ImageData:
    """The data set of a run, at `size` pixels, to be used on the device."""
    c = config.data
    data = load_dataset(c.data_set, c.data_path, size, c.val_split, c.data_seed, c.download, c.skip_bad_images, log,
                        c.data_loading, device, c.data_name)
    for note in data.notes:
        log(f"NOTE: {note}")
    val = "no validation split" if data.val is None else f"{len(data.val):,} val"
    log(f"data: {data.name}, {len(data.classes)} classes, {len(data.train):,} train, {val}, {len(data.test):,} test, "
        f"fingerprint {data.fingerprint[:12]}")
    return data


def build_model(config: Config, data: ImageData, device: torch.device, log: Log) -> VisionTransformer:
    """The model of a run, initialised from its seed or from --finetune; --resume brings its own weights later."""
    c = config.model
    torch.manual_seed(config.run.seed)
    model = _create(config, len(data.classes), data.train.images.shape[-1])
    if c.finetune is not None and config.run.resume is None:
        weights = checkpoint.load_weights(c.finetune)
        if config.run.eval:
            _check_classes(c.finetune, weights, data)
        try:
            notes = load_weights(model, weights)
        except ValueError as error:
            raise CheckpointError(f"--finetune {c.finetune}: {error}") from error
        log(f"weights from {c.finetune}{''.join(f'; {note}' for note in notes)}")
    model.set_grad_checkpointing(config.run.grad_checkpointing)
    model.to(device)
    if config.run.channels_last:
        model.to(memory_format=torch.channels_last)
    log(f"model: {c.model}, tokens {model.tokens}, {sum(p.numel() for p in model.parameters()):,} parameters")
    return model


def _check_classes(path: str, weights: dict, data: ImageData) -> None:
    """Raises CheckpointError when the head to be evaluated is for another number of classes."""
    if "head.weight" in weights and len(weights["head.weight"]) != len(data.classes):
        raise CheckpointError(f"--eval: {path} has {len(weights['head.weight'])} classes, the data set {data.name} has "
                              f"{len(data.classes)}. Evaluate on the data that it was trained on.")


def build_loaders(config: Config, data: ImageData, device: torch.device) -> tuple[TrainLoader, dict[str, EvalLoader]]:
    """The training loader, and the evaluation loaders of "val" (where there is one) and "test"."""
    c, a = config.data, config.augmentation
    common = {"mean": data.mean, "std": data.std, "num_classes": len(data.classes), "device": device,
              "channels_last": config.run.channels_last}
    train = TrainLoader(data.train, build_recipe(a, data), batch_size=c.batch_size, data_seed=c.data_seed,
                        repeats=c.aug_repeats if c.repeated_aug else 1, smoothing=a.smoothing,
                        auto_augment=None if a.aa == "none" else a.aa, workers=c.workers, **common)
    return train, build_eval_loaders(config, data, device)


def build_eval_loaders(config: Config, data: ImageData, device: torch.device) -> dict[str, EvalLoader]:
    """The loaders of "val", where there is one, and "test"."""
    return {name: EvalLoader(split, data.mean, data.std, len(data.classes), config.data.eval_batch_size, device=device,
                             channels_last=config.run.channels_last, workers=config.data.workers)
            for name, split in (("val", data.val), ("test", data.test)) if split is not None}


def build_recipe(a: AugmentationConfig, data: ImageData) -> Recipe:
    """What the plan draws, from the settings; sets whose mirror images mean something else are never flipped."""
    height, width = data.train.images.shape[-2:]
    if a.padding_mode == "constant" and a.crop_pad > min(height, width):
        raise ConfigError(f"--crop-pad {a.crop_pad} is wider than the images of {min(height, width)} pixels, so that a "
                          "crop could miss them. Lower it, or raise --input-size.")
    rrc = a.train_crop_mode == "rrc" or (a.train_crop_mode == "auto" and max(height, width) > 32)
    return Recipe(crop_pad=0 if rrc else a.crop_pad, padding_mode=a.padding_mode, rrc=rrc, scale=a.scale, ratio=a.ratio,
                  interpolation=a.train_interpolation, hflip=a.hflip if data.flips else 0.0,
                  alternating_flip=a.alternating_flip, vflip=a.vflip if data.flips else 0.0, brightness=a.color_jitter,
                  contrast=a.color_jitter, saturation=a.color_jitter, hue=a.hue, grayscale=a.grayscale_prob,
                  reprob=a.reprob, remode=a.remode, recount=a.recount, mixup=a.mixup, cutmix=a.cutmix,
                  cutmix_minmax=a.cutmix_minmax, mixup_prob=a.mixup_prob, mixup_switch_prob=a.mixup_switch_prob,
                  mixup_mode=a.mixup_mode)


@dataclass(frozen=True)
class Serving:
    """Which backend serves each op of a step, and whether the model's dropout is drawn from a seed."""

    ops: dict[str, str]
    seeded: bool


def probe(config: Config, model: VisionTransformer, objective: Objective, train: TrainLoader,
          device: torch.device) -> Serving:
    """Tries one forward pass, without touching the random state.

    A seed makes dropout the same in every backend, at a price in plain PyTorch (30 times F.dropout): it is given only
    where native kernels draw all the masks.
    """
    block = model.blocks[0]
    drawing = ["linear_residual", "layernorm_mlp"] if block.drop else []
    drawing += ["attention"] if block.attn_drop else []
    with torch.random.fork_rng(), torch.no_grad(), autocast(device, config.run):
        with record() as loading:
            images, targets = next(train.epoch(0))
        for seed in (torch.zeros((), dtype=torch.int64, device=device), None) if drawing else (None,):
            with record() as ops:
                objective(images, model.train()(images, seed), targets)
            if seed is None or all(ops[op] != "reference" for op in drawing):
                return Serving({**loading, **ops}, seed is not None)
    raise AssertionError("unreachable: the pass without a seed returns")


def dropout_seed(seed: int, device: torch.device) -> torch.Tensor:
    """() int64: the run's seed in the high 32 bits, so that the batch number fits below it."""
    return torch.tensor(seed << 32, dtype=torch.uint64).view(torch.int64).to(device)
