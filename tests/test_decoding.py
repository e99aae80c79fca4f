"""Greedy decoding and the loss, as the mutants attack them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import redraw
from tests.variants import SMALL, batch
from transformer_annotated import Transformer, patch
from transformer_annotated.paper.first_translation import cross_entropy, greedy
from transformer_annotated.paper.toy import BOS, EOS, PAD, UNK, collate


class Script(nn.Module):
    """A translator that says what it is told: word `t` of line `b` at step t."""

    def __init__(self, lines: list[list[int]]) -> None:
        super().__init__()
        self.lines = torch.tensor(lines)

    def encode(self, src: Tensor, padding: Tensor | None = None) -> Tensor:
        return src

    def decode(self, tgt: Tensor, memory: Tensor, padding: Tensor | None = None) -> Tensor:
        return F.one_hot(self.lines[:, : tgt.shape[1]], 9).float()

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.clone()


def test_a_finished_sentence_gets_padding_alone() -> None:
    lines = [[5, 6, EOS, 7, 8, EOS], [6, 7, 8, 5, 6, EOS], [EOS, 5, 5, 5, 5, 5]]
    output = greedy(Script(lines), torch.ones(3, 2).long())
    assert output.tolist() == [
        [5, 6, EOS, PAD, PAD, PAD],
        [6, 7, 8, 5, 6, EOS],
        [EOS, PAD, PAD, PAD, PAD, PAD],
    ]


def model(dropout: float, seed: int = 4) -> Transformer:
    """Every parameter at random: its translations are nonsense, but they depend on the source."""
    made = Transformer(patch(SMALL, {"dropout": dropout}))
    redraw(made, seed=seed)
    return made


def test_decoding_is_without_dropout() -> None:
    """The same translation each time, and the model is in training mode again afterwards."""
    src, real = batch((7, 5), 10)
    plain, dropped = model(0.0), model(0.5).train()
    expected = greedy(plain, src, real, extra=8)
    assert all(torch.equal(greedy(dropped, src, real, extra=8), expected) for _ in range(3))
    assert dropped.training
    assert not greedy(dropped.eval(), src, real, extra=1).requires_grad
    assert not dropped.training


def test_a_batch_is_decoded_like_its_sentences() -> None:
    src, real = batch((7, 3, 2), 10)
    for seed in range(5):
        translator = model(0.0, seed)
        together = greedy(translator, src, real, extra=8)
        for row in range(3):
            alone = greedy(translator, src[row : row + 1, real[row]], extra=8)[0].tolist()
            found = together[row].tolist()
            n = min(len(alone), len(found))
            assert found[:n] == alone[:n]
            assert n >= 8 or EOS in found[:n]


def test_some_tokens_are_never_produced() -> None:
    """The script wants PAD, BOS and UNK most; what is left of the scores decides."""

    class Stubborn(Script):
        def decode(self, tgt: Tensor, memory: Tensor, padding: Tensor | None = None) -> Tensor:
            scores = torch.zeros(*tgt.shape, 9)
            scores[..., [PAD, BOS, UNK]] = 5.0
            scores[..., 7] = 1.0
            return scores

    output = greedy(Stubborn([[5]]), torch.ones(1, 2).long(), extra=3)
    assert output.tolist() == [[7, 7, 7, 7, 7]]


def test_the_decoder_never_reads_what_it_must_predict() -> None:
    """Shifted right: at each place it has read BOS and the words before the one it predicts."""
    made = collate([([4, 5], [6, 7, 8]), ([4], [5])])
    assert made.tgt_in.tolist() == [[BOS, 6, 7, 8], [BOS, 5, PAD, PAD]]
    assert made.tgt_out.tolist() == [[6, 7, 8, EOS], [5, EOS, PAD, PAD]]
    assert made.tgt_padding.tolist() == [[True] * 4, [True, True, False, False]]
    assert made.src.tolist() == [[4, 5, EOS], [4, EOS, PAD]]
    assert made.src_padding.tolist() == [[True] * 3, [True, True, False]]


def test_the_loss_is_a_mean_over_real_tokens() -> None:
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target, real = torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    found = cross_entropy(logits, target, real)
    places = [(0, 0, 1), (0, 1, 2), (0, 2, 3), (1, 0, 4)]
    expected = -sum(logits.log_softmax(dim=-1)[place] for place in places) / 4
    assert abs((found - expected).item()) < 1e-6
    gradient = torch.autograd.grad(found, logits)[0]
    assert not gradient[1, 1:].any()
    assert gradient[0].any()
