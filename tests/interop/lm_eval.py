"""Answers tasks with lm-evaluation-harness and compares with what `evaluate --tasks … --answers --json` said.

    python tests/interop/lm_eval.py --model DIRECTORY --ours OURS.json [--limit N] piqa.jsonl arc_easy.jsonl winogrande.jsonl

Files are JSON Lines in the harness's own formats or prepared records, named after their task. The tasks are the
harness's own definitions with another source of records; nothing is fetched. Needs torch and `lm-eval[hf]` from PyPI.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile

# This file would be found in place of the package of its name.
sys.path = [path for path in sys.path if pathlib.Path(path or ".").resolve() != pathlib.Path(__file__).resolve().parent]
for hub in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[hub] = "1"

import lm_eval
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

# By how much log-likelihoods of the same text may differ, in nats, by two implementations in f32.
TOLERANCE = 1e-2


def piqa(record: dict) -> dict:
    goal = record["query"].removeprefix("Question: ").removesuffix("\n")
    return {"goal": goal, "sol1": record["choices"][0], "sol2": record["choices"][1], "label": record["gold"]}


def arc(record: dict) -> dict:
    letters = [chr(ord("A") + place) for place in range(len(record["choices"]))]
    return {
        "question": record["query"].removeprefix("Question: ").removesuffix("\n"),
        "choices": {"text": record["choices"], "label": letters},
        "answerKey": letters[record["gold"]],
    }


def winogrande(record: dict) -> dict:
    first, second = record["context_options"]
    # Up to the last space before the options differ: they may begin with the same letters.
    common = os.path.commonprefix([first, second])
    common = common[: common.rfind(" ") + 1]
    assert "_" not in common, record
    return {
        "sentence": f"{common}_ {record['continuation']}",
        "option1": first.removeprefix(common),
        "option2": second.removeprefix(common),
        "answer": str(record["gold"] + 1),
    }


# The harness's definition, and how prepared records become its dataset's.
TASKS = {
    "piqa": ("piqa/piqa.yaml", piqa),
    "arc_easy": ("arc/arc_easy.yaml", arc),
    "arc_challenge": ("arc/arc_challenge.yaml", arc),
    "winogrande": ("winogrande/default.yaml", winogrande),
}


def define(file: pathlib.Path, directory: pathlib.Path) -> None:
    """Writes the records and the task that reads them."""
    if file.stem not in TASKS:
        sys.exit(f"{file}: no definition for a task of this name, expected one of {', '.join(TASKS)}")
    definition, convert = TASKS[file.stem]
    definition = pathlib.Path(lm_eval.__file__).parent / "tasks" / definition
    records = directory / f"{file.stem}.jsonl"
    with file.open() as lines, records.open("w") as out:
        for line in filter(str.strip, lines):
            record = json.loads(line)
            prepared = "gold" in record
            out.write(json.dumps(convert(record) if prepared else record) + "\n")
    task = {
        "include": str(definition),
        "task": f"local_{file.stem}",
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(records)}},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
    }
    # JSON is YAML.
    (directory / f"{file.stem}.yaml").write_text(json.dumps(task))


def follows(sample: dict, answer: dict, metric: str, field: str) -> bool:
    """Whether both answers follow from their log-likelihoods by the harness's rule, which then differ by rounding."""
    lengths = [1 if metric == "acc" else len(arguments[1].removeprefix(" ")) for arguments in sample["arguments"]]

    def is_right(log_likelihoods: list) -> bool:
        values = [value / length for value, length in zip(log_likelihoods, lengths)]
        return values.index(max(values)) == answer["gold"]

    theirs = [float(response[0]) for response in sample["filtered_resps"]]
    return is_right(theirs) == (sample[metric] == 1.0) and is_right(answer["log_likelihoods"]) == answer[field]


def compare(name: str, samples: list, ours: dict) -> int:
    """Prints both results and where they differ; how many items differ by more than rounding explains."""
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    unexplained = abs(len(samples) - ours["items"])
    print(f"{name}: {len(samples)} items by the harness, {ours['items']} by foldgpt")
    for metric in ("acc", "acc_norm"):
        if metric not in samples[0] or metric not in ours:
            continue
        theirs = sum(sample[metric] == 1.0 for sample in samples)
        print(f"  {metric:8} {theirs} right by the harness, {round(ours[metric] * ours['items'])} by foldgpt")
    if "answers" not in ours:
        print("  no single answers to compare: run evaluate with --answers")
        return unexplained
    worst = 0.0
    for sample, answer in zip(samples, ours["answers"]):
        theirs = [float(response[0]) for response in sample["filtered_resps"]]
        off = max(abs(one - other) for one, other in zip(theirs, answer["log_likelihoods"]))
        worst = max(worst, off)
        metrics = [("acc", "right")] + [("acc_norm", "right_by_length")] * ("acc_norm" in sample)
        flipped = [metric for metric, field in metrics if (sample[metric] == 1.0) != answer[field]]
        odd = off > TOLERANCE or not all(follows(sample, answer, *pair) for pair in metrics)
        if odd or flipped:
            unexplained += odd
            print(f"  item {sample['doc_id']}: off by {off:.1e} nats, right for one alone in "
                  f"{', '.join(flipped) or 'nothing'}{'' if odd else ': a tie but for rounding'}")
            print(f"    harness {[round(value, 4) for value in theirs]}")
            print(f"    foldgpt {[round(value, 4) for value in answer['log_likelihoods']]}")
    print(f"  log-likelihoods differ by {worst:.1e} nats at most")
    return unexplained


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory that transformers loads")
    parser.add_argument("--ours", required=True, help="what `evaluate --tasks … --answers --json` printed")
    parser.add_argument("--limit", type=int, help="answer at most this many items of each task")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    args = parser.parse_args()
    ours = json.loads(pathlib.Path(args.ours).read_text())["tasks"]
    names = [file.stem for file in args.files]
    missing = [name for name in names if name not in ours]
    if missing:
        sys.exit(f"{args.ours} has nothing of {', '.join(missing)}")
    print(f"lm-eval {lm_eval.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as directory:
        for file in args.files:
            define(file, pathlib.Path(directory))
        os.environ.setdefault("HF_DATASETS_CACHE", str(pathlib.Path(directory) / "cache"))
        result = lm_eval.simple_evaluate(
            model=HFLM(pretrained=args.model, dtype="float32", device="cpu", batch_size=args.batch_size),
            tasks=[f"local_{name}" for name in names],
            task_manager=TaskManager(include_path=directory, include_defaults=False),
            limit=args.limit,
            log_samples=True,
            bootstrap_iters=0,
        )
    unexplained = sum(compare(name, result["samples"][f"local_{name}"], ours[name]) for name in names)
    print("all agree" if unexplained == 0 else f"{unexplained} items differ by more than rounding explains")
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
