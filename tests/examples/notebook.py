"""Distillation where an event loop is running, as in a notebook's cells: the ordinary functions, and awaitable ones."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rayk


async def cells(teacher_name: str, model: str, data: str) -> list[float]:
    """Attach to a teacher and train `model` on the rows of `data`; return the loss of each step."""
    teacher = rayk.connect_teacher(teacher_name)
    tokenizer = AutoTokenizer.from_pretrained(model)
    student = AutoModelForCausalLM.from_pretrained(model)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    batches = rayk.make_batches(data, tokenizer, batch_size=8, shuffle_seed=0)

    losses = []
    for number, batch in enumerate(batches):
        if number % 2:
            signals = await teacher.ascore(batch, support=rayk.TopK(64))  # other cells' tasks go on meanwhile
        else:
            signals = teacher.score(batch, support=rayk.TopK(64))
        logits = student(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        per_token = rayk.losses.forward_kl(batch.counted(logits), signals)
        loss = rayk.losses.token_mean(per_token, count=batch.counted_tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
