"""Losses against plain loops over their definitions."""

import pytest
import torch

from recurrent_drafter.core.losses import IGNORED, chunked_loss, cross_entropy, depth_weights, divergence

ROOTS, DEPTHS, D, WIDTH = 5, 3, 7, 4


@pytest.fixture
def targets():
    torch.manual_seed(0)
    targets = torch.randint(D, (ROOTS, DEPTHS))
    targets[0, 1] = targets[4, 2] = IGNORED
    return targets


def test_cross_entropy_against_a_plain_loop(targets):
    logits = torch.randn(ROOTS, DEPTHS, D)
    sums = cross_entropy(logits, targets)
    for depth in range(DEPTHS):
        expected = sum(
            -logits[i, depth].log_softmax(-1)[targets[i, depth]] for i in range(ROOTS) if targets[i, depth] != IGNORED
        )
        torch.testing.assert_close(sums[depth], expected)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergence_against_its_definition(targets, temperature):
    student, teacher = torch.randn(2, ROOTS, DEPTHS, D)
    sums = divergence(student, teacher, targets != IGNORED, temperature)
    for depth in range(DEPTHS):
        expected = 0.0
        for root in range(ROOTS):
            p = (teacher[root, depth] / temperature).softmax(-1)
            q = (student[root, depth] / temperature).softmax(-1)
            if targets[root, depth] != IGNORED:
                expected += temperature**2 * sum(p[v] * (p[v] / q[v]).log() for v in range(D))
        torch.testing.assert_close(sums[depth], expected)
    assert divergence(teacher, teacher, targets != IGNORED, temperature).abs().max() < 1e-5


def test_depths_weigh_gamma_to_the_k(targets):
    sums, counts = torch.rand(DEPTHS), (targets != IGNORED).sum(0)
    expected = sum(0.5**k * sums[k] / counts[k] for k in range(DEPTHS)) / (1 + 0.5 + 0.25)
    torch.testing.assert_close((depth_weights(counts, 0.5) * sums).sum(), expected)
    assert depth_weights(torch.tensor([2, 0]), 1.0).tolist() == [0.5, 0.0]  # a depth without targets has no weight
    assert depth_weights(torch.tensor([0, 0]), 1.0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_chunks_change_neither_loss_nor_gradient(targets, chunk):
    exits, head = torch.randn(ROOTS, DEPTHS, WIDTH), torch.randn(D, WIDTH)
    teacher = torch.randn(ROOTS, DEPTHS, D)

    def part(logits, some):
        return (
            cross_entropy(logits, targets[some]).sum()
            + divergence(logits, teacher[some], targets[some] != IGNORED, 2.0).sum()
        )

    def gradients(loss_of):
        leaves = [exits.clone().requires_grad_(), head.clone().requires_grad_()]
        loss = loss_of(*leaves)
        (3 * loss).backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    plain = gradients(lambda exits, head: part(exits @ head.T, slice(None)))
    torch.testing.assert_close(gradients(lambda exits, head: chunked_loss(exits, head, part, chunk)), plain)


def test_no_roots_is_no_loss():
    exits, head = torch.zeros(0, DEPTHS, WIDTH, requires_grad=True), torch.randn(D, WIDTH, requires_grad=True)
    loss = chunked_loss(exits, head, lambda logits, _: logits.sum(), 4)
    loss.backward()
    assert loss.item() == 0 and not head.grad.any() and exits.grad.shape == exits.shape
