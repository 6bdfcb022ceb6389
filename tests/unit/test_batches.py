"""The order of training: a permutation, the same for the same seed, with little padding; streams in bounded memory."""

import itertools
import json

import pytest
import torch
from transformers import AutoTokenizer

from recurrent_drafter.assets import demo_verifier_path, sample_path
from recurrent_drafter.data.batches import LengthGrouped, ShuffledStream, grouped_order, padding_share
from recurrent_drafter.data.dialogues import DataError
from recurrent_drafter.data.encoding import EncodedDialogues
from recurrent_drafter.data.parsing import read_records
from recurrent_drafter.data.sources import DialogueStream, load_dialogues


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_verifier_path())


@pytest.mark.parametrize("count", [1, 7, 8, 500])
def test_an_order_is_a_permutation_that_seed_and_epoch_decide(count):
    lengths = torch.randint(1, 90, (count,), generator=torch.Generator().manual_seed(2)).tolist()
    sampler = LengthGrouped(lengths, 4, seed=5)
    first = list(sampler)
    assert sorted(first) == list(range(count)) and list(sampler) == first
    sampler.set_epoch(1)
    assert count < 8 or list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


@pytest.mark.parametrize("batch", [2, 4, 16])
def test_less_than_a_tenth_is_padding_on_the_bundled_data(batch, tokenizer):
    for name, path in (("demo", None), (None, str(sample_path("gsm8k.alpaca.json")))):
        dialogues = load_dialogues(name, path, "train", limit=600).dialogues
        examples = EncodedDialogues(dialogues, tokenizer, max_length=512, assistant_only=True)
        lengths = [len(example.input_ids) for example in examples]
        order = grouped_order(lengths, batch, torch.Generator().manual_seed(0))
        assert padding_share(lengths, order, batch) < 0.1 < padding_share(lengths, range(len(lengths)), 16)


def write(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def test_a_stream_is_what_loading_gives(tmp_path, tokenizer):
    records = [r for _, r in itertools.islice(read_records(sample_path("sgd_dev.sharegpt.jsonl.gz")), 60)]
    path = write(tmp_path / "some.jsonl", [*records, {"conversations": []}])
    loaded = load_dialogues(None, path, "train")
    stream = DialogueStream(None, path)
    assert tuple(stream) == loaded.dialogues == tuple(stream)
    assert stream.report.summary() == loaded.report.summary() == "61 conversations, 1 skipped: 1 empty"
    settings = {"max_length": 128, "assistant_only": True}
    whole = EncodedDialogues(loaded.dialogues, tokenizer, **settings)
    assert all(
        torch.equal(ours.input_ids, theirs.input_ids)
        for ours, theirs in zip(EncodedDialogues(stream, tokenizer, **settings), whole, strict=True)
    )
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no records"):
        list(DialogueStream(None, str(tmp_path / "none.jsonl")))


def test_a_stream_knows_whether_it_begins_as_before(tmp_path):
    records = [r for _, r in itertools.islice(read_records(sample_path("sgd_dev.sharegpt.jsonl.gz")), 60)]
    path = write(tmp_path / "some.jsonl", records)
    stream = DialogueStream(None, path)
    assert sum(1 for _ in itertools.islice(stream, 30)) == 30
    earlier = stream.report
    list(stream)
    assert earlier.kept == 30 and earlier.sha256 != stream.report.sha256
    assert stream.report.sha256 == load_dialogues(None, path, "train").report.sha256

    def read(some):
        return sum(1 for _ in DialogueStream(None, write(tmp_path / "other.jsonl", some), earlier=earlier))

    assert read(records) > read(records[:40]) > 30  # what follows may differ
    for others in (records[1:], [*records[:20], *records[22:]], records[:20]):
        with pytest.raises(DataError, match=r"other.jsonl does not begin with the 30 conversations"):
            read(others)


def test_a_stream_shuffles_within_its_buffer_and_reads_no_further():
    read = []

    def source():
        for number in range(1000):
            read.append(number)
            yield number

    stream = ShuffledStream(source, lambda number: number % 7, buffer=50, batch=4, seed=3)
    first = list(itertools.islice(stream, 20))
    assert len(read) == 50 and first != sorted(first)
    everything = list(stream)
    assert sorted(everything) == list(range(1000)) and everything[:20] == first
    assert all(abs(number - place) < 50 for place, number in enumerate(everything))
    stream.set_epoch(1)
    assert list(stream) != everything
