"""Times reading a prompt and decoding in llama.cpp and in foldgpt, in turns, and prints the ratios.

    cargo build --release --example timing
    python tests/interop/llamacpp.py --model M.gguf --quantize q8_0 [--rounds 5]

Needs llama-cpp-python. Both start from the same GGUF file and quantise it to the same type: llama.cpp into a temporary
file, all matrices alike (`pure`); foldgpt in memory, when it is loaded. Where rows do not fill blocks of 256, llama.cpp
takes Q5_0 in the place of Q4_K, and foldgpt Q8_0. Both read the same tokens, and make logits after the prompt and after
each token that follows; nothing is sampled. Leave the machine alone meanwhile.
"""

import argparse
import ctypes
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

import llama_cpp

import ours

FTYPES = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S}


FLASH, PLAIN = "llama.cpp, flash attention", "llama.cpp"


class LlamaCpp:
    def __init__(self, arguments, path: str, ids: list, flash_attn: bool) -> None:
        self.ids, self.tokens = ids, arguments.tokens
        self.llama = llama_cpp.Llama(
            path,
            n_ctx=len(ids) + arguments.tokens,
            n_batch=len(ids),
            n_ubatch=len(ids),
            n_threads=arguments.threads,
            n_threads_batch=arguments.threads,
            n_gpu_layers=0,
            flash_attn=flash_attn,
            verbose=False,
        )

    def seconds(self, work: str) -> float:
        self.llama.reset()
        start = time.perf_counter()
        self.llama.eval(self.ids)
        if work == "decode":
            start = time.perf_counter()
            for place in range(self.tokens):
                self.llama.eval([self.ids[place % len(self.ids)]])
        return time.perf_counter() - start


def quantize(source: str, to: str, kind: str, threads: int) -> None:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FTYPES[kind]
    parameters.nthread = threads
    parameters.allow_requantize = True
    parameters.pure = True
    if llama_cpp.llama_model_quantize(source.encode(), to.encode(), ctypes.byref(parameters)) != 0:
        sys.exit(f"llama.cpp cannot quantise {source} to {kind}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--quantize", choices=sorted(FTYPES), default="q8_0")
    parser.add_argument("--binary", default=ours.BINARY)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens after it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between turns, for threads to fall asleep")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def measure(arguments, contenders: dict) -> dict:
    """Seconds by work and contender, a list over rounds each; the round before the first does not count."""
    times = {work: {name: [] for name in contenders} for work in ("prefill", "decode")}
    for turn in range(arguments.rounds + 1):
        names = list(contenders)
        for name in names if turn % 2 == 0 else reversed(names):
            for work, by_name in times.items():
                time.sleep(arguments.pause)
                seconds = contenders[name].seconds(work)
                if turn > 0:
                    by_name[name].append(seconds)
    return times


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as scratch:
        quantized = os.path.join(scratch, "quantized.gguf")
        quantize(arguments.model, quantized, arguments.quantize, arguments.threads)
        vocabulary = llama_cpp.Llama(quantized, vocab_only=True, verbose=False).n_vocab()
        ids = [i * 97 % vocabulary for i in range(arguments.prompt)]
        path = os.path.join(scratch, "ids.json")
        pathlib.Path(path).write_text(json.dumps([ids]))
        flags = ["--model", arguments.model, "--quantize", arguments.quantize, "--ids", path]
        flags += ["--tokens", str(arguments.tokens), "--greedy-windows", "1"]
        own = ours.Timing(arguments.binary, arguments.threads, flags)
        try:
            peers = {FLASH: LlamaCpp(arguments, quantized, ids, True), PLAIN: LlamaCpp(arguments, quantized, ids, False)}
            times = measure(arguments, {"foldgpt": own, **peers})
        finally:
            own.close()
        size = os.path.getsize(quantized)
    if arguments.json:
        print(json.dumps({"conditions": own.conditions, "llama_cpp": llama_cpp.__version__, "seconds": times}))
        return
    print(
        f"{arguments.quantize}, {arguments.threads} threads, llama-cpp-python {llama_cpp.__version__} on {size} bytes, "
        f"foldgpt in {own.conditions['matrices']}; ratios within a round, to llama.cpp as it is faster"
    )
    if arguments.quantize == "q4_k":
        print("rows that do not fill blocks of 256 are held in Q5_0 by llama.cpp and in Q8_0 by foldgpt")
    print("| work | tokens | foldgpt tokens/s | llama.cpp tokens/s | foldgpt / llama.cpp | least | most |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for work, by_name in times.items():
        tokens = arguments.prompt if work == "prefill" else arguments.tokens
        rates = {name: [tokens / seconds for seconds in of] for name, of in by_name.items()}
        faster = max(FLASH, PLAIN, key=lambda name: statistics.median(rates[name]))
        ratios = [a / b for a, b in zip(rates["foldgpt"], rates[faster])]
        print(
            f"| {work} | {tokens} | {statistics.median(rates['foldgpt']):.1f}"
            f" | {statistics.median(rates[faster]):.1f} ({faster}) | {statistics.median(ratios):.2f}"
            f" | {min(ratios):.2f} | {max(ratios):.2f} |"
        )


if __name__ == "__main__":
    main()
