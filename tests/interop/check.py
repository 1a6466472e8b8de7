"""Loads what foldgpt saved with transformers and compares the logits with foldgpt's own.

    python tests/interop/check.py [DIRECTORY ...]

Each directory holds `model/`, a saved checkpoint, and `expected.safetensors` with `input_ids` and `logits`.
"""

import math
import pathlib
import sys

import torch
import transformers
from safetensors.torch import load_file

TOLERANCE = 1e-4


def generate(model, directory) -> None:
    """What a user does first: fails where the tokenizer's files do not fit the model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    made = model.generate(**tokenizer("A boy named Ben", return_tensors="pt"), max_new_tokens=12, do_sample=False)
    print("   ", repr(tokenizer.decode(made[0], skip_special_tokens=True)))


def main() -> int:
    root = pathlib.Path(__file__).resolve().parents[2] / "target" / "interop"
    directories = [pathlib.Path(d) for d in sys.argv[1:]] or sorted(d for d in root.glob("*") if d.is_dir())
    if not directories:
        print(f"nothing to check in {root}, expected what `cargo test --test interop -- --ignored` writes")
        return 1
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    worst = 0.0
    for directory in directories:
        expected = load_file(directory / "expected.safetensors")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            directory / "model", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        with torch.no_grad():
            logits = model(expected["input_ids"].long()).logits
        off = ((logits - expected["logits"]).abs().max() / logits.abs().max()).item()
        stray = [key for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]]
        # Comparisons with a number that is none are false: it has to become one that is not passed over.
        worst = max(worst, off if math.isfinite(off) else math.inf, math.inf if stray else 0.0)
        if (directory / "model" / "tokenizer.json").exists():
            generate(model, directory / "model")
        print(f"{directory.name:32} {model.config.num_hidden_layers:3} blocks  off by {off:.1e}  {stray or ''}")
    print("all agree" if worst < TOLERANCE else f"worst {worst:.1e}, expected below {TOLERANCE}")
    return int(worst >= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
