"""What vLLM 0.32 does wrong on CPUs, with and without our corrections; and a vLLM that has changed."""

import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm.sampling_params", reason="vLLM is not installed")

import engines  # noqa: E402, F401
import torch  # noqa: E402

from recurrent_drafter.vllm import compatibility, cpu_fixes  # noqa: E402


@pytest.fixture
def sampler(monkeypatch):
    """Theirs, as it comes, with its CPU kernels in place."""
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    current_platform.register_triton_kernel_overrides()
    for name in cpu_fixes.FIXES:
        function = getattr(rejection_sampler, name)
        monkeypatch.setattr(rejection_sampler, name, getattr(function, "_theirs", function))
    return rejection_sampler


def test_this_vllm_is_the_tested_one():
    compatibility.check()
    assert compatibility.installed_version().startswith(compatibility.TESTED)


def test_each_rows_value_reaches_its_draft_tokens(sampler):
    each = torch.tensor([0.7, 0.0, 1.3]), torch.tensor([2, 3, 6], dtype=torch.int32), 6, 0, 1
    expected = torch.tensor([0.7, 0.7, 1.0, 1.3, 1.3, 1.3])
    assert not torch.allclose(sampler.expand_batch_to_tokens(*each), expected)
    assert cpu_fixes.apply()
    torch.testing.assert_close(sampler.expand_batch_to_tokens(*each), expected)


def test_top_k_in_a_step_without_drafts(sampler):
    class Metadata:
        all_greedy, temperature = False, torch.tensor([1.0, 1.0])
        top_k, top_p = torch.tensor([2, 2], dtype=torch.int32), None

    nothing, none_drafted = torch.empty(0, 8), torch.zeros(2, dtype=torch.int32)
    with pytest.raises((RuntimeError, IndexError)):
        sampler.apply_sampling_constraints(nothing, none_drafted, Metadata())
    assert cpu_fixes.apply()
    assert sampler.apply_sampling_constraints(nothing, none_drafted, Metadata()).shape == (0, 8)


def test_padding_is_rejected(sampler):
    def sample():
        output = torch.full((1, 3), -1, dtype=torch.int32)
        sampler._rejection_random_sample(
            output,
            torch.tensor([2], dtype=torch.int32),
            torch.tensor([1, -1], dtype=torch.int32),
            None,
            torch.full((2, 4), 0.25),
            torch.tensor([[3]], dtype=torch.int64),
            torch.tensor([2, 2], dtype=torch.int32),
            torch.full((2,), 0.01, dtype=torch.float64),
            torch.tensor([False]),
            2,
            None,
        )
        return output.tolist()

    assert sample() == [[1, -1, 3]]  # taken for a token, in front of a bonus token
    assert cpu_fixes.apply()
    assert sample() == [[1, 2, -1]]  # the recovered token, then nothing


def test_a_function_that_changed_is_named(monkeypatch):
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    monkeypatch.setattr(GPUModelRunner, "propose_draft_token_ids", lambda self, everything: None)
    with pytest.raises(RuntimeError, match="propose_draft_token_ids takes .*everything"):
        compatibility.check()
    monkeypatch.delattr(GPUModelRunner, "_get_spec_decode_draft_probs")
    with pytest.raises(RuntimeError, match="_get_spec_decode_draft_probs is missing"):
        compatibility.check()


def test_other_versions_are_left_alone(monkeypatch, sampler):
    monkeypatch.setattr(cpu_fixes, "installed_version", lambda: "0.33.0")
    before = sampler.expand_batch_to_tokens
    assert not cpu_fixes.apply()
    assert sampler.expand_batch_to_tokens is before
