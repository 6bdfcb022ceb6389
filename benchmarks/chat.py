"""Time to the first token of every turn of a chat, with a session and without: `python benchmarks/chat.py`.

Every turn adds a question of random tokens and a reply, each of one length. A session, a fresh start and transformers'
`generate` are asked for the first token of the same text, in one process, taking turns at going first. Exits with 1
where a session's last turn takes more than `--limit` times its first.
"""

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from recurrent_drafter.cli.main import quiet
from recurrent_drafter.decoding.speculator import RecurrentDraftingSpeculator
from recurrent_drafter.measure.arms import HF, NEVER
from recurrent_drafter.measure.ruler import now
from recurrent_drafter.models.loading import load_verifier
from recurrent_drafter.records.provenance import provenance

SESSION, FRESH = "session", "fresh start"


def main() -> int:
    options = parsed()
    quiet()
    model, _ = load_verifier(options.base_model, dtype=options.dtype)
    speculator = RecurrentDraftingSpeculator(lookup=False)
    speculator.attach_verifier(model)
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in range(options.turns)] for name in (SESSION, FRESH, HF)}
    for seed in range(options.rounds + 1):
        counts = {name: turns for name, turns in seconds.items() if seed > 0}  # the first round warms up
        talk(speculator, options, seed, counts)
    medians = {name: [statistics.median(found) for found in turns] for name, turns in seconds.items()}
    print(f"time to the first token in ms, {options.new_text} new tokens and a reply of {options.new_tokens} a turn")
    print(f"{'turn':14}" + "".join(f"{1 + turn:>9}" for turn in range(options.turns)))
    for name, found in medians.items():
        print(f"{name:14}" + "".join(f"{1e3 * median:9.0f}" for median in found))
    ratio = medians[SESSION][-1] / medians[SESSION][0]
    print(f"the last turn takes {ratio:.2f} times the first, expected at most {options.limit:g}")
    if options.output_file is not None:
        record = {**provenance(sys.argv), "options": vars(options), "seconds": seconds}
        options.output_file.write_text(json.dumps(record, indent=1, default=str) + "\n")
    return 1 if ratio > options.limit else 0


def talk(
    speculator: RecurrentDraftingSpeculator,
    options: argparse.Namespace,
    seed: int,
    seconds: dict[str, list[list[float]]],
) -> None:
    """One conversation of random text; the arms take turns at going first."""
    model, session = speculator.verifier.model, speculator.session()
    shape = (options.turns, 1, options.new_text)
    asked = torch.randint(1, speculator.verifier.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    text = torch.empty(1, 0, dtype=torch.int64, device=model.device)
    for turn in range(options.turns):
        text = torch.cat([text, asked[turn].to(text)], dim=1)
        arms = {
            SESSION: partial(first_token, speculator, text, session=session),
            FRESH: partial(first_token, speculator, text),
            HF: partial(generated, model, text),
        }
        for name in list(arms)[(seed + turn) % 3 :] + list(arms)[: (seed + turn) % 3]:
            begun = now()
            arms[name]()
            if name in seconds:
                seconds[name][turn].append(now() - begun)
        reply = speculator.stream(text, session=session, end_ids=(), do_sample=False, max_new_tokens=options.new_tokens)
        text = torch.cat([text, torch.tensor([[token for step in reply for token in step]]).to(text)], dim=1)


def first_token(speculator: RecurrentDraftingSpeculator, text: Tensor, **given) -> None:
    """As a stream gives it to who waits for it."""
    stream = speculator.stream(text, torch.ones_like(text), do_sample=False, max_new_tokens=2, end_ids=(), **given)
    next(stream)
    stream.close()


def generated(model, text: Tensor) -> None:
    model.generate(text, attention_mask=torch.ones_like(text), do_sample=False, max_new_tokens=1, eos_token_id=NEVER)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base_model", default="demo")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--new_text", type=int, default=100, help="tokens of a question")
    parser.add_argument("--new_tokens", type=int, default=100, help="tokens of a reply")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=1.5, help="times the first turn that the last may take")
    parser.add_argument("--output_file", type=Path, help="every time, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
