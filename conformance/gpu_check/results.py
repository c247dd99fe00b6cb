"""From what the steps left to the result file: counts of verdicts, and the tables."""

import json
import re
from collections import Counter
from pathlib import Path

# As in the names of cases.
WORLD = re.compile(r"/p(\d+)-")
DTYPE = re.compile(r"-(f64|f32|bf16|f16)(?:-|$)")
VERDICTS = ("exact", "pass", "refused", "not claimed", "known", "fail", "crash", "hang", "unclear")
FAILURES = ("fail", "crash", "hang", "unclear")
SHOWN = 12  # failures of a step, in Markdown
TESTS = re.compile(r"test result: .*?(\d+) passed; (\d+) failed; (\d+) ignored")


def verdicts(path: Path | None) -> dict | None:
    """Counts of the lines of `run --json`: of all, of each number of ranks, of each element type; and the failures."""
    if path is None or not path.exists():
        return None
    counts = {"all": Counter(), "ranks": {}, "dtypes": {}}
    failures, worst = [], {}
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # The last line of a run that was ended.
            continue
        verdict, case = line["verdict"], line["case"]
        counts["all"][verdict] += 1
        for pattern, of in ((WORLD, "ranks"), (DTYPE, "dtypes")):
            if found := pattern.search(case):
                counts[of].setdefault(found[1], Counter())[verdict] += 1
                worst[found[1]] = max(worst.get(found[1], 0.0), line["worst_ratio"] or 0.0)
        if verdict in FAILURES:
            failures.append({key: line[key] for key in ("case", "verdict", "sentence", "mistake")})
    return counts | {"worst_ratio": worst, "failures": failures}


def tests(log: Path) -> dict | None:
    """What a test program says at its end."""
    found = TESTS.findall(log.read_text(encoding="utf-8", errors="replace"))
    if not found:
        return None
    return dict(zip(("passed", "failed", "ignored"), map(int, found[-1])))


def last_words(log: Path) -> str:
    """The last error of a log, or else its last line: why there is nothing to show."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or [""])[-1].replace("|", "/")[:300]


def counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts.get(verdict)) or "none"


def outcome(step: dict) -> str:
    """Verdicts, tests, or why there are none."""
    if step["left_out"]:
        return f"not run: {step['left_out']}"
    if step["verdicts"]:
        return counted(step["verdicts"]["all"])
    if step["tests"]:
        return ", ".join(f"{count} {what}" for what, count in step["tests"].items())
    return step["last_words"]


def ended(step: dict) -> str:
    if step["left_out"]:
        return ""
    return "time limit" if step["timed_out"] else str(step["exit_code"])


def markdown(result: dict) -> str:
    """The result file for people."""
    about, steps = result["machine"], result["steps"]
    text = [f"# GPU check, {about['date']}", ""]
    if result["rehearsal"]:
        text += ["**A rehearsal on the CPU of a machine, not a result: it shows that the check itself runs.**", ""]
    packages = [f"{name} {found or 'not installed'}" for name, found in about["packages"].items()]
    rows = {
        "GPUs": "; ".join(about["gpus"]) or "none",
        "driver": about["driver"],
        "host": f"{about['processor']}, {about['cores']} cores; {about['system']}",
        "torch": f"{about['torch']}, CUDA {about['cuda']}, cuDNN {about['cudnn']}, NCCL {about['nccl of torch']}",
        "NCCL that was found": "; ".join(f"{path}: {number}" for path, number in about["nccl that was found"].items()),
        "MPI": about["mpi"],
        "Python": ", ".join([about["python"], *packages]),
        "programs": f"commit {about['programs']['commit']}, {about['programs']['rustc']}",
        "took": f"{result['seconds']:.0f} s",
    }
    text += ["| | |", "| --- | --- |", *(f"| {name} | {value or 'none'} |" for name, value in rows.items()), ""]
    text += ["| part | step | exit code | seconds | outcome |", "| --- | --- | --- | --- | --- |"]
    for step in steps:
        seconds = "" if step["left_out"] else f"{step['seconds']:.1f}"
        text.append(f"| {step['part']} | {step['name']} | {ended(step)} | {seconds} | {outcome(step)} |")
    judged = [step for step in steps if step["verdicts"]]
    for title, of in (("ranks", "ranks"), ("element type", "dtypes")) if judged else ():
        text += ["", f"Verdicts by {title}:", "", f"| step | {title} | verdicts | largest error, of what it may be |"]
        text.append("| --- | --- | --- | --- |")
        for step in judged:
            counts = step["verdicts"]
            for name, count in sorted(counts[of].items()):
                worst = counts["worst_ratio"][name]
                text.append(f"| {step['name']} | {name} | {counted(count)} | {worst:.3g} |")
    for step in steps:
        text += section(step)
    text += ["", "## Commands", ""]
    for step in steps:
        if not step["left_out"]:
            variables = "".join(f"{name}={value} " for name, value in step["variables"].items())
            text.append(f"- {step['name']}: `{variables}{step['shown']}`")
    return "\n".join(text) + "\n"


def section(step: dict) -> list[str]:
    """What there is to read of one step: the kernels, the benchmark's tables, failures."""
    failures = (step["verdicts"] or {"failures": []})["failures"]
    shown = [f"- `{failure['case']}`: {failure['verdict']}: {failure['sentence']}" for failure in failures[:SHOWN]]
    if len(failures) > SHOWN:
        shown.append(f"- and {len(failures) - SHOWN} more, in the JSON file")
    is_silent = not (step["printed"] or shown)
    return [] if is_silent else ["", f"## {step['name']}", "", *filter(None, [step["printed"]]), *shown]
