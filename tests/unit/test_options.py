"""Options become arguments, or one line that says what is wrong."""

import pytest

from recurrent_drafter.cli import generate
from recurrent_drafter.cli.main import launch
from recurrent_drafter.cli.options.decoding import SamplingOptions


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, {"do_sample": False}),
        ({"temperature": 0.0, "repetition_penalty": 1.2}, {"do_sample": False, "repetition_penalty": 1.2}),
        ({"greedy_search": True, "temperature": 0.0}, {"do_sample": False}),
        ({"temperature": 0.7}, {"do_sample": True, "temperature": 0.7}),
        (
            {"temperature": 1.0, "top_p": 0.9, "top_k": 0, "min_p": 0.1},
            {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 0, "min_p": 0.1},
        ),
    ],
)
def test_sampling_arguments(options, arguments):
    assert SamplingOptions(**options).arguments() == arguments


def test_a_command_may_sample_by_default():
    assert SamplingOptions().arguments(0.8) == {"do_sample": True, "temperature": 0.8}
    assert SamplingOptions(greedy_search=True).arguments(0.8) == {"do_sample": False}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--temperature -1", "--temperature is -1.0, expected 0 (greedy), or 0.001 or more"),
        ("--temperature nan", "--temperature is nan"),
        ("--temperature warm", "--temperature: invalid float value: 'warm'"),
        ("--temperature 1 --top_p 0", "--top_p is 0.0, expected more than 0 and at most 1"),
        ("--temperature 1 --top_p 1.5", "--top_p is 1.5"),
        ("--temperature 1 --top_k -2", "--top_k is -2"),
        ("--temperature 1 --min_p 2", "--min_p is 2.0"),
        ("--repetition_penalty 0", "--repetition_penalty is 0.0"),
        ("--seed -1", "--seed is -1"),
        ("--top_p 0.9", "--top_p only matters when sampling"),
        ("--temperature 0 --top_k 5 --min_p 0.1", "--top_k and --min_p only matters when sampling"),
        ("--greedy_search --temperature 0.8", "--greedy_search and --temperature 0.8 contradict each other"),
        ("--greedy_search --top_k 5", "--top_k only matters when sampling"),
        ("--beam_width 0", "--beam_width is 0, expected at least 1"),
        ("--autoregressive --speculator_path x", "drop --speculator_path"),
        ("--autoregressive --beam_width 3 --beam_length 2", "drop --beam_width and --beam_length"),
        ("--autoregressive --lookup", "--autoregressive drafts nothing: drop --lookup"),
        ("--base_model ./ --no_lookup", "--no_lookup leaves nothing to draft with: no drafter is named for ./"),
        (
            "--base_model ./ --beam_width 3 --beam_length 2",
            "only matters with a drafter: no drafter is named for",
        ),
        ("--lookup maybe", "'maybe' is neither true nor false"),
        ("--autoregressive --compare", "--compare cannot be had with --autoregressive"),
        ("--interactive", "give one of --prompt TEXT, --interactive and --eval_mt_bench"),
        ("--batch_size 2 --use_wandb", "--use_wandb and --batch_size only matters with --eval_mt_bench or --compare"),
        ("--compare --batch_size 0", "--batch_size is 0, expected at least 1"),
        ("--compare --max_num_prompts 3", "choose among questions"),
        ("--compare --run_name a", "--run_name is for trackers"),
        ("--compare --report_to tensorboard --wandb_project a", "--wandb_project is for W&B"),
        ("--compare --report_to wnadb", "--report_to wnadb: no such service is installed"),
        ("--compare --output_file ./nowhere/a.json", "nowhere/a.json cannot be written"),
        ("--compare --show_drafts", "--show_drafts cannot be had with"),
    ],
)
def test_wrong_values_are_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(generate, "load_verifier", lambda *_, **__: pytest.fail("the model was loaded"))
    assert launch("generate", ["--prompt", "Hi", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_sampling_reaches_the_stream(capsys):
    def reply(*flags):
        assert launch("generate", ["--prompt", "I need a table for two.", "--max_generation_length", "12", *flags]) == 0
        return capsys.readouterr().out.partition("\n\nGenerated")[0]

    warm = ("--temperature", "1.5", "--seed", "3")
    assert reply(*warm) == reply(*warm, "--autoregressive")
    assert reply(*warm) != reply("--greedy_search") == reply()
