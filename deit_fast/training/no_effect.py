"""Settings that do nothing, or not what they seem to, beside the others: said aloud instead of ignored in silence.

DeiT's code drops --color-jitter when --aa is set, repeated augmentation on one GPU, and more, without a word; people
then tune a flag that is off. Only settings that somebody gave are named (`Config.explicit`): a preset may carry a
temperature for soft distillation beside hard distillation without being nagged about it.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import Config

_TEACHER = "teacher_model teacher_stem teacher_weights teacher_path teacher_epochs teacher_lr teacher_batch_size " \
           "teacher_input_size teacher_cache teacher_logits"
_MIXING = "mixup_prob mixup_switch_prob mixup_mode mixup_off_epoch"
_RESIZING = "scale ratio train_interpolation"
_AUGMENTATION = "train_crop_mode crop_pad padding_mode hflip alternating_flip vflip color_jitter hue grayscale_prob " \
                "aa reprob remode recount mixup cutmix cutmix_minmax smoothing repeated_aug aug_repeats " \
                f"{_RESIZING} {_MIXING}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _without_effect(config: Config) -> list[tuple[bool, str, str]]:
    """Rows (condition, settings without effect under it, reason); the first that holds for a setting counts."""
    data, aug, model = config.data, config.augmentation, config.model
    dist, optim, run = config.distillation, config.optim, config.run
    may_stream = data.data_set == "folder" and data.data_loading != "resident"
    both = aug.mixup > 0 and (aug.cutmix > 0 or aug.cutmix_minmax is not None)
    return [
        (not aug.aug, _AUGMENTATION, "--no-aug turns all augmentation off"),
        (aug.train_crop_mode == "none", _RESIZING, "only --train-crop-mode rrc resizes"),
        (aug.train_crop_mode == "rrc", "crop_pad padding_mode", "--train-crop-mode rrc crops otherwise"),
        (aug.crop_pad == 0, "padding_mode", "--crop-pad is 0"),
        (aug.hflip == 0, "alternating_flip", "--hflip is 0"),
        (not aug.mixes, _MIXING, "neither --mixup nor --cutmix is on"),
        (not both, "mixup_switch_prob", "it chooses between --mixup and --cutmix, and only one of them is on"),
        (aug.cutmix_minmax is not None, "cutmix", "--cutmix-minmax draws the box instead"),
        (aug.mixup_off_epoch >= optim.epochs, "mixup_off_epoch", f"the run has only {optim.epochs} epochs"),
        (aug.reprob == 0, "remode recount", "--reprob is 0"),
        (data.data_set == "digits", "hflip vflip alternating_flip",
         "mirrored digits are not digits, so they are never flipped"),
        (aug.aa == "none" and not may_stream, "workers",
         "the images are augmented on the device itself; only --aa and streamed files need processes"),
        (not data.repeated_aug, "aug_repeats", "--repeated-aug is off"),
        (data.data_set == "digits", "data_path download", "the digits come with scikit-learn"),
        (data.data_set == "folder", "download", "--data-set folder reads --data-path"),
        (data.data_set != "folder", "skip_bad_images", "it is for --data-set folder"),
        (dist.distillation_type == "none", "distillation_alpha distillation_tau distillation_reduction " + _TEACHER,
         "--distillation-type none has no teacher"),
        (dist.distillation_type == "hard", "distillation_tau distillation_reduction",
         "hard distillation learns the teacher's decision, without temperature or KL divergence"),
        (dist.teacher_path is not None, "teacher_weights teacher_epochs teacher_lr teacher_batch_size teacher_cache",
         "the teacher of --teacher-path is trained already"),
        (not model.model_ema, "model_ema_decay model_ema_warmup", "--model-ema is off"),
        (run.resume not in (None, "auto"), "finetune", "--resume brings the weights"),
        (optim.warmup_epochs == 0, "warmup_lr", "--warmup-epochs is 0"),
        (optim.sched != "cosine", "min_lr", f"only --sched cosine ends there (here: {optim.sched})"),
        (optim.sched != "step", "decay_epochs decay_rate", f"only --sched step uses it (here: {optim.sched})"),
        (optim.opt != "sgd", "momentum", f"only --opt sgd uses it (here: {optim.opt})"),
        (optim.opt == "sgd", "opt_betas opt_eps", "only --opt adam and adamw use it (here: sgd)"),
        (not run.amp, "amp_dtype", "--amp is off"),
        (data.val_split == 0, "eval_metric", "with --val-split 0 nothing chooses an epoch: the last one counts"),
    ]


def _surprising(config: Config) -> list[tuple[bool, str, str]]:
    """Rows (condition, settings that bring it about, sentence)."""
    aug, model, optim = config.augmentation, config.model, config.optim
    untaught = config.distillation.distillation_type == "none" and model.distilled
    return [
        (aug.aa != "none" and aug.color_jitter > 0, "aa color_jitter",
         f"--color-jitter {aug.color_jitter} is applied on top of --aa {aug.aa}; the code of DeiT would drop it."),
        (untaught, "distillation_type model tokens",
         f"--model {model.model} has a distillation token, but with --distillation-type none nothing trains its head, "
         "which evaluation averages in. Choose a model without it, or --tokens cls."),
        (optim.warmup_epochs >= optim.epochs, "warmup_epochs epochs",
         f"--warmup-epochs {optim.warmup_epochs:g} takes up all {optim.epochs} epochs: --lr is never reached."),
        (optim.sched == "cosine" and optim.unscale_lr and optim.min_lr > optim.lr, "lr min_lr sched",
         f"The cosine rises: --min-lr {optim.min_lr:g} is above --lr {optim.lr:g}."),
    ]


def warnings(config: Config) -> list[str]:
    """One sentence for each explicit setting that has no effect, or another than its name suggests."""
    lines: dict[str, str] = {}
    for holds, names, reason in _without_effect(config):
        for name in names.split():
            if holds and name in config.explicit:
                lines.setdefault(name, f"{_flag(name)} has no effect: {reason}.")
    surprises = [text for holds, names, text in _surprising(config) if holds and config.explicit & set(names.split())]
    return list(lines.values()) + surprises
