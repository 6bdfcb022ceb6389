"""Sections of a reproduction's report about its grid of trainings."""

import dataclasses
from collections.abc import Iterator, Sequence

from recurrent_drafter.measure.ruler import Estimate
from recurrent_drafter.report import charts
from recurrent_drafter.report.document import Block, Paragraph, Picture, Section, Table
from recurrent_drafter.report.published import DISTILLATION
from recurrent_drafter.report.words import SCOPES, VERDICTS, beams, change, method, percent, place, training
from recurrent_drafter.reproduce.findings import Findings, Place, Recipe
from recurrent_drafter.reproduce.statistics import says


def sections(findings: Findings) -> Iterator[Section]:
    """Everything that the trainings have to say."""
    if not findings.trainings:
        return
    yield Section("Tokens per step of every training", list(everything(findings)))
    yield Section("Does distillation gain?", list(distillation(findings)))
    yield Section("Whole conversations or replies only?", list(scopes(findings)))
    yield Section("With and without recurrence", list(recurrence(findings)))
    yield Section("While they learnt", list(curves(findings)))


def everything(findings: Findings) -> Iterator[Block]:
    """All arms at all places."""
    arms, places = list(findings.trainings), findings.places
    rows = []
    for arm in arms:
        seeds = str(len(findings.trainings[arm]))
        rows.append([training(arm), seeds, *(f"{findings.estimate(arm, where):.2f}" for where in places)])
    yield Table(
        "Held-out tokens per step, with 95 % intervals: what was learnt, from which part of which set; the number of "
        "trainings (seeds); evaluation set and beams x length of the draft. The whole prefix tree is verified.",
        ["training", "seeds", *map(place, places)],
        rows,
    )
    yield Table(
        "The same for every seed, in the order of the seeds: how much trainings differ that differ in nothing else.",
        ["training", *map(place, places)],
        [[training(arm), *(" ".join(f"{x:.2f}" for x in findings.walks(arm, where).of_each_seed) for where in places)]
         for arm in arms],
    )  # fmt: skip
    if charts.can_draw():
        for name in dict.fromkeys(where.set for where in places):
            yield interval_picture(findings, [where for where in places if where.set == name])


def interval_picture(findings: Findings, places: Sequence[Place]) -> Picture:
    """Arms of one evaluation set."""
    groups: dict[str, dict[str, Estimate]] = {}
    for where in places:
        for arm in findings.trainings:
            group = groups.setdefault(f"{arm.training_set}\n{SCOPES[arm.scope]}\n{beams(where)}", {})
            group[method(arm)] = findings.estimate(arm, where)
    drawn = charts.intervals(groups, f"tokens per step on {places[0].set}, 95 % intervals")
    caption = f"Tokens per step on {places[0].set} by training set, scope and beams x length; colors are methods."
    return Picture(f"tokens-per-step-{places[0].set}", caption, drawn)


def compared(findings: Findings, pairs: Sequence[tuple[str, Recipe, Recipe]], caption: str) -> Table | None:
    """Ratios of tokens per step at every place; None where neither side was trained."""
    rows = []
    for name, arm, base in pairs:
        for where in findings.places:
            ratio = findings.gain(arm, base, where)
            if ratio is not None:
                rows.append([name, place(where), change(ratio), VERDICTS[says(ratio)]])
    return Table(caption, ["compared", "evaluated on", "tokens per step", "says"], rows) if rows else None


def distillation(findings: Findings) -> Iterator[Block]:
    """Methods against the text, beside the paper's ablation."""
    pairs = []
    for arm in findings.trainings:
        base = dataclasses.replace(arm, method="ground_truth")
        if arm != base:
            pairs.append((training(arm), arm, base))
    table = compared(
        findings,
        pairs,
        "Change of tokens per step over ground truth: same set, scope, seeds, starting weights and number of "
        "conversations; paired by held-out reply and seed, 95 % interval.",
    )
    if table is None:
        yield Paragraph("Not compared: there are no trainings of two methods.")
        return
    yield table
    yield Table(
        "The paper's own ablation (Vicuna 7B on an H100; grade S, read in a secondary source): a drafter that learnt "
        "from the text, and one that learnt from distilled targets.",
        ["beam width", "tokens per step", "change", "speed over autoregression", "change"],
        [
            [
                str(row.beam_width),
                "{:.2f} to {:.2f}".format(*row.tokens_per_step),
                percent(row.gain),
                "{:.2f} to {:.2f}".format(*row.speedup),
                percent(row.speedup[1] / row.speedup[0]),
            ]
            for row in DISTILLATION
        ],
    )
    seconds = sum(
        r["targets_seconds"] for arm, rs in findings.trainings.items() if arm.method == "distilled" for r in rs
    )
    yield Paragraph(
        f"What distilling takes is not in the time of a training: it is done once for each set and scope, and took "
        f"{seconds:.0f} seconds here. Training from the text has no such stage. At the same shape a step of all these "
        "drafters costs the same, so speed changes as tokens per step do."
    )


def scopes(findings: Findings) -> Iterator[Block]:
    """Replies only against whole conversations."""
    pairs = [
        (f"{method(arm)}; {arm.training_set}", arm, dataclasses.replace(arm, scope="full"))
        for arm in findings.trainings
        if arm.scope == "assistant"
    ]
    table = compared(findings, pairs, "Change of tokens per step when only replies are learnt from, paired as above.")
    yield table or Paragraph("Not compared: only one scope was trained.")
    yield Paragraph("The paper has no figures for this comparison that are known to this report.")


def recurrence(findings: Findings) -> Iterator[Block]:
    """The recurrent state against a running sum of embeddings."""
    pairs = [(training(arm), arm, dataclasses.replace(arm, rnn=False)) for arm in findings.trainings if arm.rnn]
    table = compared(
        findings,
        pairs,
        "Change of tokens per step with the recurrent state, over drafters that only add up the embeddings of the "
        "tokens drafted so far; paired as above.",
    )
    yield table or Paragraph("Not compared: drafters without recurrence were not trained.")
    yield Paragraph("The paper has no figures for this comparison that are known to this report.")


def curves(findings: Findings) -> Iterator[Block]:
    trained = [(arm, record) for arm, records in findings.trainings.items() for record in records]
    yield Table.of(
        "What every training did: steps, seconds, texts and positions learnt from, and the share of the target tokens "
        "that its draft vocabulary holds.",
        trained,
        {
            "training": lambda row: training(row[0]),
            "seed": lambda row: str(row[1]["seed"]),
            "steps": lambda row: f"{row[1]['steps']:,}",
            "seconds": lambda row: f"{row[1]['train_seconds']:.0f}",
            "texts": lambda row: f"{row[1]['texts']:,}",
            "positions": lambda row: f"{row[1]['roots']:,}",
            "draft vocabulary": lambda row: f"{row[1]['draft_vocab_size']:,}",
            "covers": lambda row: f"{row[1]['coverage']:.1%}",
        },
    )
    if not charts.can_draw():
        return
    series = {
        f"{method(arm)}, {SCOPES[arm.scope]}#{arm.training_set}{record['seed']}": [
            (point["step"], point["tokens_per_step"]) for point in record["curve"]
        ]
        for arm, record in trained
        if record["curve"]
    }
    if series:
        drawn = charts.lines(series, "training steps", "held-out tokens per step")
        caption = (
            "Held-out tokens per step (3 beams of 5, at most 12 nodes, first evaluation set) while training, a line "
            "for every training."
        )
        yield Picture("while-training", caption, drawn)
