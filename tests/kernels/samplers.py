"""One batch of rows through each of the samplers: the reference, the compiled CPU step, the GPU's kernel."""

import numpy as np
import torch

from llama_engine.cpu import fused
from llama_engine.model.sampler import sample
from llama_engine.sampling import RECENT, count_tokens, recent_tokens


def on_cpu(sampler, logits, params, positions, histories):
    """The tokens, and what became of the counts."""
    counts = torch.from_numpy(np.stack([count_tokens(*history, logits.shape[1]) for history in histories]))
    recent = [recent_tokens(*history) for history in histories]
    views = [fused.SampleView.of(p, count if p.penalized else None, r) for p, count, r in zip(params, counts, recent)]
    return sampler.sample(logits.clone(), views, positions), counts, recent


def on_gpu(logits, params, positions, histories, device):
    from llama_engine.kernels.sampler import Sampler

    rows, vocab = logits.shape
    logits = logits.to(device)
    sampler = Sampler(rows + 2, rows + 1, vocab, device)
    slots = [rows - row for row in range(rows)] + [rows + 2]  # any order, and a row of padding
    for slot, p, history in zip(slots, params, histories):
        for target, values in sampler.updates(slot, p, *history):
            target[: values.size].copy_(torch.from_numpy(values.ravel()))
    sampled = torch.cat([logits.argmax(-1), torch.tensor([5], device=device)]).int()
    last_token = torch.full((rows + 3,), 77, dtype=torch.int32, device=device)
    position = torch.zeros(rows + 3, dtype=torch.int32, device=device)
    position[slots[:-1]] = torch.tensor(positions, dtype=torch.int32, device=device)
    logits = torch.cat([logits, torch.zeros_like(logits[:1])])
    sampler.launch(
        logits, sampled, torch.tensor(slots, dtype=torch.int32, device=device), last_token, position, rows + 1
    )
    tokens = sampled.tolist()
    assert tokens.pop() == 5
    assert last_token[rows + 2] == 77
    for slot, token, p in zip(slots, tokens, params):
        assert last_token[slot] == (max(token, 0) if p.mode else 77)
    return tokens, sampler.counts[slots[:-1]].cpu(), sampler.recent[slots[:-1]].cpu().numpy()


def reference(logits, params, positions, histories):
    counts = torch.from_numpy(np.stack([count_tokens(*history, logits.shape[1]) for history in histories]))
    for row, p in enumerate(params):
        if not p.penalized:
            counts[row] = 0
    recent = np.stack([recent_tokens(*history) for history in histories])
    tokens = sample(logits, params, positions, counts, recent).tolist()
    for row, token in enumerate(tokens):
        if params[row].penalized and token >= 0:
            counts[row, token] += 2
        if params[row].phrases and token >= 0:
            recent[row, positions[row] % RECENT] = token
    return tokens, counts, recent


def assert_equal(params, found, expected):
    """Tokens of the rows that ask for any, and what their slots will remember."""
    for p, *parts in zip(params, *found, *expected):
        token, counts, recent, expected_token, expected_counts, expected_recent = parts
        assert not p.mode or token == expected_token
        assert not p.penalized or torch.equal(counts, expected_counts)
        assert not p.phrases or np.array_equal(recent, expected_recent)
