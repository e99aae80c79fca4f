"""The fidelity ledger: its data hold, its page is up to date, and what no other test proves."""

import ast
import copy
import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tools import ledger_page
from transformer_annotated import (
    PAPER_BASE,
    PAPER_BIG,
    FeedForward,
    MultiHeadAttention,
    Sinusoid,
    Transformer,
    patch,
)
from transformer_annotated.training.beam import GNMT, beam_search
from transformer_annotated.training.decoding import greedy_search
from transformer_annotated.training.objective import CrossEntropy
from transformer_annotated.training.reproduction import RUNS, Recipe
from transformer_annotated.training.schedule import adam, inverse_square_root

ROOT = Path(__file__).resolve().parent.parent
LEDGER = ledger_page.load()


def names_of_tests(path: Path) -> set[str]:
    """The names of the test functions in a file, without running it; a method is `Class::name`."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{f.name}" for f in node.body if isinstance(f, ast.FunctionDef)}
    return {name for name in found if name.split("::")[-1].startswith("test_")}


def missing_test(test: str) -> str | None:
    """Why `tests/test_x.py::test_y` or `...::test_y[case]` is no test; None where it is one."""
    match = re.fullmatch(r"(tests/test_\w+\.py)::([\w:]+)(\[.+\])?", test)
    if match is None:
        return f"{test} is not of the form tests/test_x.py::test_y"
    path = ROOT / match[1]
    if not path.is_file():
        return f"{test}: there is no {match[1]}"
    return None if match[2] in names_of_tests(path) else f"{test}: no such test in {match[1]}"


# The data and the page


def test_every_code_exists() -> None:
    for entry in LEDGER.entries:
        for code in entry.code:
            ledger_page.find(code)


def test_every_test_exists() -> None:
    faults = [missing_test(test) for entry in LEDGER.entries for test in entry.tests]
    assert [fault for fault in faults if fault] == []


def test_the_sections_on_model_and_training_are_complete() -> None:
    model = {"3.1", "3.2.1", "3.2.2", "3.2.3", "3.3", "3.4", "3.5"}
    wanted = model | {"5.1", "5.2", "5.3", "5.4", "6.1", "6.2"}
    assert wanted <= {entry.section for entry in LEDGER.entries}
    assert set(LEDGER.sections) == {entry.section for entry in LEDGER.entries}
    assert len(LEDGER.entries) >= 90
    assert not [e.id for e in LEDGER.entries if e.verdict == "later" and e.section[0] == "5"]


def test_the_page_is_up_to_date() -> None:
    assert ledger_page.PAGE.read_text(encoding="utf-8") == ledger_page.page(LEDGER), (
        "run: python tools/ledger_page.py"
    )


GOOD = {
    "id": "x",
    "section": "3.1",
    "says": "Something.",
    "verdict": "changed",
    "code": ["transformer_annotated.paper.attention:attend"],
    "tests": ["tests/test_ledger.py::test_every_code_exists"],
    "note": "Because.",
}
DATA = {"section": [{"number": "3.1", "title": "Stacks"}], "entry": [GOOD]}


@pytest.mark.parametrize(
    "fault",
    [
        {"verdict": "fine"},
        {"section": "3.9"},
        {"tests": []},
        {"code": []},
        {"note": ""},
        {"remark": "a key that there is not"},
    ],
    ids=lambda fault: next(iter(fault)),
)
def test_a_wrong_entry_is_rejected(fault: dict[str, object]) -> None:
    assert len(ledger_page.parse(DATA).entries) == 1
    bad = copy.deepcopy(DATA)
    bad["entry"][0].update(fault)
    with pytest.raises(ValueError):
        ledger_page.parse(bad)


@pytest.mark.parametrize("missing", ["code", "tests", "note"])
def test_what_is_ready_has_code_a_test_and_a_note(missing: str) -> None:
    with pytest.raises(ValueError, match="x: "):
        ledger_page.parse({**DATA, "entry": [{**GOOD, "verdict": "ready", missing: []}]})


def test_an_id_used_twice_is_rejected() -> None:
    with pytest.raises(ValueError, match="used twice"):
        ledger_page.parse({**DATA, "entry": [GOOD, GOOD]})


@pytest.mark.parametrize(
    "code",
    [
        "transformer_annotated.paper.attention:attent",
        "transformer_annotated.paper.attentions:attend",
        "transformer_annotated.paper.add_norm:PostNorm.backward",
    ],
)
def test_code_that_does_not_exist_is_found(code: str) -> None:
    with pytest.raises(ValueError, match="there is no"):
        ledger_page.find(code)


def test_a_test_that_does_not_exist_is_found() -> None:
    assert missing_test("tests/test_ledger.py::test_every_code_exists") is None
    assert missing_test("tests/test_ledger.py::test_a_wrong_entry_is_rejected[verdict]") is None
    for bogus in (
        "tests/test_ledger.py::test_nothing",
        "tests/test_ledger.py::names_of_tests",
        "tests/test_nothing.py::test_every_code_exists",
        "test_ledger::test_every_code_exists",
    ):
        assert missing_test(bogus)


# Citations


def cited() -> dict[str, str]:
    """Every citation key on a page, and one page that has it."""
    keys = {}
    pages = [*(ROOT / "book").glob("*.md"), *(ROOT / "transformer_annotated").rglob("*.py")]
    for page in pages:
        for group in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", page.read_text(encoding="utf-8")):
            keys.update({key.strip(): page.name for key in group.split(",")})
    return keys


def bibliography() -> list[str]:
    text = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    return re.findall(r"^@\w+\{([^,\s]+),", text, flags=re.MULTILINE)


def test_every_citation_has_an_entry() -> None:
    entries = set(bibliography())
    assert "vaswani2017attention" in cited()
    assert {key: page for key, page in cited().items() if key not in entries} == {}


def test_the_bibliography_is_sorted_and_has_no_key_twice() -> None:
    keys = bibliography()
    assert keys == sorted(set(keys))


# Statements of the paper that no other file tests


def test_the_base_model_has_the_papers_sizes() -> None:
    config = PAPER_BASE
    assert (config.vocab_size, config.d_model, config.dropout) == (37_000, 512, 0.1)
    assert config.src_vocab_size is None
    assert not config.final_norm
    for stack in (config.encoder, config.decoder):
        assert stack.n_layers == 6
        assert stack.ffn.kwargs["d_ff"] == 2048
        assert stack.ffn.kwargs["dropout"] == stack.self_attention.kwargs["dropout"] == 0.0
        assert stack.self_attention.kwargs["n_heads"] == 8
        assert stack.self_attention(d_model=512).head_dim == 64
    assert config.encoder.cross_attention is None
    assert config.decoder.cross_attention.kwargs["n_heads"] == 8
    assert (config.encoder.causal, config.decoder.causal) == (False, True)


def test_the_big_model_has_the_papers_sizes() -> None:
    config = PAPER_BIG
    assert (config.d_model, config.dropout) == (1024, 0.3)
    for stack in (config.encoder, config.decoder):
        assert stack.n_layers == 6
        assert stack.ffn.kwargs["d_ff"] == 4096
        assert stack.self_attention.kwargs["n_heads"] == 16
    assert config.decoder.cross_attention.kwargs["n_heads"] == 16


def test_the_recipes_for_wmt14() -> None:
    for name in ("wmt14-en-de-base", "wmt14-en-de-big", "wmt14-en-fr-base", "wmt14-en-fr-big"):
        recipe, french, big = RUNS[name], "-fr-" in name, "-big" in name
        assert (recipe.data, recipe.source) == ("wmt14", "en")
        assert recipe.target == ("fr" if french else "de")
        assert recipe.vocab_size == (32_000 if french else 37_000)
        seconds = 1.0 if big else 0.4  # a step of the paper's: a checkpoint every ten minutes
        assert recipe.train.save_every * seconds == 600
        built = patch(PAPER_BIG if big else PAPER_BASE, {"vocab_size": recipe.vocab_size})
        assert count(recipe.config(recipe.vocab_size)) == count(built)
        assert recipe.config(1).dropout == (0.3 if big and not french else 0.1)
        assert (recipe.max_length, recipe.train.clip_norm) == (256, None)
        assert recipe.train.precision == "bfloat16"


def test_the_papers_numbers_are_the_defaults() -> None:
    def default(function: Callable[..., object], name: str) -> object:
        return inspect.signature(function).parameters[name].default

    assert default(beam_search, "beam") == 4
    assert default(beam_search, "alpha") == GNMT().alpha == 0.6
    assert default(beam_search, "extra") == default(greedy_search, "extra") == 50
    assert default(inverse_square_root, "warm_up") == 4000
    assert default(inverse_square_root, "factor") == 1.0
    assert (default(adam, "betas"), default(adam, "eps")) == ((0.9, 0.98), 1e-9)
    assert CrossEntropy().smoothing == 0.1
    recipe = Recipe()
    assert (recipe.schedule, recipe.warm_up, recipe.peak) == ("inverse_square_root", 4000, None)
    assert (recipe.smoothing, recipe.r_drop, recipe.model.share) == (0.1, 0.0, True)
    assert recipe.rate()(123) == pytest.approx(512**-0.5 * 123 * 4000**-1.5)


def test_the_length_penalty_is_that_of_the_cited_work() -> None:
    """Wu et al. (2016), equation 14: log P divided by (5 + n)^0.6 / (5 + 1)^0.6."""
    for n in (1, 7, 60):
        score = GNMT(0.6).score(torch.tensor(-3.0, dtype=torch.float64), n)
        assert score.item() == pytest.approx(-3.0 * 6**0.6 / (5 + n) ** 0.6)


def test_the_papers_times_and_costs_agree() -> None:
    """Section 5.2 and the last column of table 2, from seconds a step, steps and GPUs."""
    base, big = 0.4 * 100_000 / 3600, 1.0 * 300_000 / 3600
    assert 11 < base < 12
    assert round(big / 24, 1) == 3.5
    assert f"{ledger_page.training_flops(12):.1e}" == "3.3e+18"
    assert f"{ledger_page.training_flops(3.5 * 24):.1e}" == "2.3e+19"


def test_the_rows_of_table_3_are_patches() -> None:
    """Rows A, C and D; rows A keep the width, so their parameters are those of the base model."""
    for heads in (1, 4, 16, 32):
        config = patch(PAPER_BASE, as_patch({"h": heads}))
        assert config.encoder.self_attention(d_model=512).head_dim == 512 // heads
        assert count(config) == count(PAPER_BASE)
    for dropout in (0.0, 0.2):
        assert patch(PAPER_BASE, {"dropout": dropout}).dropout == dropout
    for smoothing in (0.0, 0.2):
        assert CrossEntropy(smoothing).smoothing == smoothing


def count(config: object) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def as_patch(change: dict[str, int]) -> dict[str, int]:
    """A row of table 3 as a patch of the base model."""
    paths = {"D": ["d_model"], "N": ["n_layers"], "F": ["ffn.d_ff"],
             "h": ["self_attention.n_heads", "cross_attention.n_heads"]}  # fmt: skip
    return {path: v for k, v in change.items() if k in paths for path in paths[k]}


def test_the_count_by_formula_is_the_count_of_the_model() -> None:
    assert count(PAPER_BASE) == ledger_page.n_parameters() == 63_082_496
    assert count(PAPER_BIG) == ledger_page.n_parameters(D=1024, F=4096, h=16) == 214_245_376
    built = 0
    for _, change, _ in ledger_page.TABLE_3:
        h, D = change.get("h", 8), change.get("D", 512)
        if change.get("d_k", 64) * h == D:  # rows B cannot be built
            assert count(patch(PAPER_BASE, as_patch(change))) == ledger_page.n_parameters(**change)
            built += 1
    assert built == len(ledger_page.TABLE_3) - 2


def test_the_vocabularies_that_give_the_papers_counts() -> None:
    for _, change, millions in ledger_page.TABLE_3:
        low, high = ledger_page.vocabularies(change, millions)
        rounded = [
            math.floor(ledger_page.n_parameters(V=V, **change) / 1e6 + 0.5)
            for V in (low - 1, low, high, high + 1)
        ]
        assert rounded == [millions - 1, millions, millions, millions + 1]
        assert not low <= 37_000 <= high
    *rows, big = (ledger_page.vocabularies(change, m) for _, change, m in ledger_page.TABLE_3)
    low, high = max(low for low, _ in rows), min(high for _, high in rows)
    assert big[1] < 37_000 < low <= high


def test_the_number_of_heads_does_not_change_the_number_of_parameters() -> None:
    counts = {
        sum(p.numel() for p in MultiHeadAttention(d_model=64, n_heads=h).parameters())
        for h in (1, 2, 4, 8, 16, 32)
    }
    assert len(counts) == 1


def test_a_dot_product_of_width_d_has_variance_d() -> None:
    torch.manual_seed(0)
    for d in (4, 64, 512):
        dots = (torch.randn(20_000, d) * torch.randn(20_000, d)).sum(dim=-1)
        assert dots.mean().item() == pytest.approx(0, abs=4 * (d / 20_000) ** 0.5)
        assert dots.var().item() == pytest.approx(d, rel=0.06)


def test_the_feed_forward_network_is_two_convolutions_of_width_one() -> None:
    torch.manual_seed(0)
    ffn = FeedForward(d_model=6, d_ff=10).double()
    for parameter in ffn.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    hidden = F.conv1d(x.transpose(1, 2), ffn.up.weight[..., None], ffn.up.bias).relu()
    expected = F.conv1d(hidden, ffn.down.weight[..., None], ffn.down.bias).transpose(1, 2)
    torch.testing.assert_close(ffn(x), expected, rtol=0, atol=1e-12)
    one_at_a_time = torch.stack([ffn(position) for position in x.unbind(dim=1)], dim=1)
    torch.testing.assert_close(ffn(x), one_at_a_time, rtol=0, atol=1e-12)


def frequencies(encode: nn.Module) -> torch.Tensor:
    """The angle of each pair at position 1, read from its sine and cosine."""
    sin, cos = encode(torch.tensor([[1]]))[0, 0].double().unflatten(-1, (-1, 2)).unbind(dim=-1)
    return torch.atan2(sin, cos)


def test_the_wavelengths_are_a_geometric_progression() -> None:
    wavelengths = 2 * math.pi / frequencies(Sinusoid(d_model=512))
    expected = [2 * math.pi * 10_000 ** (2 * i / 512) for i in range(256)]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(wavelengths, expected, rtol=1e-5, atol=0)
    assert round(wavelengths[-1].item() / (2 * math.pi)) == 9647


def test_a_shift_of_positions_is_a_rotation() -> None:
    encode, positions = Sinusoid(d_model=8), torch.tensor([[0, 3, 50]])
    for k in (1, 7):
        angle = (k * frequencies(encode)).float()
        sin, cos = encode(positions).unflatten(-1, (-1, 2)).unbind(dim=-1)
        turned = torch.stack(
            (sin * angle.cos() + cos * angle.sin(), cos * angle.cos() - sin * angle.sin()), dim=-1
        )
        torch.testing.assert_close(turned.flatten(-2), encode(positions + k), rtol=0, atol=1e-5)


def test_sinusoids_have_no_longest_position() -> None:
    encode, position = Sinusoid(d_model=16), 5_000
    expected = [
        f(position / 10_000 ** (2 * i / 16)) for i in range(8) for f in (math.sin, math.cos)
    ]
    found = encode(torch.tensor([[position]]))[0, 0]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-3)
    assert list(encode.parameters()) == []
