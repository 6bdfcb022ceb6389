"""Sections of a reproduction's report about the sweeps with one trained drafter."""

from collections.abc import Iterator

from recurrent_drafter.measure.arms import AUTO
from recurrent_drafter.measure.ruler import BUG, TIE, Estimate, Verdict, interval, ratio_of_sums, verdict
from recurrent_drafter.report import charts
from recurrent_drafter.report.document import Block, Paragraph, Picture, Section, Table
from recurrent_drafter.report.published import APPLE_MLX, BEST_WIDTH, MAIN, TREE_SAVES, VOCABULARY
from recurrent_drafter.reproduce.findings import Findings
from recurrent_drafter.reproduce.results import Record


def sections(findings: Findings) -> Iterator[Section]:
    """One for each sweep that has finished."""
    if (shapes := findings.sweep("shapes")) is not None:
        yield Section("Speed, beside published speeds", list(speed(shapes)))
        yield Section("Beam width and length", list(width_and_length(shapes)))
        yield Section("Batch size", list(batches(shapes)))
    if (tree := findings.sweep("tree")) is not None:
        yield Section("What the prefix tree saves", list(prefix_tree(tree)))
    if (vocabulary := findings.sweep("vocabulary")) is not None:
        yield Section("Size of the draft vocabulary", list(draft_vocabulary(vocabulary)))


def protocol(shapes: Record) -> str:
    """What a speed is nothing without."""
    whole = all("decoding_only" in entry for entry in shapes["batches"][0]["decoded"].values())
    return (
        f"greedy, {shapes['dtype']}, {shapes['prompts']} prompts, exactly {shapes['new_tokens']} new tokens each (end "
        f"tokens ignored), prefill {'included' if whole else 'excluded'}, drafter {shapes['drafter']}"
    )


def identical(batch: Record) -> str:
    """What became of the comparison with plain autoregression's output."""
    return verdict([*[Verdict(BUG)] * batch["bugs"], *[Verdict(TIE)] * batch["ties"]])


def measured(entry: Record) -> str:
    return f"{Estimate(*entry['speedup']):.2f}"


def decoding_only(entry: Record) -> str:
    """Nothing in what was measured before the whole reply was."""
    return f"{Estimate(*entry.get('decoding_only', [float('nan')])):.2f}"


def walked_along(row: Record) -> Estimate:
    """One drafter's tokens per step, with an interval over replies."""
    return interval(list(zip(row["tokens"], row["steps"], strict=True)), ratio_of_sums)


def speed(shapes: Record) -> Iterator[Block]:
    """The fastest ways at batch 1, and everybody else's."""
    first = shapes["batches"][0]
    own = [
        [f"here: {name}", measured(entry), decoding_only(entry), f"{entry['tokens_per_step']:.2f}",
         "this machine, see the end", "measured"]
        for name, entry in first["decoded"].items()
        if name in (AUTO, first["best"])
    ]  # fmt: skip
    published = [[x.what, f"{x.speedup:.2f}", "", f"{x.tokens_per_step:.2f}", x.where, x.grade] for x in MAIN]
    yield Table(
        f"Speed over plain autoregression in the same loop, and tokens per step. Here: batch 1, {protocol(shapes)}; "
        "median over prompts with its 95 % interval. Published: grade P was read in the primary source, S in a "
        "secondary one.",
        ["what", "speed", "decoding only", "tokens per step", "where", "grade"],
        own + published,
    )
    yield Paragraph(
        f"Output identical to plain autoregression's: {identical(first)}. Other models, data and hardware stand "
        "beside each other here: only the order of magnitude can be compared. On Apple's own laptops, its MLX code "
        f"reports {APPLE_MLX} (P)."
    )


def width_and_length(shapes: Record) -> Iterator[Block]:
    """Tokens per step and speed of every shape."""
    walked = {(row["beam_width"], row["beam_length"]): walked_along(row) for row in shapes["whole"]}
    predicted = {
        f"batch {batch['batch_size']}": {
            (cell["shape"]["beam_width"], cell["shape"]["beam_length"]): cell for cell in batch["predicted"]
        }
        for batch in shapes["batches"]
    }
    if charts.can_draw():
        tokens = {"whole tree": {at: estimate.value for at, estimate in walked.items()}}
        drawn = charts.svg(charts.heat_maps(tokens, "", "tokens per step"))
        yield Picture("tokens-by-shape", "Tokens per step over beam width and length, whole tree.", drawn)
        speeds = {name: {at: cell["speedup"] for at, cell in cells.items()} for name, cells in predicted.items()}
        drawn = charts.svg(charts.heat_maps(speeds, "", "speed over autoregression (predicted)"))
        caption = "Predicted speed over beam width and length, at the number of tree nodes that is fastest there."
        yield Picture("speed-by-shape", caption, drawn)
    first = next(iter(predicted.values()))
    yield Table.of(
        "Every shape. Tokens per step with the whole tree, along the replies that trainings are evaluated on, with a "
        "95 % interval over replies. Then what is fastest at batch 1: the number of tree nodes, its tokens per step "
        "and its speed over autoregression, predicted from measured times of verifying and drafting, with replies as "
        "in the table of speeds.",
        sorted(first.items(), key=lambda item: item[0]),
        {
            "beams x length": lambda row: "{} x {}".format(*row[0]),
            "tokens per step": lambda row: f"{walked[row[0]]:.2f}",
            "fastest nodes": lambda row: str(row[1]["shape"]["max_tree_nodes"]),
            "tokens per step then": lambda row: f"{row[1]['tokens_per_step']:.2f}",
            "predicted speed": lambda row: f"{row[1]['speedup']:.2f}",
        },
    )
    yield Paragraph(f"In the paper, too, the best width depends on the hardware: {BEST_WIDTH} (S).")


def batches(shapes: Record) -> Iterator[Block]:
    rows = []
    for batch in shapes["batches"]:
        for name, entry in batch["decoded"].items():
            if name in (AUTO, batch["best"]):
                size = str(batch["batch_size"])
                runs = str(-(-shapes["prompts"] // batch["batch_size"]))
                speeds = measured(entry), decoding_only(entry)
                rows.append([size, runs, name, f"{entry['tokens_per_step']:.2f}", *speeds, identical(batch)])
    yield Table(
        "Speed over autoregression at the same batch size: the fastest fixed shape, and drafts that follow cost "
        f"(auto). {protocol(shapes).capitalize()}; median over batches with its 95 % interval, which a few batches "
        "cannot give reliably.",
        ["batch", "batches", "draft", "tokens per step", "speed", "decoding only", "output identical"],
        rows,
    )
    if charts.can_draw() and len(shapes["batches"]) > 1:
        series = {
            kind: [
                (batch["batch_size"], batch["decoded"][batch["best"] if kind != AUTO else AUTO]["speedup"][0])
                for batch in shapes["batches"]
            ]
            for kind in ("best fixed shape", AUTO)
        }
        drawn = charts.lines(series, "batch size", "speed over autoregression", logarithmic=True)
        yield Picture("speed-by-batch", "Measured speed over autoregression by batch size.", drawn)
    yield Paragraph(
        "The more sequences are decoded together, the less of the hardware is idle, and the less drafting gains."
    )


def prefix_tree(tree: Record) -> Iterator[Block]:
    """Tokens to verify with and without it."""
    low, high = TREE_SAVES
    yield Table.of(
        "Draft tokens that the verifier reads in a step when beams are verified one by one, and when prefixes that "
        "they share are read once; and how many times as fast verifying is then. Mean over drafts at every token of "
        "the held-out replies. Tokens per step are the same by construction: the same drafts are verified.",
        tree["rows"],
        {
            "beams x length": lambda row: "{beam_width} x {beam_length}".format(**row),
            "one by one": lambda row: str(row["candidates"]),
            "as a tree": lambda row: f"{row['distinct']:.1f}",
            "saved": lambda row: f"{1 - row['distinct'] / row['candidates']:.0%}",
            "verifying, times as fast": lambda row: f"{row['seconds_apart'] / row['seconds_merged']:.2f}",
        },
    )
    yield Paragraph(f"The paper reports {low:.0%} to {high:.0%} fewer tokens to verify (S).")


def draft_vocabulary(vocabulary: Record) -> Iterator[Block]:
    """Ever fewer tokens that can be drafted."""
    shape = f"{vocabulary['beam_width']} x {vocabulary['beam_length']}, {vocabulary['max_tree_nodes']} nodes"
    yield Table.of(
        f"One drafter ({vocabulary['drafter']}) that may draft only its most frequent tokens, at {shape}: share of "
        "the training targets covered; tokens per step with its 95 % interval over replies; drafting a token, in "
        "plain steps of the verifier; predicted speed over autoregression, batch 1. The head is cut, not trained "
        "again.",
        vocabulary["rows"],
        {
            "draft vocabulary": lambda row: f"{row['size']:,}",
            "covers": lambda row: f"{row['coverage']:.1%}",
            "tokens per step": lambda row: f"{walked_along(row):.2f}",
            "cost of a draft token": lambda row: f"{row['draft_level'] / row['plain_step']:.2f}",
            "predicted speed": lambda row: f"{row['predicted_speedup']:.2f}",
        },
    )
    points = [(row["size"], walked_along(row).value, row["predicted_speedup"]) for row in vocabulary["rows"]]
    if charts.can_draw() and len(points) > 1:
        series = {
            "tokens per step": [(size, tokens) for size, tokens, _ in points],
            "predicted speed": [(size, speed) for size, _, speed in points],
        }
        drawn = charts.lines(series, "draft vocabulary", "tokens per step; times as fast", logarithmic=True)
        yield Picture(
            "draft-vocabulary", "Tokens per step and predicted speed by the size of the draft vocabulary.", drawn
        )
    yield Table(
        "FR-Spec's figures for the same idea, Llama-3 8B (P).",
        ["draft vocabulary", "accepted length", "speed"],
        [[f"{size}k", f"{length:.2f}", f"{times:.2f}"] for size, length, times in VOCABULARY],
    )
