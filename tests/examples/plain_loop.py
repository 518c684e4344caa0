"""A training loop of your own, in plain PyTorch."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rayk


def train(teacher: rayk.Teacher, model: str, data: str, epochs: int = 1) -> list[float]:
    """Train `model` on the rows of `data`; return the loss of each step."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    student = AutoModelForCausalLM.from_pretrained(model)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    batches = rayk.make_batches(data, tokenizer, batch_size=8, shuffle_seed=0)
    losses = []
    for batch, signals in teacher.stream(batches * epochs, support=rayk.TopK(64), prefetch=4):
        logits = student(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        per_token = rayk.losses.forward_kl(batch.counted(logits), signals)
        loss = rayk.losses.token_mean(per_token, count=batch.counted_tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
