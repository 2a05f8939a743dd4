"""What training means, in plain PyTorch: nothing of offload is used here. Every other way of training must equal this one."""

import numpy
import torch
from torch import nn


def seed_everything(seed, step, k):
    torch.manual_seed(int(numpy.random.SeedSequence((seed, step, k)).generate_state(1, numpy.uint64)[0] >> 1))


def items(batch):
    """What a causal model's loss is the mean of."""
    return int((batch["labels"][:, 1:] != -100).sum())


def share(batch, micro_batches):
    """Every item of a step counts the same."""
    return items(batch) / sum(map(items, micro_batches))


def train(model, steps, *, seed=0, clip=None, masters=True, optimizer=torch.optim.AdamW, **settings):
    """Train on `steps`, a list of lists of micro-batches (keyword arguments of the model); returns the losses."""
    model.train()
    parameters = [value for value in model.parameters() if value.requires_grad]
    places = [(module, name) for module in model.modules() for name, value in module._parameters.items() if value is not None]
    places.sort(key=lambda place: not isinstance(place[0], nn.Embedding))
    uses = {id(value): [] for value in parameters}
    for module, name in places:
        value = module._parameters[name]
        if id(value) in uses:
            # Each use is a leaf of its own, over the same memory.
            uses[id(value)].append(nn.Parameter(value.data))
            module._parameters[name] = uses[id(value)][-1]
    half = [masters and value.dtype in (torch.bfloat16, torch.float16) for value in parameters]
    stepped = [value.detach().float().clone() if up else value for value, up in zip(parameters, half, strict=True)]
    stepping = optimizer(stepped, fused=True, **settings)
    losses = []
    for step, micro_batches in enumerate(steps, 1):
        added = {}
        for k, batch in enumerate(micro_batches):
            seed_everything(seed, step, k)
            loss = model(**batch).loss * share(batch, micro_batches)
            loss.backward()
            losses.append(loss.item())
            for value, target in zip(parameters, stepped, strict=True):
                for use in uses[id(value)]:
                    if use.grad is not None:
                        gradient = use.grad.to(target.dtype)
                        added[id(use)] = added[id(use)] + gradient if id(use) in added else gradient
                        use.grad = None
        for value, target in zip(parameters, stepped, strict=True):
            gradients = [added[id(use)] for use in uses[id(value)] if id(use) in added]
            target.grad = sum(gradients[1:], gradients[0]) if gradients else None
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(stepped, clip)
        stepping.step()
        with torch.no_grad():
            for value, target in zip(parameters, stepped, strict=True):
                value.copy_(target)
    return losses
