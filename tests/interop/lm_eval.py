"""Answers tasks with lm-evaluation-harness and compares with what `evaluate --tasks … --answers --json` said.

    python tests/interop/lm_eval.py --model DIRECTORY --ours OURS.json [--limit N] piqa.jsonl arc_easy.jsonl winogrande.jsonl
    python tests/interop/lm_eval.py --model DIRECTORY --write EXPECTED.json piqa.jsonl …

Files are JSON Lines in the harness's own formats, named after their task; PIQA, ARC and WinoGrande may be prepared
records too. The tasks are the harness's own definitions with another source of records; nothing is fetched. With
`--write`, what the harness finds goes into a file, which is how `tests/fixtures/tasks/expected.json` was made. Needs
torch and `lm-eval[hf]` from PyPI.
"""

import argparse
import json
import math
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

# The harness draws errors of perplexities at random, and computes those of means exactly if it may draw at all.
DRAWS = 2


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
    "hellaswag": ("hellaswag/hellaswag.yaml", None),
    "winogrande": ("winogrande/default.yaml", winogrande),
    "boolq": ("super_glue/boolq/default.yaml", None),
    "openbookqa": ("openbookqa/openbookqa.yaml", None),
    "sciq": ("sciq/sciq.yaml", None),
    "copa": ("super_glue/copa/default.yaml", None),
    "lambada_openai": ("lambada/lambada_openai.yaml", None),
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
            if prepared and convert is None:
                sys.exit(f"{file}: a prepared record, expected those of {file.stem}'s own dataset")
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


def log_likelihoods(sample: dict) -> list:
    return [float(response[0]) for response in sample["filtered_resps"]]


def follows(sample: dict, answer: dict, metric: str, field: str) -> bool:
    """Whether both answers follow from their log-likelihoods by the harness's rule, which then differ by rounding."""
    theirs = log_likelihoods(sample)
    if len(theirs) == 1:
        # Whether a model would have said it cannot be read from how likely it is.
        return (sample[metric] == 1.0) == answer[field]
    lengths = [1 if metric == "acc" else len(arguments[1].removeprefix(" ")) for arguments in sample["arguments"]]

    def is_right(log_likelihoods: list) -> bool:
        values = [value / length for value, length in zip(log_likelihoods, lengths)]
        return values.index(max(values)) == answer["gold"]

    return is_right(theirs) == (sample[metric] == 1.0) and is_right(answer["log_likelihoods"]) == answer[field]


def number(result: dict, metric: str) -> float | None:
    """What the harness found; nothing where it has no such metric, or says that there is no number."""
    value = result.get(f"{metric},none")
    return None if value is None or value == "N/A" else float(value)


def compare_means(result: dict, samples: list, ours: dict) -> int:
    """Prints accuracies with their errors, and perplexity; how many differ although as many items are right."""
    unexplained = 0
    for metric, error in (("acc", "stderr"), ("acc_norm", "acc_norm_stderr")):
        if metric not in samples[0] and metric not in ours:
            continue
        if metric not in samples[0] or metric not in ours:
            print(f"  {metric:8} by {'the harness' if metric in samples[0] else 'foldgpt'} alone")
            unexplained += 1
            continue
        theirs = sum(sample[metric] == 1.0 for sample in samples)
        right = round(ours[metric] * ours["items"])
        errors = number(result, f"{metric}_stderr"), ours.get(error)
        print(f"  {metric:8} {theirs} right by the harness, {right} by foldgpt; standard errors {errors[0]}, {errors[1]}")
        if theirs == right and len(samples) == ours["items"]:
            same = errors[0] == errors[1] or (None not in errors and abs(errors[0] - errors[1]) < 1e-9)
            unexplained += not same
    perplexities = number(result, "perplexity"), ours.get("perplexity")
    if perplexities != (None, None):
        print(f"  perplexity {perplexities[0]} by the harness, {perplexities[1]} by foldgpt")
        unexplained += None in perplexities or abs(math.log(perplexities[0] / perplexities[1])) > TOLERANCE
    return unexplained


def compare_answers(samples: list, answers: list) -> int:
    """Prints items that differ; of how many the difference is more than rounding explains."""
    unexplained = 0
    worst = 0.0
    for sample, answer in zip(samples, answers):
        theirs = log_likelihoods(sample)
        off = max(abs(one - other) for one, other in zip(theirs, answer["log_likelihoods"]))
        worst = max(worst, off)
        metrics = [("acc", "right")] + [("acc_norm", "right_by_length")] * ("right_by_length" in answer)
        metrics = [(metric, field) for metric, field in metrics if metric in sample]
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


def compare(name: str, result: dict, samples: list, ours: dict) -> int:
    """Prints both results and where they differ; how many differences rounding does not explain."""
    print(f"{name}: {len(samples)} items by the harness, {ours['items']} by foldgpt")
    unexplained = abs(len(samples) - ours["items"]) + compare_means(result, samples, ours)
    if "answers" not in ours:
        print("  no single answers to compare: run evaluate with --answers")
        return unexplained
    return unexplained + compare_answers(samples, ours["answers"])


def expected(result: dict, samples: list) -> dict:
    """What the harness found, under the names that `evaluate` uses."""
    metrics = {"acc": "acc", "stderr": "acc_stderr", "acc_norm": "acc_norm", "acc_norm_stderr": "acc_norm_stderr",
               "perplexity": "perplexity"}
    found = {ours: number(result, theirs) for ours, theirs in metrics.items()}
    found = {name: value for name, value in found.items() if value is not None}
    return found | {"items": len(samples), "log_likelihoods": [log_likelihoods(sample) for sample in samples]}


def answer(files: list, model: str, batch_size: int, limit: int | None) -> dict:
    """Of every file's task, what the harness found and its samples in the file's order."""
    with tempfile.TemporaryDirectory() as directory:
        for file in files:
            define(file, pathlib.Path(directory))
        os.environ.setdefault("HF_DATASETS_CACHE", str(pathlib.Path(directory) / "cache"))
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=batch_size),
            tasks=[f"local_{file.stem}" for file in files],
            task_manager=TaskManager(include_path=directory, include_defaults=False),
            limit=limit,
            log_samples=True,
            bootstrap_iters=DRAWS,
        )
    in_order = {file.stem: sorted(found["samples"][f"local_{file.stem}"], key=lambda sample: sample["doc_id"])
                for file in files}
    return {name: (found["results"][f"local_{name}"], samples) for name, samples in in_order.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory that transformers loads")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ours", type=pathlib.Path, help="what `evaluate --tasks … --answers --json` printed")
    what.add_argument("--write", type=pathlib.Path, help="write what the harness finds into this file")
    parser.add_argument("--limit", type=int, help="answer at most this many items of each task")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    args = parser.parse_args()
    ours = json.loads(args.ours.read_text())["tasks"] if args.ours else {}
    missing = [file.stem for file in args.files if args.ours and file.stem not in ours]
    if missing:
        sys.exit(f"{args.ours} has nothing of {', '.join(missing)}")
    versions = f"lm-eval {lm_eval.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    print(versions)
    found = answer(args.files, args.model, args.batch_size, args.limit)
    if args.write:
        tasks = {name: expected(*of_task) for name, of_task in found.items()}
        args.write.write_text(json.dumps({"made_with": versions, "tasks": tasks}, indent=1) + "\n")
        return 0
    unexplained = sum(compare(name, *of_task, ours[name]) for name, of_task in found.items())
    print("all agree" if unexplained == 0 else f"{unexplained} differences are more than rounding explains")
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
