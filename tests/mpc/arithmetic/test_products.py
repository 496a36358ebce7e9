import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sordino.mpc.arithmetic import products
from sordino.mpc.arithmetic.prg import Prg
from sordino.mpc.arithmetic.products import FORMS, by_digits, shape_of
from sordino.mpc.arithmetic.ring import lowest

needs_bytes = pytest.mark.skipif(
    not hasattr(torch, "_int_mm") or not products.digits_are_exact(), reason="no exact product of bytes here"
)


def exact(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left times right transposed, modulo 2^64, by Python's integers."""
    rows = [
        [sum(a * b for a, b in zip(row, column, strict=True)) for column in right.tolist()] for row in left.tolist()
    ]
    return torch.tensor([[(entry + 2**63) % 2**64 - 2**63 for entry in row] for row in rows])


@pytest.mark.parametrize("shape", [(3, 5, 2), (1, 700, 1), (16, 384, 16), (40, 1, 20)])
def test_matrix_products_are_exact_on_the_whole_range(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    left, right = Prg().integers(0, (rows, inner)), Prg().integers(0, (columns, inner))
    expected, turned = exact(left, right), right.T.contiguous()
    assert FORMS["matmul_nt"](left, right, 64).equal(expected)
    assert FORMS["matmul"](left, turned, 64).equal(expected)
    assert FORMS["matmul_tn"](left.T.contiguous(), turned, 64).equal(expected)
    batch = FORMS["matmul"](left.expand(2, 3, -1, -1), turned.expand(3, -1, -1), 64)
    assert batch.shape == (2, 3, rows, columns) == shape_of("matmul", (2, 3, rows, inner), (3, inner, columns))
    assert batch[1, 2].equal(expected)


@needs_bytes
@given(st.integers(1, 600), st.integers(16, 90), st.integers(16, 90), st.integers(1, 64), st.integers(0, 2**32))
def test_digits_give_what_int64_gives(rows: int, inner: int, columns: int, bits: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    left, right = (torch.randint(-(2**63), 2**63 - 1, (n, inner), generator=source) for n in (rows, columns))
    assert lowest(by_digits(left, right, bits), bits).equal(lowest(left @ right.mT, bits))


@needs_bytes
@pytest.mark.parametrize("entry", [-(2**63), 2**63 - 1, sum(-128 << 8 * place for place in range(8)), -1])
def test_the_longest_sums_of_extreme_digits_do_not_overflow(entry: int) -> None:
    wrapped = (entry + 2**63) % 2**64 - 2**63
    left, right = torch.full((16, products.MOST - 1), wrapped), torch.full((17, products.MOST - 1), wrapped)
    assert by_digits(left, right).equal(left @ right.mT)


@pytest.mark.parametrize("faster", [False, True])
def test_which_way_is_taken_changes_no_result(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(products, "digits_are_faster", lambda: faster)
    monkeypatch.setattr(products, "by_digits", lambda *given: taken.append(given) or given[0] @ given[1].mT)
    left, right = Prg().integers(0, (2, 20, 24)), Prg().integers(1, (18, 24))
    assert FORMS["matmul_nt"](left, right, 40).equal(left @ right.mT)
    assert bool(taken) == faster
    assert not taken or taken[0][2] == 40
    taken.clear()
    for few in (left[:, :, :3], left[:0]):  # of which torch's product of bytes is wrong, or there is none
        assert FORMS["matmul_nt"](few, right[:, : few.shape[-1]], 40).equal(few @ right[:, : few.shape[-1]].mT)
    assert not taken
