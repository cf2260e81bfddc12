"""The training loop that both networks of a bundle share: AdamW, cosine schedule, averaged weights, exact resume.

Every batch, and whatever a step draws at random, comes from (seed, step) alone, so a run that was cut off goes on with
the very numbers it would have seen, on this machine or another: one checkpoint file holds weights, averaged weights,
optimiser, step and history.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparserefine_ros.errors import TrainingError
from sparserefine_ros.training.recipe import StageRecipe
from sparserefine_ros.whole_files import sweep, whole, write_whole

Batch = tuple[Tensor, ...]
SAVE_EVERY = 60.0  # seconds between checkpoints


class Task(Protocol):
    """What is trained: a module, where its batches come from, its loss and its figures of merit."""

    module: nn.Module
    samples: int  # frames an epoch

    def batch(self, rng: np.random.Generator) -> Batch: ...

    def loss(self, module: nn.Module, batch: Batch) -> Tensor: ...

    def validate(self, module: nn.Module) -> dict[str, float]: ...


def train(
    task: Task,
    recipe: StageRecipe,
    folder: Path,
    name: str,
    seed: int,
    device: torch.device,
    origin: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Trains ``task.module`` and returns its averaged copy.

    Writes ``folder/NAME.ckpt`` (resumed from when it is there) and ``folder/NAME.jsonl``, one line a log entry.
    origin: what the result depends on besides recipe and seed, as plain data.
    Raises TrainingError where the checkpoint belongs to another recipe, seed or origin, or cannot be read or written;
    when the loss is no longer finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    module = task.module.to(device)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)
    optimizer = torch.optim.AdamW(_groups(module, recipe), lr=recipe.lr)
    schedule = SCHEDULES[recipe.schedule]
    steps_epoch = max(task.samples // recipe.batch, 1)
    total = steps_epoch * recipe.epochs
    origin = {"seed": seed, "frames": task.samples, **(origin or {})}
    state = _State(folder / f"{name}.ckpt", module, average, optimizer, recipe, origin)
    step = state.resume()

    def draw(at: int) -> Batch:
        batch = task.batch(np.random.default_rng((seed, at)))
        return tuple(tensor.pin_memory() for tensor in batch) if device.type == "cuda" else batch

    bar = Progress(
        TextColumn(f"[bold]{name}"), BarColumn(), TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with bar, _resumable(name, state), ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        row = bar.add_task(name, total=total, completed=step, note="")
        ahead = [pool.submit(draw, at) for at in range(step, min(step + 8, total))]
        saved = time.monotonic()
        module.train()
        while step < total:
            batch = tuple(t.to(device, non_blocking=True) for t in ahead.pop(0).result())
            if step + 8 < total:
                ahead.append(pool.submit(draw, step + 8))
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, total, recipe.warmup)
            torch.manual_seed(_step_seed(seed, step))
            with mixed_precision(device):
                loss = task.loss(module, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 5.0)
            optimizer.step()
            value = loss.item()  # last: a GPU has then been given the whole step
            if not math.isfinite(value):
                raise TrainingError(f"{name}: the loss is {value} at step {step}; lower lr (now {recipe.lr})")
            average.update_parameters(module)
            step += 1
            state.running = value if state.running is None else 0.98 * state.running + 0.02 * value
            bar.update(row, completed=step, note=f"loss {state.running:.3f}")
            epoch = step // steps_epoch
            if step % steps_epoch == 0:
                entry: dict[str, Any] = {"epoch": epoch, "step": step, "loss": round(state.running, 4)}
                if epoch % recipe.validate_every == 0 or step == total:
                    average.eval()
                    entry.update({k: round(v, 4) for k, v in task.validate(average.module).items()})
                state.history.append(entry)
                bar.print(json.dumps(entry), soft_wrap=True)  # one line, however narrow a log file is taken to be
            if step == total or time.monotonic() - saved > SAVE_EVERY:
                state.save(step)
                saved = time.monotonic()
    log = "".join(json.dumps(entry) + "\n" for entry in state.history)
    write_whole(folder / f"{name}.jsonl", log.encode())
    result: nn.Module = average.module.eval()
    return result


@contextlib.contextmanager
def _resumable(name: str, state: _State) -> Iterator[None]:
    """Ctrl-C says from where the run goes on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"{name} goes on from step {state.step} when the command is given again") from error


def cosine(step: int, total: int, warmup: float) -> float:
    """The factor on the learning rate: linear rise over the first ``warmup`` share, then half a cosine to zero."""
    rise = max(1, round(total * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def poly(step: int, total: int, warmup: float) -> float:
    """As ``cosine``, but falling as (1 - step / total) ** 0.9 (Chen et al., 2017, DeepLab)."""
    rise = max(1, round(total * warmup))
    return (step + 1) / rise if step < rise else (1 - (step - rise) / max(1, total - rise)) ** 0.9


SCHEDULES = {"cosine": cosine, "poly": poly}


def mixed_precision(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """bfloat16 autocast where the hardware gains by it: CUDA, and CPUs with AVX-512 BF16, where torch can tell."""
    can_tell = hasattr(torch.cpu, "_is_avx512_bf16_supported")  # torch 2.4 and 2.5 cannot
    if device.type == "cpu" and not (can_tell and torch.cpu._is_avx512_bf16_supported()):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])


def _groups(module: nn.Module, recipe: StageRecipe) -> list[dict[str, Any]]:
    """Weight decay for weights, none for biases and normalisation; the encoder has its own learning rate."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        groups.setdefault((name.startswith("encoder."), parameter.ndim >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": recipe.weight_decay if is_weight else 0.0,
            "peak": recipe.lr * (recipe.encoder_lr if is_encoder else 1.0),
        }
        for (is_encoder, is_weight), parameters in sorted(groups.items(), reverse=True)
    ]


class _State:
    """One checkpoint file."""

    def __init__(
        self,
        path: Path,
        module: nn.Module,
        average: AveragedModel,
        optimizer: torch.optim.Optimizer,
        recipe: StageRecipe,
        origin: Mapping[str, Any],
    ) -> None:
        self.path, self.module, self.average, self.optimizer = path, module, average, optimizer
        self.origin = dict(origin)
        # What differs from the defaults, so that an option added later does not disown earlier checkpoints.
        self.recipe = repr({f.name: v for f in fields(recipe) if (v := getattr(recipe, f.name)) != f.default})
        self.history: list[dict[str, Any]] = []
        self.running: float | None = None  # the smoothed loss
        self.step = 0  # of the checkpoint

    def save(self, step: int) -> None:
        data = {
            "recipe": self.recipe, "origin": self.origin, "step": step, "history": self.history,
            "running": self.running, "module": self.module.state_dict(), "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        try:
            with whole(self.path) as partial, partial.open("wb") as file:
                torch.save(data, file)
            self.step = step
        except (OSError, RuntimeError) as error:  # the latter is what torch makes of a full disk
            after = f"goes on from step {self.step}" if self.step else "starts from the beginning: there is none yet"
            raise TrainingError(
                f"cannot write the checkpoint {self.path}: {error}; make room for it and give the same command again, "
                f"which {after}"
            ) from error

    def resume(self) -> int:
        sweep(self.path)
        if not self.path.exists():
            return 0
        try:
            # Each part is copied to where it belongs; AdamW's step counts stay on the host, which reads them.
            data = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # a file cut short surfaces as anything from EOFError to RuntimeError
            raise TrainingError(f"cannot read the checkpoint {self.path}: {error}; remove it to start anew") from error
        if data["recipe"] != self.recipe:
            raise TrainingError(
                f"{self.path} was written by another recipe; remove it to start anew, or restore the recipe:\n"
                f"  there: {data['recipe']}\n  here:  {self.recipe}"
            )
        there = data.get("origin", self.origin)  # earlier checkpoints do not say
        for key in self.origin:
            if there.get(key) != self.origin[key]:
                raise TrainingError(
                    f"{self.path} was written by another run, with {key} {there.get(key)!r} where it is "
                    f"{self.origin[key]!r} here; remove it to start anew"
                )
        self.module.load_state_dict(data["module"])
        self.average.load_state_dict(data["average"])
        self.optimizer.load_state_dict(data["optimizer"])
        self.history = data["history"]
        self.running = data.get("running", self.history[-1]["loss"] if self.history else None)
        self.step = int(data["step"])
        return self.step
