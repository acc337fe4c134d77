#!/usr/bin/env python3
"""Steps of trainer and of peer.py, in turns, and their ratio: see `throughput`."""

import argparse
import datetime
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "configs/models/bench-42m.json"
SEQUENCE, GLOBAL_BATCH = 256, 8
# Steps of a run that are not counted: memory is fresh, and pages are first touched.
WARM_UP = 3
CASES = [(precision, ranks) for precision in ("fp32", "bf16") for ranks in (1, 2)]


def parse():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trainer", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="one short round, which proves the script")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, help="steps of a run, of which the first 3 are not counted")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="shared by the ranks")
    parser.add_argument("--only", default="", help='a part of a name, such as "bf16" or "2 ranks"')
    options = parser.parse_args()
    options.steps = options.steps or (6 if options.quick else 15)
    options.rounds = 1 if options.quick else options.rounds
    return options


def title(case):
    precision, ranks = case
    return f"{precision}, {ranks} rank{'s' if ranks > 1 else ''}"


def events(command, environment):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    found = []
    for line in done.stdout.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def steps_of(found, steps):
    """Seconds of each counted step, and the last loss."""
    by_step = {event["step"]: event for event in found if event.get("event") == "step"}
    if sorted(by_step) != list(range(1, steps + 1)):
        sys.exit(f"steps 1 to {steps} are wanted, there are {sorted(by_step)}")
    return [by_step[step]["step_s"] for step in range(WARM_UP + 1, steps + 1)], by_step[steps]["loss"]


def environment(threads):
    # What trainer's agent sets for its workers; PyTorch gets the same.
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TRAINER_LOG": "warn"}


def trainer(options, case, scratch):
    precision, ranks = case
    threads = max(1, options.cores // ranks)
    store = scratch / "store"
    shutil.rmtree(store, ignore_errors=True)
    config = scratch / "run.toml"
    config.write_text(
        f"""
        model.config = "{MODEL}"
        [data]
        train = "file://{scratch / 'data'}"
        sequence_length = {SEQUENCE}
        [train]
        steps = {options.steps}
        global_batch = {GLOBAL_BATCH}
        max_micro_batch = {GLOBAL_BATCH // ranks}
        threads = {threads}
        precision = "{precision}"
        schedule.warmup_steps = 1
        [parallel]
        nproc_per_node = {ranks}
        device = "cpu"
        [checkpoint]
        every = "{options.steps} steps"
        """
    )
    command = [options.trainer.resolve(), "run", config, "--run-id", "throughput", "--store", f"file://{store}"]
    command.append("--json")
    return steps_of(events(command, environment(threads)), options.steps)


def pytorch(options, case, scratch):
    precision, ranks = case
    threads = max(1, options.cores // ranks)
    arguments = {
        "model": MODEL,
        "data": scratch / "data",
        "ranks": ranks,
        "threads": threads,
        "global-batch": GLOBAL_BATCH,
        "sequence-length": SEQUENCE,
        "validation": 1,
        "steps": options.steps,
        "every": options.steps,
        "store": f"file://{scratch / 'dcp'}",
    }
    command = [sys.executable, ROOT / "benches/peers/peer.py", "train"]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    if precision == "bf16":
        command.append("--bf16")
    return steps_of(events(command, environment(threads)), options.steps)


def interval(ratios):
    """The 95 % bootstrap interval of the median; the same for the same ratios."""
    draw = random.Random(1)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(10_000))
    return medians[249], medians[9749]


def sign_test(ratios):
    """The probability that as many ratios lie on one side of 1 by chance (two-sided)."""
    above, count = sum(ratio > 1 for ratio in ratios), sum(ratio != 1 for ratio in ratios)
    tail = sum(math.comb(count, k) for k in range(max(above, count - above), count + 1)) / 2**count
    return min(1.0, 2 * tail)


def verdict(low, high):
    return "better" if low > 1 else "worse" if high < 1 else "undecided"


def summary(rounds):
    ratios = [theirs["step_s"] / own["step_s"] for own, theirs in rounds]
    low, high = interval(ratios)
    tokens = SEQUENCE * GLOBAL_BATCH
    return {
        "trainer_step_s": statistics.median(own["step_s"] for own, _ in rounds),
        "pytorch_step_s": statistics.median(theirs["step_s"] for _, theirs in rounds),
        "trainer_tokens_per_s": tokens / statistics.median(own["step_s"] for own, _ in rounds),
        "pytorch_tokens_per_s": tokens / statistics.median(theirs["step_s"] for _, theirs in rounds),
        "ratio": statistics.median(ratios),
        "ratio_95": [low, high],
        "sign_test_p": sign_test(ratios),
        "verdict": verdict(low, high) if len(ratios) > 1 else "one round decides nothing",
    }


def table(results, options):
    lines = [
        f"# Throughput: trainer and PyTorch DDP (eager), {options.cores} cores, {options.rounds} rounds",
        "",
        f"The Llama of 41.7 M parameters; {GLOBAL_BATCH} sequences of {SEQUENCE} tokens a step; ranks share the cores.",
        "A ratio above 1 favours trainer: PyTorch's median step over trainer's in the same round.",
        "",
        "| case | trainer, s a step | PyTorch, s a step | trainer, tokens/s | ratio | 95 % | sign test | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, it in results.items():
        low, high = it["ratio_95"]
        lines.append(
            f"| {name} | {it['trainer_step_s']:.3f} | {it['pytorch_step_s']:.3f} | {it['trainer_tokens_per_s']:.0f} "
            f"| {it['ratio']:.2f} | {low:.2f} to {high:.2f} | p = {it['sign_test_p']:.2g} | {it['verdict']} |"
        )
    return "\n".join(lines) + "\n"


def main():
    options = parse()
    cases = [case for case in CASES if options.only in title(case) and case[1] <= max(1, options.cores)]
    if not cases:
        sys.exit(f"no case is named {options.only!r}: there are {', '.join(map(title, CASES))}")
    rounds = {title(case): [] for case in cases}
    with tempfile.TemporaryDirectory(prefix="trainer-throughput-") as folder:
        scratch = Path(folder)
        text = f"{ROOT}/src/**/*.rs"
        prepare = [options.trainer.resolve(), "data", "prepare", "--tokenizer", "train:2048"]
        events([*prepare, "--input", text, "--out", scratch / "data"], os.environ)
        for number in range(options.rounds):
            for case in cases:
                # In turns, so that neither is always the one that finds a warm machine.
                order = [trainer, pytorch] if number % 2 == 0 else [pytorch, trainer]
                measured = {}
                for contender in order:
                    # What the one before has written is not to be flushed during this one's steps.
                    os.sync()
                    steps, loss = contender(options, case, scratch)
                    measured[contender.__name__] = {"step_s": statistics.median(steps), "steps_s": steps, "loss": loss}
                    name = f"{contender.__name__:8}"
                    said = f"{name} {statistics.median(steps):.3f} s a step, loss {loss:.3f}"
                    print(f"round {number + 1}, {title(case):14}: {said}", file=sys.stderr, flush=True)
                rounds[title(case)].append((measured["trainer"], measured["pytorch"]))
    results = {name: summary(of_case) for name, of_case in rounds.items()}
    markdown = table(results, options)
    print(markdown)
    if options.quick or options.only:
        return
    stem = f"{datetime.date.today()}-{options.cores}-core-{platform.machine()}-throughput"
    raw = {name: [{"trainer": own, "pytorch": theirs} for own, theirs in of_case] for name, of_case in rounds.items()}
    kept = {"cores": options.cores, "rounds": options.rounds, "results": results, "raw": raw}
    (ROOT / "benches/results" / f"{stem}.json").write_text(json.dumps(kept, indent=1) + "\n")
    (ROOT / "benches/results" / f"{stem}.md").write_text(markdown)


if __name__ == "__main__":
    main()
