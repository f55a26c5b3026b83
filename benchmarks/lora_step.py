"""What does a step of LoRA take beside full fine-tuning and beside peft's LoRA?

    python benchmarks/lora_step.py [--only cpu|gpu] [--out FOLDER]

A step is forward, loss, backward, clipping and AdamW on one fixed batch that lies on the device.
The layers that get LoRA of rank 8 are queries and values (Hu et al. 2021, section 7.1). Full
fine-tuning, our LoRA and peft's take turns, each eager ("defaults") and through torch.compile
("tuned"); compiling is not timed. Then inference: the base, our LoRA merged and not.

- CPU: MiniLM, 16 texts of 64 tokens, float32, one thread. Memory is counted from tensors: weights,
  gradients, state of the optimizer, and what autograd keeps for the backward pass.
- GPU: an encoder of the size of BERT-base with random weights, 128 texts of 128 tokens, bf16
  autocast. Memory is the peak of the allocator in a step.

Without ``--only`` it measures on the GPU, if there is one, else on the CPU. Writes
``data/results/lora_step.json``, of a GPU ``lora_step_gpu.json``, and a plot.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tlcourse as tl
from tlcourse.inference import inference
from tlcourse.locations import data_dir, repo_root
from tlcourse.lora import LoRAConfig, add_lora, merge_lora
from tlcourse.plots import plot_intervals
from tlcourse.timing import Timings, load_timings, save_timings, take_turns
from tlcourse.train import make_optimizer
from tlcourse.training_memory import num_bytes, saved_for_backward

RANK, NUM_CLASSES, LR = 8, 4, 1e-4
LORA = LoRAConfig(rank=RANK, alpha=16.0, target_modules=("query", "value"))


class Encoder(nn.Module):
    """BERT-base's shape with random weights; the feature is that of the first token."""

    def __init__(self, layers: int = 12) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.body = BertModel(BertConfig(num_hidden_layers=layers), add_pooling_layer=False)
        self.feature_dim = self.body.config.hidden_size

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask)
        return hidden.last_hidden_state[:, 0]


def with_peft(model: nn.Module) -> nn.Module:
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["head"]
    )
    return peft.get_peft_model(model, settings)  # type: ignore[arg-type]


class Step:
    """One training step on a fixed batch, as often as it is called."""

    def __init__(self, model: nn.Module, batch: Any, targets: Tensor, compiled: bool) -> None:
        self.model, self.batch, self.targets = model, batch, targets
        self.forward: Callable[..., Tensor] = torch.compile(model) if compiled else model
        self.optimizer = make_optimizer(model, tl.TrainConfig(lr=LR, num_steps=1))
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.device = targets.device.type
        model.train()

    def loss(self) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            logits = self.forward(**self.batch)
        return F.cross_entropy(logits.float(), self.targets)

    def __call__(self) -> None:
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def memory(self) -> int:
        """Bytes: the allocator's peak on a GPU; counted tensors on a CPU."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self()
            return torch.cuda.max_memory_allocated()
        saved, loss = saved_for_backward(self.model, self.loss)
        loss.backward()
        gradients = [p.grad for p in self.trained if p.grad is not None]
        state = [x for s in self.optimizer.state.values() for x in s.values() if torch.is_tensor(x)]
        kept = (*self.model.parameters(), *self.model.buffers(), *gradients, *state)
        self.optimizer.zero_grad()
        return num_bytes(kept) + saved


def repeat(work: Callable[[], Any], times: int) -> Callable[[], None]:
    def several() -> None:
        for _ in range(times):
            work()

    return several


def training(build: Callable[[], nn.Module], batch: Any, targets: Tensor, times: int) -> Timings:
    """Steps of the three methods, eager and compiled; ``times`` of them in each turn."""
    device = targets.device
    methods = {"full": lambda m: m, "ours": lambda m: add_lora(m, LORA), "peft": with_peft}
    ways, facts = {}, {"steps": times, "memory_mb": {}, "trained": {}}
    for name, adapt in methods.items():
        for compiled in (False, True):
            way = f"{name}, compiled" if compiled else name
            step = Step(adapt(build().to(device)), batch, targets, compiled)
            try:
                step(), step()
                facts["memory_mb"][way] = round(alone(step) / 1e6, 1)
            except Exception as error:
                print(f"{way}: left out, {type(error).__name__}: {str(error)[:200]}", flush=True)
                continue
            facts["trained"][name] = sum(p.numel() for p in step.trained)
            ways[way] = repeat(step, times)
    return take_turns(ways, rounds=9, facts=facts)


def alone(step: Step) -> int:
    """Memory of a step without what other models hold on the GPU."""
    if step.device != "cuda":
        return step.memory()
    before = torch.cuda.memory_allocated()
    own = num_bytes(step.model.parameters()) + num_bytes(step.model.buffers())
    state = [x for s in step.optimizer.state.values() for x in s.values() if torch.is_tensor(x)]
    return step.memory() - before + own + num_bytes(state)


def inferring(build: Callable[[], nn.Module], batch: Any, device: Any, times: int) -> Timings:
    """Forward passes of the base, and of our LoRA merged and not."""
    base = build().to(device)
    adapted = add_lora(copy.deepcopy(base), LORA)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    models = {"base": base, "not merged": adapted, "merged": merge_lora(copy.deepcopy(adapted))}

    def way(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
            with inference(model), autocast:
                for _ in range(times):
                    model(**batch)

        return run

    ways = {name: way(model) for name, model in models.items()}
    return take_turns(ways, rounds=41, facts={"steps": times})  # the goal is 1 %


def measure(gpu: bool, layers: int = 12, texts: int | None = None) -> dict[str, Timings]:
    device = torch.device("cuda" if gpu else "cpu")
    generator = torch.Generator().manual_seed(0)

    def build() -> nn.Module:
        torch.manual_seed(0)
        encoder = Encoder(layers) if gpu else tl.load_text_backbone("minilm")
        return tl.Classifier(encoder, NUM_CLASSES)

    texts, length = (texts or 128, 128) if gpu else (texts or 16, 64)
    ids = torch.randint(1000, 30_000, (texts, length), generator=generator).to(device)
    targets = torch.randint(NUM_CLASSES, (texts,), generator=generator).to(device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    times = 10 if gpu else 1
    return {
        "a training step": training(build, batch, targets, times),
        "inference": inferring(build, batch, device, times),
    }


def tables(path: Path) -> str:
    """The tables of a result, as they stand in benchmarks/README.md."""
    cases = load_timings(path)
    step, passes = cases["a training step"], cases["inference"]
    reference = "full, compiled" if "gpu" in path.stem else "full"
    lines = [step.table(reference, per=step.facts["steps"], unit="ms"), ""]
    lines += ["| way | memory of a step, MB |", "|---|---|"]
    lines += [f"| {way} | {size:,.0f} |" for way, size in step.facts["memory_mb"].items()]
    return "\n".join([*lines, "", passes.table("base", per=passes.facts["steps"], unit="ms")])


def plot(path: Path, target: Path) -> None:
    step = load_timings(path)["a training step"]
    ratios = {way: step.ratio(way, "full") for way in step.wall}
    ax = plot_intervals(ratios, xlabel="time of a step / full fine-tuning, eager", reference=1.0)
    target.parent.mkdir(parents=True, exist_ok=True)
    ax.figure.savefig(target, dpi=120, bbox_inches="tight")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("cpu", "gpu"))
    parser.add_argument("--out", type=Path, default=data_dir() / "results", help="folder")
    parser.add_argument("--layers", type=int, default=12, help=argparse.SUPPRESS)
    parser.add_argument("--texts", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    part = options.only or ("gpu" if torch.cuda.is_available() else "cpu")
    name, threads = {"cpu": "lora_step", "gpu": "lora_step_gpu"}[part], torch.get_num_threads()
    if part == "cpu":
        torch.set_num_threads(1)
    cases = measure(part == "gpu", options.layers, options.texts)
    torch.set_num_threads(threads)
    out = options.out / f"{name}.json"
    command = f"python benchmarks/lora_step.py --only {part}"
    save_timings(out, cases, command, rank=RANK, layers=options.layers)
    print(tables(out), flush=True)
    plot(out, (repo_root() or Path()) / "benchmarks" / "plots" / f"{name}.png")


if __name__ == "__main__":
    main()
