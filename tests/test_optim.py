"""Parameter groups, schedule and weight averaging, against their written definitions."""

import types

import pytest
import torch
from torch import nn

from deit_fast.errors import CheckpointError
from deit_fast.training import checkpoint, optim
from needs import needs_gpu


def config(**changes):
    defaults = {
        "epochs": 20, "opt": "adam", "lr": 1e-3, "unscale_lr": True, "sched": "constant", "warmup_epochs": 0.0,
        "warmup_lr": 1e-6, "min_lr": 1e-5, "decay_epochs": 30.0, "decay_rate": 0.1, "weight_decay": 0.0,
        "momentum": 0.9, "opt_eps": 1e-8, "opt_betas": None, "clip_grad": None, "grad_accum_steps": 1,
    }
    return types.SimpleNamespace(**{**defaults, **changes})


class Model(nn.Module):
    """The parameters that matter of a distilled ViT, and buffers of both kinds (BatchNorm)."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 4))
        self.dist_token = nn.Parameter(torch.randn(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.randn(1, 6, 4))
        self.norm = nn.LayerNorm(4)
        self.bn = nn.BatchNorm1d(4)
        self.block = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.head = nn.Linear(4, 3)
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)

    def no_weight_decay(self):
        return {"cls_token", "dist_token", "pos_embed"}

    def forward(self, x):  # (B, 4)
        tokens = (self.cls_token + self.dist_token + self.pos_embed[:, :1])[:, 0]
        return self.head(self.block(self.norm(self.bn(x) + tokens)))


def names_by_decay(model, groups):
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["weight_decay"]: {by_id[id(parameter)] for parameter in group["params"]} for group in groups}


def train(model, optimizer, steps, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator).to(device)).square().mean().backward()
        optimizer.step()


class Wrapper(nn.Module):
    """Stands in for torch.compile's wrapper, which names its model `_orig_mod` and forwards attributes."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model

    def forward(self, x):
        return self._orig_mod(x)


def compiled_inside(model):
    model.block[0] = Wrapper(model.block[0])
    return model


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapper, torch.compile, compiled_inside],
                         ids=["bare", "wrapper", "compiled", "inside"])
def test_no_decay_on_vectors_biases_and_tokens(wrap):
    model = Model()
    groups = names_by_decay(model, optim.parameter_groups(wrap(model), 0.05))
    clean = {decay: {checkpoint.clean_name(name) for name in names} for decay, names in groups.items()}
    # A list by hand: only the three matrices are decayed, the frozen one is nowhere.
    assert clean[0.05] == {"block.0.weight", "block.2.weight", "head.weight"}
    assert {"cls_token", "dist_token", "pos_embed", "norm.weight", "bn.bias", "head.bias"} <= clean[0.0]
    assert sum(map(len, clean.values())) == len(list(model.parameters())) - 1


def test_no_decay_names_survive_compiled_parts():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Wrapper(Model())

        def no_weight_decay(self):
            return {"part.pos_embed"}

    model = Nested()
    groups = names_by_decay(model, optim.parameter_groups(model, 0.1))
    assert "part._orig_mod.pos_embed" in groups[0.0] and "part._orig_mod.cls_token" in groups[0.1]


def test_names():
    assert checkpoint.clean_name("module._orig_mod.blocks.0.fc.weight") == "blocks.0.fc.weight"
    assert checkpoint.clean_name("_orig_mod.module.head.bias") == "head.bias"
    assert checkpoint.clean_name("blocks.0._orig_mod.module.weight") == "blocks.0.module.weight"


class TestOptimizers:
    @pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
    def test_updates_as_the_unfused_optimizer(self, name):
        torch.manual_seed(0)
        model, other = Model(), Model()
        other.load_state_dict(model.state_dict())
        cfg = config(opt=name, lr=0.01, weight_decay=0.1, opt_betas=(0.8, 0.95), opt_eps=1e-6, momentum=0.7)
        optimizer = optim.create_optimizer(model, cfg)
        assert all(group["fused"] for group in optimizer.param_groups)
        groups = optim.parameter_groups(other, 0.1)
        if name == "sgd":
            plain = torch.optim.SGD(groups, lr=0.01, momentum=0.7, nesterov=True, foreach=False)
        else:
            plain = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](
                groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6, foreach=False
            )
        train(model, optimizer, 5)
        train(other, plain, 5)
        for (key, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda text, key=key: f"{key}: {text}")

    def test_sgd_without_momentum(self):
        assert not optim.create_optimizer(Model(), config(opt="sgd", momentum=0.0)).defaults["nesterov"]

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="adam, adamw or sgd, got 'lamb'"):
            optim.create_optimizer(Model(), config(opt="lamb"))
        with pytest.raises(ValueError, match="no trainable parameters"):
            optim.create_optimizer(Model().requires_grad_(False), config())

    @pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
    def test_resume_is_bit_exact(self, name, tmp_path):
        torch.manual_seed(0)
        model = Model()
        optimizer = optim.create_optimizer(model, config(opt=name))
        train(model, optimizer, 3)
        checkpoint.save(tmp_path / "a.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        train(model, optimizer, 3, seed=1)

        state = checkpoint.load(tmp_path / "a.pt")
        resumed = Model()
        resumed.load_state_dict(state["model"])
        again = optim.create_optimizer(resumed, config(opt=name))
        optim.load_optimizer(again, state["optimizer"])
        train(resumed, again, 3, seed=1)
        for key, value in model.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), key

    def test_loading_keeps_the_settings_of_this_run(self):
        saved = optim.create_optimizer(Model(), config(lr=0.5))
        for group in saved.param_groups:
            group["fused"] = None
        state = saved.state_dict()
        optimizer = optim.create_optimizer(Model(), config(lr=0.1))
        rate = torch.tensor(0.1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optim.load_optimizer(optimizer, state)
        assert all(group["lr"] is rate and group["fused"] for group in optimizer.param_groups)
        assert rate == 0.5  # of the last step, for a run that takes no other

    def test_loading_another_model_is_refused(self):
        state = optim.create_optimizer(nn.Linear(2, 2), config()).state_dict()
        with pytest.raises(CheckpointError, match=r"sizes \[1, 1\]"):
            optim.load_optimizer(optim.create_optimizer(Model(), config()), state)


class TestSchedule:
    def test_constant_is_the_default(self):
        schedule = optim.Schedule(config(), 10, 64)
        assert {schedule.lr(step) for step in range(200)} == {1e-3}

    def test_cosine_with_warmup(self):
        cfg = config(sched="cosine", epochs=10, warmup_epochs=1.5, lr=1.0, warmup_lr=0.1, min_lr=0.01)
        schedule = optim.Schedule(cfg, 10, 64)
        rates = [schedule.lr(step) for step in range(100)]
        assert rates[0] == 0.1 and rates[5] == pytest.approx(0.1 + 0.9 * 5 / 15) and rates[15] == 1.0
        assert rates[99] == pytest.approx(0.01)  # min_lr is reached at the last step, not one later
        assert rates[57] == pytest.approx(0.505)  # half way between 15 and 99
        assert rates[:16] == sorted(rates[:16]) and rates[15:] == sorted(rates[15:], reverse=True)
        assert len(set(rates)) == 100  # per step, not per epoch
        assert schedule.lr(5000) == rates[99]

    def test_step(self):
        schedule = optim.Schedule(config(sched="step", epochs=9, lr=1.0, decay_epochs=3.0, decay_rate=0.5), 7, 64)
        assert [schedule.lr(step) for step in (0, 20, 21, 41, 42, 62)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
        tenths = optim.Schedule(config(sched="step", lr=1.0, decay_epochs=1.1, decay_rate=0.5), 390, 64)
        assert [tenths.lr(step) for step in (428, 429, 857, 858)] == [1, 0.5, 0.5, 0.25]

    @pytest.mark.parametrize("sched", optim.SCHEDULES)
    @pytest.mark.parametrize(("epochs", "warmup", "steps"), [(1, 0.0, 1), (1, 1.0, 1), (1, 5.0, 3), (2, 2.0, 4)])
    def test_tiny_runs(self, sched, epochs, warmup, steps):
        schedule = optim.Schedule(config(sched=sched, epochs=epochs, warmup_epochs=warmup), steps, 64)
        assert all(0 < schedule.lr(step) <= 1e-3 for step in range(epochs * steps + 2))

    def test_scaling_follows_deit(self):
        cfg = config(unscale_lr=False, lr=5e-4, grad_accum_steps=4, sched="cosine", warmup_epochs=5.0)
        schedule = optim.Schedule(cfg, 100, 256)
        assert schedule.effective_lr == pytest.approx(1e-3)
        assert schedule.lr(0) == 1e-6 and schedule.lr(1999) == pytest.approx(1e-5)  # these two are not scaled
        assert schedule.describe() == (
            "learning rate 0.001 (0.0005 x batch 256 x accumulation 4 / 512), cosine to 1e-05, "
            "linear warmup from 1e-06 over 500 steps, 2000 optimizer steps"
        )
        assert optim.Schedule(config(), 10, 64).describe() == "learning rate 0.001, constant, 200 optimizer steps"

    def test_set_keeps_the_tensor(self):
        """A recorded step reads the learning rate where it lies, in every group."""
        optimizer = optim.create_optimizer(Model(), config())
        rates = [group["lr"] for group in optimizer.param_groups]
        for value in (0.25, torch.tensor(0.3, dtype=torch.float64)):
            optim.set_lr(optimizer, value)
            assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
            assert {rate.item() for rate in rates} == {float(value)}, "rounded"

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="constant, cosine, step, got 'poly'"):
            optim.Schedule(config(sched="poly"), 10, 64)
        with pytest.raises(ValueError, match="at least 1"):
            optim.Schedule(config(), 0, 64)


class TestEma:
    @pytest.mark.parametrize("warmup", [False, True])
    def test_recurrence(self, warmup):
        torch.manual_seed(0)
        model = Model()
        ema = optim.ModelEma(model, 0.9, warmup)
        optimizer = optim.create_optimizer(model, config(lr=0.1))
        keys = ["head.weight", "pos_embed", "bn.running_mean"]
        want = {key: model.state_dict()[key].double() for key in keys}
        for step in range(100):
            train(model, optimizer, 1, seed=step)
            ema.update(model)
            decay = min(0.9, (1 + step) / (10 + step)) if warmup else 0.9
            want = {key: decay * want[key] + (1 - decay) * model.state_dict()[key].double() for key in keys}
        for key in keys:
            torch.testing.assert_close(ema.module.state_dict()[key].double(), want[key], rtol=1e-5, atol=1e-6)
        assert ema.module.bn.num_batches_tracked == 100  # an average would be a fraction, or stay 0
        assert not ema.module.training and model.training
        assert not any(parameter.requires_grad for parameter in ema.module.parameters())

    def test_long_memory_moves(self):
        # 1 - 0.99996 must not round away: the average of a weight that steps from 0 to 1.
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        ema = optim.ModelEma(model, 0.99996)
        nn.init.ones_(model.weight)
        for _ in range(1000):
            ema.update(model)
        assert ema.module.weight.item() == pytest.approx(1 - 0.99996**1000, rel=1e-3)

    @pytest.mark.parametrize("wrap", [Wrapper, torch.compile, compiled_inside], ids=["wrapper", "compiled", "inside"])
    def test_wrapped_model(self, wrap):
        model = Model()
        ema = optim.ModelEma(model, 0.5)
        before = model.head.weight.clone()
        with torch.no_grad():
            model.head.weight += 1
        ema.update(wrap(model))
        torch.testing.assert_close(ema.module.head.weight, before + 0.5)
        assert list(optim.ModelEma(wrap(Model())).module.state_dict())[0] == "cls_token"

    def test_resume_is_bit_exact(self, tmp_path):
        torch.manual_seed(0)
        model = Model()
        ema = optim.ModelEma(model, 0.99, warmup=True)
        optimizer = optim.create_optimizer(model, config())
        for step in range(3):
            train(model, optimizer, 1, seed=step)
            ema.update(model)
        checkpoint.save(tmp_path / "a.pt", {"ema": ema.state_dict()})
        resumed = optim.ModelEma(Model(), 0.99, warmup=True)
        resumed.load_state_dict(checkpoint.load(tmp_path / "a.pt")["ema"])
        ema.update(model)
        resumed.update(model)
        for key, value in ema.module.state_dict().items():
            assert torch.equal(value, resumed.module.state_dict()[key]), key

    def test_the_live_model_is_not_touched(self):
        model = Model()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        ema = optim.ModelEma(model, 0.5)
        with torch.no_grad():
            for parameter in ema.module.parameters():
                parameter += 1
        ema.update(model)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_bad_decay(self):
        with pytest.raises(ValueError, match="0..1, got 1.5"):
            optim.ModelEma(Model(), 1.5)


@needs_gpu
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_captured_step_follows_the_schedule(name):
    # The whole update in a CUDA graph: LR, EMA count and decay change between replays without a recapture.
    torch.manual_seed(0)
    cfg = config(opt=name, sched="cosine", epochs=1, warmup_epochs=0.5, lr=0.1)
    schedule = optim.Schedule(cfg, 10, 64)
    batches = torch.randn(10, 8, 4, device="cuda")
    results = []
    for captured in (False, True):
        torch.manual_seed(1)
        model = Model().cuda()
        optimizer, ema = optim.create_optimizer(model, cfg), optim.ModelEma(model, 0.9, warmup=True)
        batch = torch.empty(8, 4, device="cuda")

        def step(model=model, optimizer=optimizer, ema=ema, batch=batch):
            optimizer.zero_grad(set_to_none=False)
            model(batch).square().mean().backward()
            optimizer.step()
            ema.update(model)

        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        for index in range(10):
            optim.set_lr(optimizer, schedule.lr(index))
            batch.copy_(batches[index])
            torch.cuda.synchronize()
            if captured and index == 3:
                with optim.capturable(optimizer), torch.cuda.graph(graph):
                    step()
            if captured and index >= 3:
                graph.replay()
            else:
                with torch.cuda.stream(stream):
                    step()
            torch.cuda.synchronize()
        results.append({**model.state_dict(), **{"ema " + k: v for k, v in ema.module.state_dict().items()}})
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, msg=lambda text, key=key: f"{key}: {text}")
