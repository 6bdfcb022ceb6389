"""Draw the pictures of docs/concepts.md, of the package's worked example: ``python dev/draw_pictures.py``.

Tree and mask are what `prefix_tree` makes of the three beams, not a drawing of it. Colors are CSS variables with a
light and a dark value, paper included, so a picture is readable wherever it stands.
"""

import argparse
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from recurrent_drafter.core.beam import Beams
from recurrent_drafter.core.tree import DraftTree, prefix_tree

matplotlib.use("Agg")

# name: (light, dark)
COLORS = {
    "ink": ("#1f2328", "#e6e8eb"),
    "faint": ("#6a7078", "#9aa2ac"),
    "paper": ("#fdfdfc", "#1d2127"),
    "plain": ("#eceef0", "#343a42"),
    "draft": ("#cfe1f7", "#264b73"),
    "agreed": ("#c5e8cb", "#23603a"),
    "own": ("#f8dfae", "#6f4f12"),
}
INK, FAINT, PAPER, PLAIN, DRAFT, AGREED, OWN = (light for light, _ in COLORS.values())

WORDS = ("red", "planet", "dot", "and", "with", "in")
TEXT = ("Mars", "is", "a")  # verified, in the cache
AGREES = {0: "planet", 1: "with", 4: "two"}  # node: the verifier's own next word, along the accepted path
OTHERS = {2: "in", 3: "a", 5: "the"}  # and what it would say after the other nodes

# docs/figures.md, `recurrent-drafter bench --prompts 20 --profile --dtype float32`: per cent of a step of `auto`
SHARES = {"verify": 65.7, "draft": 28.0, "accept": 2.3, "controller": 1.4, "tree": 1.1, "host": 1.0, "cache": 0.3}


def worked_tree() -> DraftTree:
    """Three beams of two tokens after ``red``, as one tree of six nodes."""
    red, planet, dot, and_, with_, in_ = range(len(WORDS))
    beams = Beams(
        tokens=torch.tensor([[[planet, dot, in_], [and_, with_, in_]]]),
        parents=torch.tensor([[[0, 0, 0], [0, 0, 1]]]),
        log_probs=torch.tensor([[[0.6, 0.3, 0.05], [0.3, 0.2, 0.1]]]).log(),
    )
    return prefix_tree(torch.tensor([red]), beams, max_nodes=6)


def canvas(width: float, height: float) -> Axes:
    """A sheet whose unit is about a line of text."""
    figure = pyplot.figure(figsize=(width * 0.4, height * 0.4), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return axes


def box(axes: Axes, x: float, y: float, text: str, color: str = PLAIN, width: float = 2.4, height: float = 1.1) -> None:
    """A word in a box around (x, y)."""
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.2", fc=color, ec="none"))
    say(axes, x, y, text)


def say(axes: Axes, x: float, y: float, text: str, color: str = INK, size: float = 11, align: str = "center") -> None:
    axes.text(x, y, text, color=color, size=size, ha=align, va="center")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = FAINT) -> None:
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.2})


def draw_tree(axes: Axes, tree: DraftTree, left: float, tops: list[float], color: Callable[[int], str]) -> None:
    """The tree from left to right, its nodes at these heights."""
    parents, depths = tree.parents[0].tolist(), tree.depths[0].tolist()
    places = [(left + 4.2 * depth, top) for depth, top in zip(depths, tops, strict=True)]
    for node, (x, y) in enumerate(places):
        if node:
            from_x, from_y = places[parents[node]]
            arrow(axes, (from_x + 1.25, from_y), (x - 1.25, y))
    for node, (x, y) in enumerate(places):
        box(axes, x, y, WORDS[tree.tokens[0, node]], color(node))


def beams_to_tree(tree: DraftTree) -> Axes:
    """Three beams become one tree"""
    axes = canvas(25, 7.4)
    say(axes, 4.9, 0.9, "three beams: 9 tokens", FAINT)
    parents, depths = tree.parents[0].tolist(), tree.depths[0].tolist()
    for row, leaf in enumerate(node for node, depth in enumerate(depths) if depth == max(depths)):
        path = [0, parents[leaf], leaf]
        for column, node in enumerate(path):
            box(axes, 1.9 + 3 * column, 2.4 + 1.7 * row, WORDS[node], DRAFT if column else PLAIN)
    arrow(axes, (10, 4.1), (12, 4.1), INK)
    say(axes, 18.2, 0.9, "one tree: 6 nodes", FAINT)
    draw_tree(axes, tree, 14, [4.1, 3.2, 5.8, 2.4, 4.1, 5.8], lambda node: DRAFT if node else PLAIN)
    return axes


def attention_mask(tree: DraftTree) -> Axes:
    """Each node sees the verified text and its own ancestors"""
    axes = canvas(17.6, 10.2)
    columns = [*TEXT, *WORDS]
    for column, word in enumerate(columns):
        say(axes, 3 + 1.6 * column, 1.9, word, FAINT if column < len(TEXT) else INK, size=10)
    say(axes, 4.6, 0.8, "verified text (cached)", FAINT, size=10)
    say(axes, 11.8, 0.8, "the tree's nodes", FAINT, size=10)
    for row, sees in enumerate(tree.ancestors[0].tolist()):
        y = 3.1 + 1.2 * row
        say(axes, 1.9, y, WORDS[row], align="right", size=10)
        for column, seen in enumerate([True] * len(TEXT) + sees):
            color = (PLAIN if column < len(TEXT) else DRAFT) if seen else PAPER
            box(axes, 3 + 1.6 * column, y, "" if seen else "·", color, width=1.45, height=1.05)
    return axes


def one_step(tree: DraftTree) -> Axes:
    """One step: draft, verify, accept"""
    axes = canvas(27, 13.4)
    say(axes, 1, 1, "1  draft: beams from the root and its hidden state, merged to a tree", align="left")
    say(axes, 1, 2.1, "2  verify: one pass, and the model's own next word after every node", align="left")
    accepted = set(AGREES)
    tops = [6, 4.9, 8, 4, 5.8, 8]
    draw_tree(axes, tree, 5.6, tops, lambda node: (AGREED if node in accepted else DRAFT) if node else PLAIN)
    say(axes, 1, 6, "... is a", FAINT, align="left")
    depths = tree.depths[0].tolist()
    for node, word in {**AGREES, **OTHERS}.items():
        x, right = 5.6 + 4.2 * depths[node], depths[node] == 2
        place = (x + 1.5, tops[node]) if right else (x, tops[node] + 0.95)
        known = node in accepted
        say(axes, *place, f"“{word}”", INK if known else FAINT, size=10, align="left" if right else "center")
    rule = "follow the model's words for as long as a child carries them, and add its last one"
    say(axes, 1, 9.8, f"3  accept: {rule}", align="left")
    for number, (word, color) in enumerate((("red", PLAIN), ("planet", AGREED), ("with", AGREED), ("two", OWN))):
        box(axes, 2.2 + 2.7 * number, 11.4, word, color)
    say(axes, 12.2, 11.05, "2 draft tokens accepted + 1 = 3 tokens from one pass", align="left", size=10)
    say(axes, 12.2, 11.9, "next root: “two”, with the hidden state after “with”", FAINT, align="left", size=10)
    return axes


def alignment(_: DraftTree) -> Axes:
    """Which hidden state goes with which token"""
    axes = canvas(25, 10.2)
    words = [*TEXT, "red", "planet", "with"]
    xs = [6.2 + 3.2 * place for place in range(len(words))]
    for y, name in ((1, "position"), (2.3, "token"), (4.3, "hidden state")):
        say(axes, 0.6, y, name, FAINT, align="left", size=10)
    for place, (x, word) in enumerate(zip(xs, words, strict=True)):
        say(axes, x, 1, str(place), FAINT, size=10)
        box(axes, x, 2.3, word, OWN if word == "red" else DRAFT if place > 3 else PLAIN)
        if place < 3:
            box(axes, x, 4.3, "h" + "₀₁₂"[place], OWN if place == 2 else PLAIN)
        else:
            say(axes, x, 4.3, "not read yet", FAINT, size=9)
    arrow(axes, (xs[2] + 0.9, 3.7), (xs[3] - 0.7, 2.95), INK)
    say(axes, xs[2] + 0.9, 3.1, "says", FAINT, size=9)
    say(axes, 0.6, 6.2, "the drafter gets", FAINT, align="left", size=10)
    box(axes, 6.2, 6.2, "h₂", OWN)
    box(axes, 9.4, 6.2, "red", OWN)
    for depth, (read, says) in enumerate((("red", "planet"), ("planet", "with"))):
        y = 7.6 + 1.4 * depth
        say(axes, 0.6, y, f"depth {depth + 1} reads", FAINT, align="left", size=10)
        box(axes, 6.2, y, read, OWN if depth == 0 else DRAFT)
        arrow(axes, (7.6, y), (9.4, y))
        say(axes, 8.5, y - 0.4, "predicts", FAINT, size=9)
        box(axes, 10.8, y, says, DRAFT)
    return axes


def time_of_a_step(_: DraftTree) -> Axes:
    """Where the time of a step goes"""
    axes = canvas(25, 5.4)
    colors = {"verify": PLAIN, "draft": DRAFT}
    x, scale = 0.8, 23.4 / sum(SHARES.values())
    for name, share in SHARES.items():
        width = share * scale
        axes.add_patch(Rectangle((x, 1.6), width - 0.06, 1.6, fc=colors.get(name, OWN), ec="none"))
        if name in colors:
            say(axes, x + width / 2, 2.4, f"{name} {share} %")
        x += width
    rest = ", ".join(f"{name} {share} %" for name, share in SHARES.items() if name not in colors)
    say(axes, 0.8, 0.9, "one step of auto, by time", FAINT, align="left")
    say(axes, 24.2, 4.2, f"the rest: {rest}", FAINT, align="right", size=10)
    return axes


def as_svg(axes: Axes, title: str) -> str:
    """The picture with its colors as variables, which follow the reader's light or dark mode."""
    buffer = StringIO()
    axes.figure.savefig(buffer, format="svg", facecolor=PAPER, metadata={"Date": None, "Creator": None, "Title": title})
    pyplot.close(axes.figure)
    drawn = re.sub(r"font-family: [^;]*;", "font-family: system-ui, sans-serif;", buffer.getvalue())
    for name, (light, _) in COLORS.items():
        drawn = drawn.replace(light, f"var(--{name}, {light})")
    light, dark = (" ".join(f"--{name}: {pair[side]};" for name, pair in COLORS.items()) for side in (0, 1))
    style = f"<style>:root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}</style>"
    return re.sub(r"<svg [^>]*>", lambda opening: f"{opening.group()}\n {style}", drawn, count=1)


def draw(folder: Path) -> None:
    """Write every picture; its name is its function's, its title what that says of itself."""
    tree = worked_tree()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "red"}):  # text as text, the same every time
        for picture in (beams_to_tree, attention_mask, one_step, alignment, time_of_a_step):
            name = picture.__name__.replace("_", "-")
            (folder / f"{name}.svg").write_text(as_svg(picture(tree), str(picture.__doc__)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[1] / "docs/pictures")
    draw(parser.parse_args().folder)
