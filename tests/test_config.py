"""The configuration: the pinned set of settings, who wins over whom, the presets, the round trip."""
from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deit_fast.errors import ConfigError
from deit_fast.training import config as c

# The contract with users and with saved config.yaml files. Change it on purpose only, and say so in the change log.
OPTIONS = {
    "data_set": "auto", "data_path": None, "data_name": None, "download": True, "input_size": None,
    "val_split": 0.1, "batch_size": 64,
    "eval_batch_size": 256, "data_loading": "auto", "workers": 2, "repeated_aug": False, "aug_repeats": 3,
    "skip_bad_images": False, "data_seed": 0,
    "aug": True, "train_crop_mode": "none", "scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3],
    "train_interpolation": "bicubic", "crop_pad": 0, "padding_mode": "constant", "hflip": 0.0,
    "alternating_flip": False, "vflip": 0.0, "color_jitter": 0.0, "hue": 0.0, "grayscale_prob": 0.0, "aa": "none",
    "reprob": 0.0, "remode": "pixel",
    "recount": 1, "mixup": 0.0, "cutmix": 0.0, "cutmix_minmax": None, "mixup_prob": 1.0, "mixup_switch_prob": 0.5,
    "mixup_mode": "batch", "mixup_off_epoch": 0, "smoothing": 0.0,
    "model": "deit_nano_distilled_patch4_32", "tokens": None, "drop": None, "attn_drop": 0.0, "drop_path": 0.0,
    "finetune": None, "model_ema": False, "model_ema_decay": 0.99996, "model_ema_warmup": False,
    "distillation_type": "soft", "distillation_alpha": 0.5, "distillation_tau": 3.0,
    "distillation_reduction": "batchmean", "teacher_model": "resnet50", "teacher_stem": "auto",
    "teacher_weights": "none", "teacher_path": None, "teacher_epochs": 10, "teacher_lr": 0.001,
    "teacher_batch_size": 128, "teacher_input_size": None, "teacher_cache": None, "teacher_logits": "auto",
    "epochs": 20, "opt": "adam", "lr": 1e-3, "unscale_lr": True, "sched": "constant", "warmup_epochs": 0.0,
    "warmup_lr": 1e-6, "min_lr": 1e-5, "decay_epochs": 30.0, "decay_rate": 0.1, "weight_decay": 0.0, "momentum": 0.9,
    "opt_eps": 1e-8, "opt_betas": None, "clip_grad": None, "grad_accum_steps": 1,
    "output_dir": "runs/deit", "seed": 0, "device": "auto", "fused": False, "amp": False, "amp_dtype": "bfloat16",
    "torchcompile": False, "cuda_graphs": True, "channels_last": False, "grad_checkpointing": False, "deterministic": False,
    "resume": None, "eval": False, "eval_metric": "top1", "log_interval": 50, "checkpoint_interval": 0,
}
ALIASES = {"data_set": ("--dataset",), "data_path": ("--data-dir",), "input_size": ("--img-size",),
           "batch_size": ("-b",), "workers": ("-j", "--num-workers")}
CHOICES = {
    "data_set": "auto cifar10 cifar100 folder digits", "data_loading": "auto resident stream",
    "remode": "pixel rand const", "mixup_mode": "batch pair elem",
    "tokens": "cls cls+cls cls+dist", "distillation_type": "none soft hard", "teacher_stem": "auto imagenet cifar",
    "distillation_reduction": "batchmean numel", "teacher_weights": "none DEFAULT", "opt": "adam adamw sgd",
    "sched": "constant cosine step", "teacher_logits": "auto online stored", "amp_dtype": "bfloat16 float16",
    "eval_metric": "top1 top5 auc f1 precision recall loss", "train_crop_mode": "none rrc auto",
    "train_interpolation": "bilinear bicubic random", "padding_mode": "constant reflect",
}
TEXTS = {"data_path": "/d", "data_name": "Digits (JPEG copy)", "aa": "rand-m9-mstd0.5-inc1",
         "model": "deit_tiny_distilled_patch4_32",
         "finetune": "w.pt", "teacher_model": "resnet18", "teacher_path": "t.pt", "teacher_cache": "/c",
         "output_dir": "runs/x", "device": "cuda:1", "resume": "auto"}


def flat(config):
    return {k: v for k, v in c.to_dict(config).items() if k != "preset"}


def sample(s):
    """A valid value of the setting that is not its default."""
    if s.kind is bool:
        return not s.default
    if s.choices:
        return s.choices[0] if s.choices[0] != s.default else s.choices[1]
    if s.length:
        return (0.25, 0.75)
    if s.kind is str:
        return TEXTS[s.name]
    return 7 if s.kind is int else 0.25


def context(s):
    """Settings without which the sample of this one is a contradiction."""
    wanted = {"data_set": {"data_path": "/d"}, "eval": {"resume": "last.pt"}, "tokens": {"distillation_type": "none"}}
    return wanted.get(s.name, {})


def written(value):
    return [str(v) for v in value] if isinstance(value, tuple) else [str(value)]


EVERY = pytest.mark.parametrize("s", c.SETTINGS.values(), ids=lambda s: s.name)


# The set of settings

def test_options_and_defaults_are_the_contract():
    assert flat(c.parse([])) == OPTIONS
    assert list(c.SETTINGS) == list(OPTIONS)
    assert c.parse([]) == c.Config() and c.Config().preset is None


def test_aliases_and_choices_are_the_contract():
    assert {s.name: s.flags for s in c.SETTINGS.values() if s.flags} == ALIASES
    assert {s.name: " ".join(s.choices) for s in c.SETTINGS.values() if s.choices} == CHOICES


@EVERY
def test_flag_yaml_and_python_agree(s, tmp_path):
    """One value, given in every way, arrives as the same value in the same field."""
    value, extra = sample(s), context(s)
    extra_words = [w for k, v in extra.items() for w in (c.SETTINGS[k].flag, v)]
    spellings = [s.flag, "--" + s.name, *s.flags]
    if s.kind is bool:
        lines = [[("--" if value else "--no-") + spelling[2:]] for spelling in spellings]
    else:
        lines = [[spelling, *written(value)] for spelling in spellings]
        if not s.length:
            lines.append([f"--{s.name}={value}"])
    expected = OPTIONS | extra | {s.name: list(value) if isinstance(value, tuple) else value}
    for words in lines:
        config = c.parse(words + extra_words)
        assert flat(config) == expected, words
        assert config.explicit == {s.name, *extra}
    file = tmp_path / "run.yaml"
    for key in (*s.keys, s.name.replace("_", "-")):
        file.write_text(yaml.safe_dump({key: expected[s.name], **extra}))
        assert flat(c.parse(["-c", str(file)])) == expected, key
    part = next(f for f in dataclasses.fields(c.Config) if hasattr(getattr(c.Config(), f.name), s.name)).name
    direct = type(getattr(c.Config(), part))(**{s.name: value})
    assert getattr(direct, s.name) == value and type(getattr(direct, s.name)) is type(value)


@pytest.mark.parametrize("name", [s.name for s in c.SETTINGS.values() if s.kind is bool and s.name != "eval"])
def test_every_switch_has_both_forms(name):
    dashed = name.replace("_", "-")
    assert flat(c.parse([f"--no-{dashed}", f"--{dashed}"]))[name] is True
    assert flat(c.parse([f"--{name}", f"--no_{name}"]))[name] is False


@EVERY
def test_none_unsets_what_may_be_unset(s):
    if s.optional:
        words = [s.flag, *written(sample(s)), s.flag, "none", "--distillation-type", "none"]
        assert flat(c.parse(words))[s.name] is None
    elif s.kind is not bool and "none" not in s.choices and s.name != "aa" and not (
            s.kind is str and not s.choices and not s.pattern):
        with pytest.raises(ConfigError, match=s.flag):
            c.parse([s.flag, "none"])


def test_resume_alone_means_auto():
    assert c.parse(["--resume", "--fused"]).run.resume == "auto"


def test_names_may_be_written_in_capitals_as_deit_does():
    assert c.parse(["--data-set", "CIFAR10"]).data.data_set == "cifar10"
    assert c.parse(["--teacher-weights", "default"]).distillation.teacher_weights == "DEFAULT"


# Who wins

def test_flags_win_over_the_file_over_the_preset_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("batch_size: 32\nlr: 0.5\n")
    config = c.parse(["--lr", "0.25", "--preset", "deit-paper", "-c", str(file)])
    assert config.optim.lr == 0.25  # preset, file and flag name it
    assert config.data.batch_size == 32  # preset and file
    assert config.optim.sched == "cosine"  # the preset alone
    assert config.optim.grad_accum_steps == 1  # nobody
    assert config.preset == "deit-paper"
    assert config.explicit == {"lr", "batch_size"}


def test_a_file_names_its_preset_and_a_flag_replaces_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: report-vit\nepochs: 3\n")
    config = c.parse(["--config", str(file)])
    assert (config.preset, config.model.model, config.optim.epochs) == ("report-vit", "vit_nano_patch4_32", 3)
    assert c.parse(["--config", str(file), "--preset", "report-deit"]).model.model == OPTIONS["model"]


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "run.yaml").write_text("# nothing\n")
    assert c.parse(["-c", str(tmp_path / "run.yaml")]) == c.Config()


def test_a_number_without_a_dot_is_a_number(tmp_path):
    (tmp_path / "run.yaml").write_text("lr: 1e-4\nepochs: 20.0\nclip_grad: 1\n")  # YAML 1.1: the first is text
    config = c.parse(["-c", str(tmp_path / "run.yaml")])
    assert config.optim.lr == 1e-4 and config.optim.epochs == 20 and type(config.optim.epochs) is int
    assert type(config.optim.clip_grad) is float


# Round trip

@pytest.mark.parametrize("argv", [
    [], ["--no-aug", "--preset", "report-deit-aug"],
    ["--cutmix-minmax", "0.2", "0.8", "--opt-betas", "0.9", "0.98", "--lr", "3e-7", "--output-dir", "no", "--resume"],
    *(["--preset", p, "--seed", "5"] for p in c.PRESETS)])
def test_a_written_config_is_the_same_run(argv, tmp_path):
    config = c.parse(argv)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(c.to_dict(config), sort_keys=False))
    again = c.parse(["-c", str(file)])
    assert again == config
    assert c.to_dict(c.from_dict(c.to_dict(config))) == c.to_dict(config)
    assert set(c.warnings(again)) <= set(c.warnings(config))


def test_explicit_takes_no_part_in_comparison_or_files():
    assert c.parse(["--epochs", "20"]) == c.parse([])
    assert "explicit" not in c.to_dict(c.parse(["--epochs", "20"]))


def test_the_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.Config().optim.lr = 1.0


# Presets

def test_presets_are_valid_and_say_nothing_in_vain():
    assert list(c.PRESETS) == ["report-vit", "report-deit", "report-deit-aug", "deit-paper"]
    for name in c.PRESETS:
        assert c.warnings(c.parse(["--preset", name])) == []


def test_report_deit_is_the_default():
    assert flat(c.parse(["--preset", "report-deit"])) == OPTIONS


def test_report_vit_differs_in_model_and_teacher_only():
    changed = {k: v for k, v in flat(c.parse(["--preset", "report-vit"])).items() if v != OPTIONS[k]}
    assert changed == {"model": "vit_nano_patch4_32", "distillation_type": "none"}


def test_report_deit_aug_changes_only_augmentation_and_uses_all_of_the_report():
    config = c.parse(["--preset", "report-deit-aug"])
    assert dataclasses.replace(config, augmentation=c.AugmentationConfig(), preset=None) == c.Config()
    aug = config.augmentation
    assert aug.crop_pad == 4 and aug.hflip == 0.5 and aug.mixup_mode == "elem" and 0 < aug.mixup_prob < 0.5
    assert min(aug.color_jitter, aug.reprob, aug.mixup, aug.cutmix) > 0


def test_deit_paper_is_table_9():
    table = dict(
        epochs=300, batch_size=1024, grad_accum_steps=1, opt="adamw", lr=5e-4, unscale_lr=False, sched="cosine",
        warmup_epochs=5.0, warmup_lr=1e-6, min_lr=1e-5, weight_decay=0.05, drop=0.0, attn_drop=0.0, drop_path=0.1,
        smoothing=0.1, clip_grad=None, repeated_aug=True, aug_repeats=3, aa="rand-m9-mstd0.5-inc1", color_jitter=0.0,
        mixup=0.8, cutmix=1.0, cutmix_minmax=None, mixup_prob=1.0, mixup_switch_prob=0.5, mixup_mode="batch",
        reprob=0.25, remode="pixel", recount=1, distillation_type="hard", distillation_alpha=0.5, model_ema=True,
        model_ema_decay=0.99996, train_crop_mode="auto", scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3],
        train_interpolation="bicubic")
    got = flat(c.parse(["--preset", "deit-paper"]))
    assert {k: got[k] for k in table} == table


def test_model_and_teacher_names_exist_and_tell_the_distillation_token():
    torchvision = pytest.importorskip("torchvision")
    from deit_fast.models.presets import PRESETS as MODELS
    for name, shape in MODELS.items():
        assert c.ModelConfig(model=name).distilled == (shape.get("tokens") == "cls+dist"), name
    for preset in [None, *c.PRESETS]:
        config = c.Config() if preset is None else c.parse(["--preset", preset])
        assert config.model.model in MODELS
        assert config.distillation.teacher_model in torchvision.models.list_models()


# No augmentation

def test_no_aug_stores_what_is_applied():
    config = c.parse(["--preset", "deit-paper", "--no-aug", "--hflip", "0.5"])
    assert config.augmentation == c.AugmentationConfig(aug=False)
    written_down = c.to_dict(config)
    assert written_down["aug"] is False
    for name in ("crop_pad", "hflip", "aa", "reprob", "mixup", "cutmix", "smoothing", "repeated_aug"):
        assert written_down[name] == OPTIONS[name], name
    assert c.warnings(config) == ["--hflip has no effect: --no-aug turns all augmentation off."]
    assert c.Config(data=c.DataConfig(repeated_aug=True),
                    augmentation=c.AugmentationConfig(aug=False)).data.repeated_aug is False


# Help

def test_help_shows_every_flag_with_its_default_and_exits_with_0(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as stop:
        c.parse(["--help"])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    for title in ("Data:", "Augmentation:", "Model:", "Distillation and teacher:", "Optimisation:", "Run:"):
        assert f"\n{title}\n" in page
    for s in c.SETTINGS.values():
        name = "--[no-]" + s.flag[2:] if s.kind is bool else s.flag
        assert name + " " in page or name + "," in page, s.name
    assert "default 0.001]" in page and "default off]" in page and "{none,soft,hard}" in page
    assert all(preset in page for preset in c.PRESETS)


def test_the_configuration_imports_no_torch():
    """The package's own face, which imports the ops, is left out, so that only these modules are judged."""
    root = Path(c.__file__).parents[1]
    code = ("import sys, types; p = types.ModuleType('deit_fast'); p.__path__ = [sys.argv[1]]; "
            "sys.modules['deit_fast'] = p; import deit_fast.training.config as c; c.parse([]); "
            "assert not {'torch', 'numpy'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.returncode == 0, done.stderr
