"""Optimizer, learning-rate schedule and weight averaging.

Weight decay pulls weights towards zero; biases, LayerNorm gains and the learned tokens and positions are no weights in
that sense, so they are left out: every parameter of at most one dimension, every `.bias`, and what the model's
`no_weight_decay()` names (cls_token, dist_token, pos_embed). DeiT's released code decays dist_token, an oversight of
the old timm that it pins; here it is not decayed. `adamw` decays apart from the gradient (w -= lr wd w), `adam` and
`sgd` add wd w to it; the report's recipe is `adam` with decay 0, where the groups make no difference.

The learning rate is a pure function of the optimizer step, so a resumed run has no schedule to restore. (DeiT steps
its scheduler per epoch and one call late: its epochs 0 and 1 both run at warmup_lr, min_lr is never reached, and a
resumed run is one epoch ahead.) With steps s = 0 ... S-1, W of them warmup, and base LR L:
    s < W      warmup_lr + (L - warmup_lr) s / W
    constant   L
    cosine     min_lr + (L - min_lr) (1 + cos(pi (s - W) / (S - 1 - W))) / 2      so min_lr at the last step
    step       L decay_rate^floor(epoch / decay_epochs)                           epoch counts the warmup

On a GPU the whole step is one CUDA graph, in which a Python number is frozen at capture. So the LR is a 0-dim tensor in
the parameter groups, and the averaging weight a 0-dim tensor of ModelEma.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deit_fast.errors import CheckpointError
from deit_fast.training.checkpoint import clean_name

if TYPE_CHECKING:
    from deit_fast.training.config import OptimConfig

SCHEDULES = ("constant", "cosine", "step")


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model inside torch.compile's and DistributedDataParallel's wrappers, in any order."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Returns the trainable parameters as groups `{"params", "weight_decay"}`: decayed ones, then the others."""
    model = unwrap(model)
    listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    skipped = {clean_name(name) for name in listed}
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = clean_name(name)
        plain = parameter.ndim <= 1 or name.endswith(".bias") or name in skipped
        (others if plain else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def create_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """Returns Adam, AdamW or SGD (Nesterov) over `parameter_groups`, fused where torch has it (CPU and CUDA).

    The LR is a 0-dim tensor, on CUDA on the device in fp32 as its kernels want it; set it with `set_lr`.
    """
    groups = parameter_groups(model, cfg.weight_decay)
    if not groups:
        raise ValueError("create_optimizer: the model has no trainable parameters; unfreeze some")
    device = groups[0]["params"][0].device
    options = {
        "lr": torch.tensor(cfg.lr, dtype=torch.float32 if device.type == "cuda" else torch.float64, device=device),
        "fused": True if device.type in ("cpu", "cuda") else None,
    }
    if cfg.opt == "sgd":
        return torch.optim.SGD(groups, momentum=cfg.momentum, nesterov=cfg.momentum > 0, **options)
    optimizers = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    if cfg.opt not in optimizers:
        raise ValueError(f"create_optimizer: opt must be adam, adamw or sgd, got {cfg.opt!r}")
    betas = (0.9, 0.999) if cfg.opt_betas is None else tuple(cfg.opt_betas)
    return optimizers[cfg.opt](groups, betas=betas, eps=cfg.opt_eps, **options)


def set_lr(optimizer: torch.optim.Optimizer, lr: float | Tensor) -> None:
    """Sets the LR of every group, in place; lr: a number or () on the device."""
    for group in optimizer.param_groups:
        group["lr"].fill_(lr)


@contextmanager
def capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Lets `optimizer.step()` be captured in a CUDA graph inside; warmup steps must have made its state before.

    torch warns when a capturable optimizer steps outside a graph, and the flag would get into checkpoints, so it is set
    for the capture alone. With the fused kernels nothing else depends on it: their step counts are on the device
    anyway.
    """
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping) -> None:
    """Loads moments, step counts and the last step's LR; all settings stay those of `optimizer`.

    Before the next step the LR is set anyway, but a run that was killed behind its last step takes none any more, and its
    checkpoint is to be that of an undisturbed one.

    torch's own load_state_dict also takes over LR object, `fused` and `capturable`: a checkpoint of a CPU run would
    then make a run on a GPU uncapturable.
    """
    groups, saved = optimizer.param_groups, state["param_groups"]
    sizes = [len(group["params"]) for group in groups], [len(group["params"]) for group in saved]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"the checkpoint's optimizer has parameter groups of sizes {sizes[1]}, this run's has {sizes[0]}. "
            "Resume with the model and optimizer settings of the checkpoint."
        )
    kept = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    optimizer.load_state_dict(
        {"state": state["state"], "param_groups": [{**ours, "params": theirs["params"]}
                                                   for ours, theirs in zip(kept, saved, strict=True)]}
    )
    for group, ours, theirs in zip(optimizer.param_groups, kept, saved, strict=True):
        group.update(ours)  # the very LR tensor, not torch's copy of it
        group["lr"].fill_(theirs["lr"])


class Schedule:
    """The learning rate of every optimizer step, numbered from 0 over the whole run.

    steps_per_epoch counts optimizer steps: with accumulation, batches // grad_accum_steps. Without `unscale_lr` the LR
    is lr x batch x accumulation / 512, DeiT's rule; like DeiT it scales lr only, neither warmup_lr nor min_lr.
    """

    def __init__(self, cfg: OptimConfig, steps_per_epoch: int, batch_size: int) -> None:
        if cfg.sched not in SCHEDULES:
            raise ValueError(f"Schedule: sched must be one of {', '.join(SCHEDULES)}, got {cfg.sched!r}")
        if steps_per_epoch < 1:
            raise ValueError(f"Schedule: steps_per_epoch must be at least 1, got {steps_per_epoch}")
        self.cfg = cfg
        self.steps_per_epoch = steps_per_epoch
        self.batch_size = batch_size
        self.total_steps = cfg.epochs * steps_per_epoch
        self.warmup_steps = round(cfg.warmup_epochs * steps_per_epoch)
        scale = 1.0 if cfg.unscale_lr else batch_size * cfg.grad_accum_steps / 512
        self.effective_lr = cfg.lr * scale

    def lr(self, step: int) -> float:
        """Returns the LR of optimizer step `step`; after the last step it stays what it was there."""
        cfg, base, warmup = self.cfg, self.effective_lr, self.warmup_steps
        step = min(step, self.total_steps - 1)
        if step < warmup:
            return cfg.warmup_lr + (base - cfg.warmup_lr) * step / warmup
        if cfg.sched == "cosine":
            done = (step - warmup) / max(1, self.total_steps - 1 - warmup)
            return cfg.min_lr + (base - cfg.min_lr) * (1 + math.cos(math.pi * done)) / 2
        if cfg.sched == "step":
            # The small term: 1.1 * 390 is 429.00000000000006 in binary.
            return base * cfg.decay_rate ** math.floor(step / (cfg.decay_epochs * self.steps_per_epoch) + 1e-9)
        return base

    def describe(self) -> str:
        """Returns one line for the log: the effective LR and how it changes."""
        cfg = self.cfg
        text = f"learning rate {self.effective_lr:.6g}"
        if not cfg.unscale_lr:
            text += f" ({cfg.lr:g} x batch {self.batch_size} x accumulation {cfg.grad_accum_steps} / 512)"
        shape = {
            "constant": "constant",
            "cosine": f"cosine to {cfg.min_lr:g}",
            "step": f"x {cfg.decay_rate:g} every {cfg.decay_epochs:g} epochs",
        }
        text += f", {shape[cfg.sched]}"
        if self.warmup_steps:
            text += f", linear warmup from {cfg.warmup_lr:g} over {self.warmup_steps} steps"
        return f"{text}, {self.total_steps} optimizer steps"


class ModelEma:
    """An exponential moving average of a model: ema <- ema + (1 - decay)(model - ema) after every optimizer step.

    Parameters and floating-point buffers are averaged, integer buffers copied. The decay 0.99996 remembers about 25,000
    steps, more than a short CIFAR run has; with `warmup` the decay of update t = 0, 1, ... is min(decay, (1+t)/(10+t)),
    which starts as a short memory and lengthens. The count and the weight are tensors on the device and `update`
    runs no host code that depends on them, so a captured CUDA graph may contain it. `module` is in evaluation mode.
    """

    def __init__(self, model: nn.Module, decay: float = 0.99996, warmup: bool = False) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"ModelEma: decay must be in 0..1, got {decay}")
        self.module = copy.deepcopy(unwrap(model)).eval().requires_grad_(False)
        device = next(self.module.parameters()).device
        self.warmup = warmup
        self.decay = torch.tensor(decay, dtype=torch.float64, device=device)  # fill_ it to change it, captured or not
        self.updates = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards `model`, which may be compiled or wrapped."""
        live = dict(_tensors(unwrap(model)))
        pairs = [(ours, live[name]) for name, ours in _tensors(self.module)]
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        decay = torch.minimum(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        ours, theirs = [pair[0] for pair in averaged], [pair[1] for pair in averaged]
        # Not _foreach_lerp_: it takes its weight as a Python number, which a CUDA graph would freeze.
        change = torch._foreach_sub(theirs, ours)
        torch._foreach_mul_(change, (1 - decay).float())
        torch._foreach_add_(ours, change)
        for ours, theirs in pairs:
            if not ours.is_floating_point():
                ours.copy_(theirs)
        self.updates += 1

    def state_dict(self) -> dict:
        """Returns {"module": the averaged state dict, "updates": 0-dim tensor}."""
        return {"module": self.module.state_dict(), "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping) -> None:
        """Loads what `state_dict` returned, in place; decay and warmup stay those of this object."""
        self.module.load_state_dict({clean_name(name): value for name, value in state["module"].items()})
        self.updates.copy_(state["updates"])


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield clean_name(name), tensor
