"""Supervised training of the victim: the model that nobody else may open."""

import copy
import logging
import math
from typing import Final

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training.data.datasets import Splits
from training.victim.tasks import VictimTask

_LEARNING_RATE: Final = 4e-3
_WEIGHT_DECAY: Final = 0.02
_AVERAGING: Final = 0.99  # share of the averaged weights that a step keeps

_log = logging.getLogger(__name__)


def fit(model: nn.Module, task: VictimTask, splits: Splits, *, epochs: int, seed: int, device: torch.device) -> int:
    """Trains the model in place on `device`, leaves it at its best epoch, and returns that epoch, from 1.

    AdamW with a one-cycle learning rate. The exponential average of the weights is validated and kept, as the weights
    themselves swing by many per cent between epochs. The best epoch has the highest validation score, then the lowest
    validation loss.
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels = splits.train.images.to(device), splits.train.labels.to(device)
    steps = math.ceil(len(images) / task.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=epochs * steps, pct_start=0.2)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(_AVERAGING), use_buffers=True)
    best_rank, best_epoch, best_state = (-1.0, 0.0), 0, model.state_dict()
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        # Equal chunks: a last batch of one image would break the batch normalisation.
        for chosen in torch.randperm(len(images), generator=generator).tensor_split(steps):
            chosen = chosen.to(device)
            varied, targets = task.augment(images[chosen], labels[chosen], generator)
            loss = task.loss(model(varied), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            averaged.update_parameters(model)
            total += loss.item() * len(chosen)
        validation = task.score(averaged.module, splits.validation, device)
        if validation.rank > best_rank:
            best_rank, best_epoch, best_state = validation.rank, epoch, copy.deepcopy(averaged.module.state_dict())
        _log.info(
            "epoch %d/%d: training loss %.3f, validation %s%s",
            epoch,
            epochs,
            total / len(images),
            validation,
            " (best)" if best_epoch == epoch else "",
        )
    model.load_state_dict(best_state)
    return best_epoch
