"""What the configuration says to its user: each error names the flag or key and the way out; each warning is true."""
from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from deit_fast.errors import ConfigError, UserError
from deit_fast.training import config as c
from deit_fast.training import no_effect


@pytest.mark.parametrize("argv, words", [
    ("--epoch 3", "Unknown flag --epoch. Nearest: --epochs"),
    ("--learning_rate=3 --zzz", "--learning-rate ; --zzz"),
    ("--no-fuse", "Unknown flag --no-fuse. Nearest: --no-fused"),
    ("--distillation hard", "Unknown flag --distillation.;--distillation-t"),  # no abbreviations
    ("--preset deit-papr", "Unknown preset 'deit-papr'. Nearest: deit-paper"),
    ("--preset report_vit", "Nearest: report-vit"),
    ("--preset zzzzz", "Known: report-vit, report-deit, report-deit-aug, deit-paper"),
    ("--data-set CIFAR", "--data-set must be one of;Nearest: cifar10, cifar100"),
    ("--opt adamx", "--opt must be one of adam, adamw, sgd, got 'adamx'. Nearest: adam"),
    ("--tokens cls+dst", "--tokens;Nearest: cls+dist"),
    ("--epochs three", "--epochs must be a whole number, got 'three'"),
    ("--epochs 1.5", "--epochs must be a whole number"),
    ("--epochs 0", "--epochs must be >= 1, got 0"),
    ("--lr 0", "--lr must be > 0"), ("--lr -1", "--lr must be > 0, got -1.0"), ("--lr nan", "--lr must be a finite"),
    ("--lr inf", "--lr must be a finite number"), ("--lr 1e999", "--lr must be a finite number"),
    ("--lr", "--lr;expected one argument"), ("--lr=", "--lr must be a finite number, got ''"),
    ("--val-split 0.6", "--val-split must be in [0, 0.5], got 0.6"),
    ("--distillation-alpha 1.1", "--distillation-alpha must be in [0, 1]"),
    ("--distillation-tau 0", "--distillation-tau must be > 0"),
    ("--drop 1", "--drop must be in [0, 1)"), ("--smoothing 1", "--smoothing must be in [0, 1)"),
    ("--grad-accum-steps 0", "--grad-accum-steps must be >= 1"),
    ("--opt-betas 0.9 1", "--opt-betas must be in [0, 1), got 1.0"), ("--opt-betas 0.9", "--opt-betas takes 2 numbers"),
    ("--cutmix-minmax 0.8 0.2", "--cutmix-minmax needs the smaller number first"),
    ("--scale 0.5 0.1", "--scale needs the smaller number first"), ("--ratio 2 1", "--ratio needs the smaller number"),
    ("--cutmix-minmax 0 0.2", "--cutmix-minmax must be in (0, 1]"),
    ("--cutmix-minmax 0.1 0.2 0.3", "--cutmix-minmax takes 2 numbers"),
    ("--amp-dtype fp16", "--amp-dtype must be one of bfloat16, float16;Nearest: float16"),
    ("--aa augmix", "--aa does not understand 'augmix';ta_wide"), ("--device gpu", "--device does not understand"),
    ("--seed -1", "--seed must be in [0, "), ("--seed 4294967296", "--seed must be in [0, "),
    ("--amp true", "Unexpected argument 'true';--no-x off"), ("--amp=true", "--amp;--help"),
    ("--output-dir=", "--output-dir must be text"),
    ("--model vit_nano_patch4_32", "--distillation-type soft needs;--model vit_nano_patch4_32 has none;"
     "--tokens cls+dist;--distillation-type none"),
    ("--tokens cls+cls", "needs a distillation token;--tokens cls+cls has none"),
    ("--data-set folder", "--data-set folder needs --data-path"),
    ("--eval", "--eval needs;--resume PATH or --finetune PATH"),
    ("-c missing.yaml", "Cannot read the configuration missing.yaml: No such file"), ("-c /", "Is a directory"),
])
def test_a_wrong_command_line_is_named_and_mended(argv, words):
    with pytest.raises(ConfigError) as error:
        c.parse(argv.split())
    assert isinstance(error.value, UserError)
    for part in words.split(";"):
        assert part.strip() in str(error.value)


@pytest.mark.parametrize("text, words", [
    ("epoch: 3", "unknown key 'epoch'. Nearest: epochs"),
    ("optim: {lr: 1}", "unknown key 'optim'. Keys are flat"),
    ("3: 4", "unknown key 3"),
    ("explicit: [lr]", "unknown key 'explicit'"),
    ("lr: fast", "run.yaml: lr must be a finite number, got 'fast'"),
    ("lr: true", "run.yaml: lr must be a finite number"), ("lr: [1]", "lr must be a finite number"),
    ("lr: null", "lr must be a finite number, got None"), ("lr: .nan", "lr must be a finite number"),
    ("epochs: 1" + "0" * 400, "epochs must be a whole number"), ("lr: 1" + "0" * 400, "lr must be a finite number"),
    ("epochs: 2.5", "epochs must be a whole number, got 2.5"), ("epochs: true", "epochs must be a whole number"),
    ("amp: 1", "amp must be true or false, got 1"), ("amp: 'yes'", "amp must be true or false, got 'yes'"),
    ("aa: no", "aa must be text (in YAML: in quotes), got False"), ("output_dir: 2024", "output_dir must be text"),
    ("opt_betas: 0.9", "opt_betas takes 2 numbers"), ("opt_betas: '0.9'", "opt_betas takes 2 numbers"),
    ("img_size: 32\ninput-size: 32", "is given twice (--input-size has the keys input_size, img_size)"),
    ("preset: nope", "Unknown preset 'nope'"), ("preset: [a]", "Unknown preset ['a']"),
    ("- lr", "must hold `key: value` lines, found a list"), ("lr: [", "run.yaml is not valid YAML"),
    ("lr: 2024-99-99", "run.yaml is not valid YAML"),
    ("opt: sgd\nval_split: 0.9", "val_split must be in"),
])
def test_a_wrong_file_is_named_and_mended(text, words, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        c.parse(["-c", str(tmp_path / "run.yaml")])
    assert words in str(error.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00lr")
    with pytest.raises(ConfigError, match="not valid YAML"):
        c.parse(["-c", str(tmp_path / "run.yaml")])


def test_python_callers_get_the_same_checks():
    with pytest.raises(ConfigError, match="--lr must be > 0"):
        c.OptimConfig(lr=0)
    with pytest.raises(ConfigError, match="--lr must be > 0"):
        dataclasses.replace(c.Config().optim, lr=-1.0)
    with pytest.raises(ConfigError, match="needs a distillation token"):
        dataclasses.replace(c.Config(), model=c.ModelConfig(model="vit_nano_patch4_32"))
    with pytest.raises(ConfigError, match="Unknown preset"):
        c.Config(preset="nope")
    with pytest.raises(ConfigError, match="configuration: unknown key 'epoch'. Nearest: epochs"):
        c.from_dict({"epoch": 1})
    assert c.OptimConfig(opt_betas=[0.9, 0.98]).opt_betas == (0.9, 0.98)
    assert c.RunConfig(output_dir=Path("a/b")).output_dir == "a/b"


# Warnings

@pytest.mark.parametrize("argv, flags, remedy", [
    ("--preset report-vit --teacher-epochs 10 --distillation-alpha 0.5", "distillation-alpha teacher-epochs",
     "--preset report-deit"),
    ("--distillation-type hard --distillation-tau 2", "distillation-tau", "--distillation-type soft"),
    ("--distillation-type hard --distillation-reduction numel", "distillation-reduction", "--distillation-type soft"),
    ("--teacher-path t.pt --teacher-lr 0.2", "teacher-lr", "--teacher-path none"),
    ("--momentum 0.9", "momentum", "--opt sgd"), ("--opt sgd --opt-betas 0.9 0.98", "opt-betas", "--opt adam"),
    ("--warmup-lr 1e-5", "warmup-lr", "--warmup-epochs 2"), ("--min-lr 1e-6", "min-lr", "--sched cosine"),
    ("--decay-epochs 3 --decay-rate 0.5", "decay-epochs decay-rate", "--sched step"),
    ("--model-ema-decay 0.9", "model-ema-decay", "--model-ema"),
    ("--model-ema-warmup", "model-ema-warmup", "--model-ema"),
    ("--mixup-mode elem --mixup-prob 0.5", "mixup-prob mixup-mode", "--mixup 0.2"),
    ("--mixup 0.2 --mixup-switch-prob 0.1", "mixup-switch-prob", "--cutmix 1"),
    ("--cutmix 0.5 --cutmix-minmax 0.2 0.8", "cutmix", "--cutmix-minmax none"),
    ("--mixup 0.2 --mixup-off-epoch 20", "mixup-off-epoch", "--epochs 21"),
    ("--remode const --recount 2", "remode recount", "--reprob 0.1"),
    ("--aug-repeats 2", "aug-repeats", "--repeated-aug"),
    ("--amp-dtype float16", "amp-dtype", "--amp"),
    ("--data-set digits --data-path /d", "data-path", "--data-set cifar10"),
    ("--data-set digits --hflip 0.5", "hflip", "--data-set cifar10"),
    ("--data-set digits --vflip 0.5", "vflip", "--data-set cifar10"),
    ("--scale 0.3 1 --train-interpolation bilinear", "scale train-interpolation", "--train-crop-mode rrc"),
    ("--train-crop-mode rrc --crop-pad 4", "crop-pad", "--train-crop-mode auto"),
    ("--padding-mode reflect", "padding-mode", "--crop-pad 4"),
    ("--alternating-flip", "alternating-flip", "--hflip 0.5"),
    ("--skip-bad-images", "skip-bad-images", "--data-set folder --data-path /d"),
    ("--data-set folder --data-path /d --no-download", "download", "--data-set auto"),
    ("--resume a.pt --finetune b.pt", "finetune", "--resume auto"),
    ("--val-split 0 --eval-metric auc", "eval-metric", "--val-split 0.1"),
    ("--workers 4", "workers", "--data-set folder --data-path /d"),
    ("--workers 4 --data-set folder --data-path /d --data-loading resident", "workers", "--data-loading stream"),
    ("--workers 4 --data-loading stream", "workers", "--aa ra"),
    ("--mixup-prob 0.5", "mixup-prob", "--cutmix-minmax 0.2 0.8"),
    ("--no-aug --mixup-prob 0.5", "mixup-prob", "--aug --mixup 0.2"),
])
def test_a_flag_without_effect_is_named_until_it_has_one(argv, flags, remedy):
    lines = c.warnings(c.parse(argv.split()))
    assert [line.split(" has no effect: ")[0] for line in lines] == ["--" + f for f in flags.split()]
    assert c.warnings(c.parse(f"{argv} {remedy}".split())) == []


@pytest.mark.parametrize("argv, words, calm", [
    ("--preset deit-paper --color-jitter 0.3", "on top of --aa rand-m9-mstd0.5-inc1", "--aa none"),
    ("--distillation-type none", "nothing trains its head", "--tokens cls"),
    ("--preset deit-paper --epochs 4", "--lr is never reached", "--warmup-epochs 1"),
    ("--sched cosine --lr 1e-6", "The cosine rises", "--min-lr 0"),
])
def test_a_surprise_is_told(argv, words, calm):
    lines = c.warnings(c.parse(argv.split()))
    assert len(lines) == 1 and words in lines[0]
    assert c.warnings(c.parse(f"{argv} {calm}".split())) == []


def test_only_what_someone_gave_is_warned_about(tmp_path):
    """The same idle value warns from a flag and from a file that sets it, never from a preset or by default."""
    assert c.warnings(c.parse([])) == []
    (tmp_path / "run.yaml").write_text("momentum: 0.8\n")
    assert len(c.warnings(c.parse(["-c", str(tmp_path / "run.yaml")]))) == 1
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(c.to_dict(c.parse([]))))
    assert c.warnings(c.parse(["-c", str(tmp_path / "run.yaml")])) == []
    hard = c.parse(["--preset", "deit-paper", "--model", "vit_nano_patch4_32", "--distillation-type", "none"])
    assert c.warnings(hard) == []


def test_every_rule_names_settings_that_exist():
    for rules in (no_effect._without_effect, no_effect._surprising):
        for _, names, _ in rules(c.Config()):
            assert set(names.split()) <= set(c.SETTINGS)
