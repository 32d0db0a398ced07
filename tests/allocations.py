"""What torch allocates in a training step, by its own record: the most alive at once, and what forward keeps."""

from __future__ import annotations

import torch

from groundup.model import ModelConfig, Transformer
from groundup.recipe import OptimizerSettings
from groundup.training.compilation import set_checkpointing
from groundup.training.objective import head_loss
from groundup.training.optimizers import Optimizers, clip_gradients


def of_a_step(
    config: ModelConfig, settings: OptimizerSettings, rows: int, micro: int, length: int, dtype: str
) -> tuple[int, int]:
    """Bytes beside weights and optimizer state: (at the fullest moment, when the first backward pass begins)."""
    model = Transformer(config).train()
    model.compute_dtype = getattr(torch, dtype)
    set_checkpointing(model, settings.activation_checkpointing)
    optimizers = Optimizers(model, settings, model.compute_dtype)
    ids = torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        for first in range(0, rows, micro):
            part = ids[first : first + micro]
            loss = model(part, head=head_loss(part)).objective
            balance = model.balance_loss()
            with torch.profiler.record_function("backward pass"):
                (loss if balance is None else loss + balance).backward()
        clip_gradients(optimizers.parameters(), 1.0)
        optimizers.step(1.0)

    step()  # now the optimizer has its state
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = record.profiler.kineto_results.events()
    begins = min(event.start_ns() for event in events if event.name() == "backward pass")
    alive = most = kept = 0
    for time, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        alive += change
        most = max(most, alive)
        kept = alive if time < begins else kept
    return most, kept
