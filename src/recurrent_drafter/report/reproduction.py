"""The report of a reproduction: what a stranger has to know, the findings, and how they were made."""

import dataclasses
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from recurrent_drafter.measure.ruler import Estimate
from recurrent_drafter.report import sweeps, trainings
from recurrent_drafter.report.charts import MISSING, can_draw
from recurrent_drafter.report.document import Block, Code, Document, Items, Paragraph, Section, Table
from recurrent_drafter.report.published import DISTILLATION, MAIN, TREE_SAVES
from recurrent_drafter.report.words import SCOPES, VERDICTS, change, percent, place
from recurrent_drafter.reproduce.findings import Findings, Place, Recipe
from recurrent_drafter.reproduce.results import RESULTS, Record, Results
from recurrent_drafter.reproduce.statistics import says

NAME = "report"


def write_report(results: Results, made: Record) -> list[Path]:
    """``report.html`` and ``report.md`` of all outcomes so far; where they are, and the raw results.

    Args:
        results: a reproduction, finished or not.
        made: `provenance` of the command that asks for the report.
    """
    findings = Findings(results.records)
    document = Document(
        f"Recurrent drafting reproduced with {results.options.llm_name_or_path}",
        [
            Section("In short", list(summary(results, findings))),
            Section("What this is about", list(background())),
            Section("What was compared", list(setting(results, findings))),
            *trainings.sections(findings),
            *sweeps.sections(findings),
            Section("What failed", list(failures(results, findings))),
            Section("What these figures do not tell", list(limits())),
            Section("How to make this again", list(origin(results, findings, made))),
        ],
    )
    raw = results.folder / RESULTS
    return [*document.write(results.folder, NAME), *([raw] if raw.exists() else [])]


def summary(results: Results, findings: Findings) -> Iterator[Block]:
    """The findings in a few sentences, whatever they are."""
    lines = [*distilled_line(findings), *speed_line(findings), *tree_line(findings)]
    done, planned = len(findings.records) - len(findings.failed), len(results.plan.names)
    if done < planned:
        lines.append(f"{done} of {planned} jobs have finished, {len(findings.failed)} have failed.")
    yield Items(lines)
    if not can_draw():
        yield Paragraph(MISSING.capitalize() + ".")


def distilled_line(findings: Findings) -> Iterator[str]:
    """Distilled targets against ground truth: the last arm at every place, and how all comparisons ended."""
    arms = [arm for arm in findings.trainings if arm.method == "distilled" and arm.rnn]
    said: list[tuple[Recipe, Place, Estimate]] = []
    for arm in arms:
        for where in findings.places:
            ratio = findings.gain(arm, dataclasses.replace(arm, method="ground_truth"), where)
            if ratio is not None:
                said.append((arm, where, ratio))
    for arm, where, ratio in said:
        if arm == arms[-1]:
            yield (
                f"Distilled targets over ground truth, learnt from {SCOPES[arm.scope]} of {arm.training_set}, "
                f"evaluated on {place(where)}: {change(ratio)}, {VERDICTS[says(ratio)]}."
            )
    if len({arm for arm, *_ in said}) > 1:
        ended = [says(ratio) for *_, ratio in said]
        yield (
            f"Of all {len(said)} such comparisons (sets, scopes, beams), {ended.count('more')} say more tokens per "
            f"step, {ended.count('fewer')} fewer, and {ended.count('undecided')} are undecided."
        )
    both = " and ".join(f"{percent(row.gain)} at {row.beam_width} beams" for row in DISTILLATION)
    yield f"The paper reports {both} (7B model; grade S)."


def speed_line(findings: Findings) -> Iterator[str]:
    """The fastest decoding, beside the paper's."""
    shapes = findings.sweep("shapes")
    if shapes is not None:
        first = shapes["batches"][0]
        best, auto = first["decoded"][first["best"]], first["decoded"][sweeps.AUTO]
        yield (
            f"The last drafter decodes {best['speedup'][0]:.2f} times as fast as plain decoding at its fastest fixed "
            f"shape ({first['best']}, {best['tokens_per_step']:.2f} tokens per step), {auto['speedup'][0]:.2f} times "
            f"where drafts follow cost; output identical: {sweeps.identical(first)}. The paper: {MAIN[0].speedup:.2f} "
            f"times at {MAIN[0].tokens_per_step:.2f} tokens per step ({MAIN[0].where}; S)."
        )


def tree_line(findings: Findings) -> Iterator[str]:
    """What merging saves."""
    tree = findings.sweep("tree")
    if tree is not None and tree["rows"]:
        saved = [1 - row["distinct"] / row["candidates"] for row in tree["rows"]]
        low, high = TREE_SAVES
        yield (
            f"The prefix tree saves {min(saved):.0%} to {max(saved):.0%} of the draft tokens to verify; the paper: "
            f"{low:.0%} to {high:.0%} (S)."
        )


def background() -> Iterator[Block]:
    """The words that the rest needs."""
    yield Paragraph(
        "A language model (here called the verifier) writes one token at a time, and each token costs one pass "
        "through the whole model. Recurrent drafting (ReDrafter, arXiv 2403.09919) lets a small network, the "
        "drafter, guess several tokens ahead. One pass of the verifier checks all guesses together and keeps those "
        "that it would have written itself, so that the text is exactly the verifier's own and only the speed "
        "changes."
    )
    yield Items(
        [
            "Tokens per step: how many tokens one pass of the verifier yields on average, guesses that were kept and "
            "the one that the verifier adds. 1 would be no gain. The pass over the prompt is not counted.",
            "Beams x length: how many guesses are made in parallel, and how many tokens long they are.",
            "Ground truth: the drafter learns the text of the data set. Knowledge distillation: it learns the "
            "verifier's probabilities along that text. Distilled targets, the paper's method: it learns what the "
            "verifier itself would write next at every position.",
            "Whole conversations or replies only: the positions that are learnt from.",
            "Interval: 95 % of samples drawn anew from the held-out replies and the seeds, both at once, fall inside "
            "(bootstrap). The unit is the reply, because steps along one reply depend on each other. Two methods are "
            "compared on the same replies and the same seeds. With two or three seeds an interval says little about "
            "how much trainings vary: look at the figures of each seed.",
        ]
    )


def setting(results: Results, findings: Findings) -> Iterator[Block]:
    """Grid, sets and budget."""
    options = results.options
    calibration = findings.sweep("calibration")
    budget = (
        f"Every training took {calibration['max_steps']:,} steps, what a training was measured to take in "
        f"{options.cell_seconds:g} seconds on average before the first one"
        if calibration is not None
        else "Every training took equally many steps or epochs over the same conversations"
    )
    budget += ": equal steps, not equal seconds"
    yield Paragraph(
        f"Verifier: {options.llm_name_or_path}. {budget}. All learn to predict 5 tokens, start from the same weights "
        f"for the same seed, and read the first {options.max_examples:,} conversations of a training set, or as many "
        f"as there are. Draft vocabulary: {options.draft_vocab_size}. No checkpoint is chosen: what is evaluated is "
        "what training ends with. Drafters are evaluated along the verifier's own greedy replies (up to the end "
        "token), which gives the same figure as decoding them would."
    )
    rows = []
    for source in options.evaluation_sets:
        part = source.held_out_split(options.training_sets)
        of_it = "its held-out part" if part == "eval" else "all of it: nothing of it was trained on"
        counts = findings.replies(source.label) if findings.trainings else ("", "")
        rows.append([source.label, of_it, *(f"{count:,}" if count else "" for count in counts)])
    yield Table("Evaluation sets.", ["set", "part", "replies", "tokens walked along"], rows)


def failures(results: Results, findings: Findings) -> Iterator[Block]:
    """Jobs without figures, and why."""
    rows = [[record["name"], record["error"]] for record in findings.failed]
    rows += [[name, "has not been run yet"] for name in results.pending]
    yield (
        Table("Jobs without figures.", ["job", "why"], rows) if rows else Paragraph("Nothing: every job has finished.")
    )


def limits() -> Iterator[Block]:
    """What a careful reader would ask."""
    lines = [
        "The paper trains for Vicuna models on eight H100 and evaluates on full benchmarks. Model, data, amount of "
        "training and hardware differ here, so absolute figures cannot match; directions and ratios can be compared.",
        "Methods are compared after equally many steps; what distilling takes comes on top. A longer training may "
        "order them otherwise.",
        "Speeds were measured on one machine; what else ran there moves them. Predicted speeds leave out keeping the "
        "accepted tokens and the loop itself.",
        "Sweeps were run with one drafter, the last of the grid.",
        "Several comparisons are shown: some of many 95 % intervals exclude zero by chance.",
    ]
    yield Items(lines)


def origin(results: Results, findings: Findings, made: Record) -> Iterator[Block]:
    """Command, versions, hardware."""
    yield Code(shlex.join(made["argv"]))
    yield Paragraph(
        "Finished jobs are used again, others are run. The raw figures, a line for each job, lie beside this report in "
        f"{RESULTS}; each training's settings in its run.json."
    )
    places = [made, *(record["made"] for record in findings.records if "made" in record)]
    kinds = list(dict.fromkeys(json.dumps([x["commit"], x["versions"], x["hardware"]], sort_keys=True) for x in places))
    rows = []
    for commit, versions, hardware in map(json.loads, kinds):
        rows.append(
            [
                hardware["device"],
                f"{hardware['threads']} threads of {hardware['cores']} cores, {hardware['system']}",
                ", ".join(f"{name} {version}" for name, version in versions.items()),
                commit or "",
            ]
        )
    yield Table(
        f"Where it was computed; report of {made['date']}.", ["hardware", "threads", "versions", "commit"], rows
    )
    settled = dataclasses.asdict(results.options)
    yield Table(
        "Settings, defaults included.", ["option", "value"], [[f"--{n}", _shown(v)] for n, v in settled.items()]
    )


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
