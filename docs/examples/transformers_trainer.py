"""Hugging Face's Trainer, one on every rank: ``mpiexec -n 4 python transformers_trainer.py``.

Each Trainer believes to be alone; the optimizer brings the ranks together. The model is a small GPT-2 with random weights.
"""

import tempfile

import torch
from torch.utils.data import Dataset, Subset
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import hpcasync as ha

world = ha.init()
LENGTH, WORDS = 16, 24


class Counting(Dataset):
    """Sequences that go up by 1, 2 or 3, modulo ``WORDS``."""

    def __init__(self, count, seed):
        draw = torch.Generator().manual_seed(seed)
        start, step = torch.randint(WORDS, (count, 1), generator=draw), torch.randint(1, 4, (count, 1), generator=draw)
        self.tokens = (start + step * torch.arange(LENGTH)) % WORDS

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Meet(TrainerCallback):
    """The same model on every rank before each evaluation, and at the end."""

    def on_epoch_end(self, args, state, control, **kwargs):
        optimizer.synchronize()


dataset = Counting(1024, seed=1)
share = Subset(dataset, range(world.rank, len(dataset) - len(dataset) % world.size, world.size))  # as many on every rank

torch.manual_seed(0)
sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
model = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=LENGTH, resid_pdrop=0.0, embd_pdrop=0.0, **sizes))
model.to(world.device)
optimizer = ha.Async(model, ha.rules.TrendSmooth(base="adamw", lr=5e-3), staleness=16)
# optimizer = ha.Sync(torch.optim.AdamW(model.parameters(), lr=5e-3), model=model)

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=3,
        per_device_train_batch_size=16,
        lr_scheduler_type="cosine",
        eval_strategy="epoch",
        save_strategy="no",  # rank 0 saves below
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=share,
        eval_dataset=Counting(128, seed=2),
        optimizers=(optimizer, None),
        callbacks=[Meet()],
    )
    if world.rank > 0:
        trainer.remove_callback(PrinterCallback)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    if world.rank == 0:
        trainer.save_model(folder)
        print(f"loss {loss:.2f}, after {optimizer.updates} updates of rank 0")
optimizer.close()
