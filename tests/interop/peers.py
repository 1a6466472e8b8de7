"""Times the same work in transformers and in foldgpt, in turns, and prints the ratios.

    cargo build --release --example timing
    python tests/interop/peers.py --model DIRECTORY [--rounds 5] [--long-rounds 2]

DIRECTORY is a checkpoint that both read. Leave the machine alone meanwhile. Works: `blocks` and `forward` (blocks alone,
and with the head to the loss, on one window), `gate-step` (a scalar gate on what every block adds, weights frozen,
backward to the gates alone: PyTorch keeps all activations, foldgpt computes blocks again, as both do by default),
`gate-step-keeping` (the same, and both keep them), `gate-step-checkpointing` (the same, and both compute blocks
again), `block-influence` on all windows, and `greedy`: greedy perplexity, which here runs every
candidate as a whole forward pass, and in foldgpt what candidates have in common once. Both compute in f32, and with
matrices in bf16; each round times each work in all four ways, one right after the other, and ratios are those of one
round.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import tempfile
import time

import torch
import transformers

import ours

WORKS = [
    "blocks",
    "forward",
    "gate-step",
    "gate-step-keeping",
    "gate-step-checkpointing",
    "block-influence",
    "greedy",
]
LONG = {"block-influence", "greedy"}
GATE = 0.9


class Torch:
    """The same work in transformers."""

    def __init__(self, arguments, windows, dtype: torch.dtype) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
        self.model.requires_grad_(False)
        self.base = self.model.get_decoder()
        self.blocks = list(self.base.layers)
        self.windows = [torch.tensor([window]) for window in windows]
        self.remove, self.few = arguments.remove, self.windows[: arguments.greedy_windows]

    def seconds(self, work: str) -> float:
        run = {
            "blocks": lambda: self.base(self.windows[0], use_cache=False),
            "forward": lambda: self.loss(self.windows[0]).item(),
            "gate-step": self.gate_step,
            "gate-step-keeping": self.gate_step,
            "gate-step-checkpointing": self.gate_step_checkpointing,
            "block-influence": self.block_influence,
            "greedy": self.greedy,
        }[work]
        with torch.enable_grad() if work.startswith("gate-step") else torch.inference_mode():
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

    def loss(self, ids):
        logits = self.model(ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])

    def gate_step(self):
        gates = [torch.full((), GATE, dtype=self.model.dtype, requires_grad=True) for _ in self.blocks]

        def gated(gate):
            def hook(_, inputs, output):
                x, y = inputs[0], output[0] if isinstance(output, tuple) else output
                y = x + gate * (y - x)
                return (y, *output[1:]) if isinstance(output, tuple) else y

            return hook

        with contextlib.ExitStack() as hooks:
            for block, gate in zip(self.blocks, gates):
                hooks.callback(block.register_forward_hook(gated(gate)).remove)
            self.loss(self.windows[0]).backward()
        return [gate.grad.item() for gate in gates]

    def gate_step_checkpointing(self):
        # Only a model that is told to train heeds it; there is no dropout in one that was made for inference.
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        try:
            return self.gate_step()
        finally:
            self.model.eval()
            self.model.gradient_checkpointing_disable()

    def block_influence(self):
        sums = [0.0] * len(self.blocks)
        states = []
        with contextlib.ExitStack() as hooks:
            # The last hidden state that transformers returns is the one after the final norm; hooks see it before.
            for block in self.blocks:
                hook = block.register_forward_hook(
                    lambda _, inputs, output: states.append(
                        (inputs[0], output[0] if isinstance(output, tuple) else output)
                    )
                )
                hooks.callback(hook.remove)
            for ids in self.windows:
                states.clear()
                self.base(ids, use_cache=False)
                for place, (x, y) in enumerate(states):
                    cosines = torch.nn.functional.cosine_similarity(x.float(), y.float(), dim=-1)
                    sums[place] += 1.0 - cosines.mean().item()
        return sums

    def greedy(self):
        chosen = []
        inner = range(1, len(self.blocks) - 1)
        try:
            for turn in range(self.remove):
                # As in foldgpt, all blocks are measured in the first round.
                candidates = range(len(self.blocks)) if turn == 0 else [i for i in inner if i not in chosen]
                losses = {}
                for candidate in candidates:
                    kept = [b for i, b in enumerate(self.blocks) if i not in (*chosen, candidate)]
                    self.base.layers = torch.nn.ModuleList(kept)
                    losses[candidate] = sum(self.loss(ids).item() for ids in self.few)
                chosen.append(min((i for i in losses if i in inner), key=losses.get))
        finally:
            self.base.layers = torch.nn.ModuleList(self.blocks)
        return chosen


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a Hugging Face directory that both read")
    parser.add_argument("--binary", default=ours.BINARY)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--remove", type=int, default=3, help="K of greedy perplexity")
    parser.add_argument("--greedy-windows", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--long-rounds", type=int, default=2, help="rounds of block-influence and greedy")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between turns, for threads to fall asleep")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=WORKS)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def measure(arguments, contenders: dict) -> dict:
    """Seconds by work and contender, a list over rounds each."""
    times = {}
    for work in arguments.works:
        rounds = arguments.long_rounds if work in LONG else arguments.rounds
        times[work] = {name: [] for name in contenders}
        # What is short is run once before it counts; of what is long, all but the first window is warm anyway.
        for turn in range(rounds if work in LONG else rounds + 1):
            names = list(contenders)
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                time.sleep(arguments.pause)
                seconds = contenders[name].seconds(work)
                if work in LONG or turn > 0:
                    times[work][name].append(seconds)
    return times


def report(times: dict) -> None:
    print("| work | dtype | foldgpt s | PyTorch s | PyTorch / foldgpt | least | most |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for work, by_name in times.items():
        for dtype in ("f32", "bf16"):
            own, peer = by_name[f"foldgpt {dtype}"], by_name[f"torch {dtype}"]
            ratios = [b / a for a, b in zip(own, peer)]
            print(
                f"| {work} | {dtype} | {statistics.median(own):.3f} | {statistics.median(peer):.3f}"
                f" | {statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} |"
            )


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    vocabulary = transformers.AutoConfig.from_pretrained(arguments.model).vocab_size
    # Which tokens they are makes no difference to the work.
    windows = [
        [(i * 97 + window * 31) % vocabulary for i in range(arguments.seq_len)] for window in range(arguments.windows)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        ids = pathlib.Path(scratch) / "ids.json"
        ids.write_text(json.dumps(windows))
        flags = ["--model", arguments.model, "--ids", str(ids), "--remove", str(arguments.remove)]
        flags += ["--greedy-windows", str(arguments.greedy_windows)]
        contenders = {
            f"foldgpt {dtype}": ours.Timing(arguments.binary, arguments.threads, [*flags, "--dtype", dtype])
            for dtype in ("f32", "bf16")
        }
        conditions = contenders["foldgpt f32"].conditions
        contenders["torch f32"] = Torch(arguments, windows, torch.float32)
        contenders["torch bf16"] = Torch(arguments, windows, torch.bfloat16)
        try:
            times = measure(arguments, contenders)
        finally:
            for dtype in ("f32", "bf16"):
                contenders[f"foldgpt {dtype}"].close()
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    if arguments.json:
        print(json.dumps({"conditions": conditions, "versions": versions, "seconds": times}))
        return
    print(f"{versions}, {arguments.threads} threads, {conditions}; medians of ratios within a round")
    report(times)
    print("greedy: foldgpt runs what candidates have in common once, PyTorch every candidate whole")


if __name__ == "__main__":
    main()
