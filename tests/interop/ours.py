"""The example `timing` as a process that works on request, and runs nothing while it is not asked."""

import json
import os
import pathlib
import subprocess
import sys

BINARY = str(pathlib.Path(__file__).resolve().parents[2] / "target/release/examples/timing")


class Timing:
    def __init__(self, binary: str, threads: int, flags: list) -> None:
        # Unless they are set, as .cargo/config.toml sets them for `cargo run`.
        environment = {"CANDLE_BARRIER_POOL_SPIN_LIMIT": "10", "MIMALLOC_PURGE_DELAY": "-1"} | os.environ
        environment["RAYON_NUM_THREADS"] = str(threads)
        self.process = subprocess.Popen(
            [binary, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.conditions = self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.process.args[0]} ended with status {self.process.wait()}")
        return json.loads(line)

    def seconds(self, work: str) -> float:
        self.process.stdin.write(work + "\n")
        self.process.stdin.flush()
        return self._answer()["seconds"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
