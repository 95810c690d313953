"""The peer hf: the CvT of transformers on PyTorch, on the CPU; hf_compiled: with torch.compile.

Runs in the interpreter that has both; see docs/performance.md.
"""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers import CvtConfig, CvtForImageClassification

from tools.benchmark.protocol import Work, serve


def make(job: dict) -> Work:
    """Build the network of a job; "infer" runs it, "train" runs a whole training step."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    net = build(job["sizes"], job["num_classes"])
    parameters = sum(p.numel() for p in net.parameters())
    images = torch.randn(job["batch_size"], job["sizes"]["in_channels"], *job["image_size"])
    run = torch.compile(net) if job["peer"] == "hf_compiled" else net
    step = (train if job["mode"] == "train" else infer)(run, net, images, job)
    what = f"transformers {transformers.__version__}, PyTorch {torch.__version__}"
    return Work(step, what, {"parameters": parameters})


def build(sizes: dict, num_classes: int) -> nn.Module:
    """Build transformers' network with the sizes of `tools.benchmark.workload.cvt_sizes`."""
    config = CvtConfig(
        num_channels=sizes["in_channels"],
        patch_sizes=sizes["patch_sizes"],
        patch_stride=sizes["patch_strides"],
        patch_padding=sizes["patch_paddings"],
        embed_dim=sizes["embed_dims"],
        num_heads=sizes["num_heads"],
        depth=sizes["depths"],
        mlp_ratio=sizes["mlp_ratios"],
        drop_rate=sizes["drop_rates"],
        drop_path_rate=sizes["drop_path_rates"],
        cls_token=sizes["cls_tokens"],
        stride_kv=sizes["kv_strides"],
        layer_norm_eps=1e-5,
        num_labels=num_classes,
    )
    return CvtForImageClassification(config)


def infer(run, net: nn.Module, images: torch.Tensor, job: dict):
    """Return a step from a NumPy array to a NumPy array."""
    net.eval()
    array = images.numpy()

    def step() -> int:
        with torch.inference_mode():
            return len(run(torch.from_numpy(array)).logits.numpy())

    return step


def train(run, net: nn.Module, images: torch.Tensor, job: dict):
    """Return a step: forward, loss, backward, clipping as in the recipe, AdamW."""
    net.train()
    keys = job["optimizer"]
    layers = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    decayed = [layer.weight for layer in layers]
    taken = {id(weight) for weight in decayed}
    rest = [p for p in net.parameters() if id(p) not in taken]
    groups = [
        {"params": decayed, "weight_decay": keys["weight_decay"]},
        {"params": rest, "weight_decay": 0.0},
    ]
    # Fused is the default of transformers' Trainer and the fastest.
    optimizer = torch.optim.AdamW(
        groups, lr=keys["warmup_lr"], betas=keys["betas"], eps=keys["eps"], fused=True
    )
    labels = torch.arange(len(images)) % job["num_classes"]
    loss_of = nn.CrossEntropyLoss(label_smoothing=job["training"]["label_smoothing"])

    def step() -> int:
        loss = loss_of(run(images).logits, labels)
        loss.backward()
        if keys["clip_norm"] > 0:
            torch.nn.utils.clip_grad_norm_(net.parameters(), keys["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        return len(images)

    return step


if __name__ == "__main__":
    serve(make)
