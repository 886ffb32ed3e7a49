"""A reversible net in a LightningModule.

python examples/lightning_trainer.py
"""

import logging
import tempfile
import warnings

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from revcore import ReversibleBlock, ReversibleSequential, set_reversing, track_memory


def branch() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))


class Classifier(lightning.LightningModule):
    def __init__(self, *, reversing: bool) -> None:
        super().__init__()
        chain = ReversibleSequential(*(ReversibleBlock(branch(), branch()) for _ in range(12)))
        self.net = nn.Sequential(nn.Linear(64, 128), chain, nn.Linear(128, 10))
        set_reversing(self.net, reversing)
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, label = batch
        loss = F.cross_entropy(self.net(x), label)
        self.losses.append(loss.item())
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, label = batch
        self.log("accuracy", (self.net(x).argmax(1) == label).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def fit(*, reversing: bool) -> tuple[list[float], float, float]:
    lightning.seed_everything(0, verbose=False)
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    data = TensorDataset(x, torch.tensor(digits.target))
    train, test = torch.utils.data.random_split(data, [1500, len(data) - 1500])
    model = Classifier(reversing=reversing)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=3,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            logger=False,
        )
        with warnings.catch_warnings(action="ignore"):  # advice on workers and devices
            trainer.fit(model, DataLoader(train, batch_size=100, shuffle=True))
            (found,) = trainer.test(model, DataLoader(test, batch_size=500), verbose=False)
    with track_memory() as memory:
        loss = model.net(x[:100]).sum()
        kept = memory.live_bytes
    assert loss.requires_grad
    return model.losses, found["accuracy"], kept / 2**20


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ours, accuracy, kept = fit(reversing=True)
    plain, accuracy_stored, kept_stored = fit(reversing=False)
    print(f"kept after forward: {kept:.2f} MiB reversed, {kept_stored:.2f} MiB stored")
    print(f"loss: {ours[0]:.4f} to {ours[-1]:.4f} reversed, to {plain[-1]:.4f} stored")
    print(f"accuracy: {accuracy:.1%} reversed, {accuracy_stored:.1%} stored")
    assert max(abs(a - b) for a, b in zip(ours, plain, strict=True)) < 0.05
    assert kept < kept_stored / 4


if __name__ == "__main__":
    main()
