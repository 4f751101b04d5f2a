"""The benchmark suite runs, and what README and its results say of it is so."""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import _markdown, _plots, _report, _results
from benchmarks._compiled import product_flops, products
from benchmarks._harness import check_agreement, measure
from benchmarks._process import check_imports
from benchmarks._work import Absent, Case, Claim, Measurement, Row
from benchmarks.cases import all_cases, forms
from benchmarks.growth import laws, page
from benchmarks.growth.programs import Cell, figures, FULL, LORA, QLORA


CASES = {case.name: case for case in all_cases(quick=True, torch=sys.executable)}
# Cases that differ in their sizes alone are one here.
ALIKE = {"width-sweep", "tokens-sweep", "depth-sweep", "many-tokens"}
RESULTS = Path(__file__).parents[1] / "benchmarks/results"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(CASES) - ALIKE))
def test_every_case_runs(name):
    case = CASES[name]
    points, absent = {}, {}
    for point, make in case.points.items():
        rows = make()
        absent |= {row.name: row.why for row in rows if isinstance(row, Absent)}
        measured = measure(rows, 1, case.measure, case.rtol, cold=False)
        points[point] = {m.name: m for m in measured}
    result = _report.Result(case, 1, points, absent)
    for claim, value in _report.evaluate(result):
        # Some peers may not be installed here.
        if value is None:
            assert any(peer in claim.text for peer in absent)
        else:
            assert math.isfinite(value), claim.text


def toy(name="toy", factor=2.0, adapted=True) -> Row:
    def step(state, fixed):
        state = state + factor * fixed
        return state, state.sum()

    return Row(name, step, jnp.zeros(3), jnp.ones(3), adapted)


def toy_result() -> _report.Result:
    rows = [toy("floor"), Absent("peer", "not installed"), toy("ours")]
    points = {str(n): {m.name: m for m in measure(rows, 3)} for n in (1, 2)}
    claims = [
        Claim("met", lambda points: 0.5, 1.0),
        Claim("missed", lambda points: 2.0, 1.0),
        Claim("reported", lambda points: points["1"]["ours"].checks[0]),
    ]
    case = Case("transformer", "Toys", {}, claims)
    return _report.Result(case, 3, points, {"peer": "not installed"})


def test_state_is_fed_back_and_lent_arrays_stay():
    row = toy()
    (measured,) = measure([row], 2)
    assert measured.checks == [6.0, 12.0, 18.0]
    assert not row.state.is_deleted() and not row.fixed.is_deleted()
    assert len(measured.times) == 2


def test_rows_that_differ_are_an_error():
    rows = [toy("one"), toy("other", factor=2.001)]
    with pytest.raises(RuntimeError, match="differ at step 0.*'one'.*'other'"):
        measure(rows, 2)
    measure([rows[0], toy("not adapted", factor=3.0, adapted=False)], 2)


def test_a_nan_is_a_difference():
    rows = [Measurement(name, checks=[math.nan]) for name in ("one", "other")]
    with pytest.raises(RuntimeError, match="nan"):
        check_agreement(rows, 1e-5)


def test_runs_are_saved_and_read(tmp_path):
    result = toy_result()
    path = _report.save(tmp_path, result, _report.facts(), fresh=False)
    saved = _results.read(path)
    assert [claim["text"] for claim in saved["claims"]] == ["met", "missed", "reported"]
    (run,) = saved["runs"]
    assert list(run["claimed"].values()) == [0.5, 2.0, 6.0]
    assert run["absent"] == {"peer": "not installed"}
    assert run["points"]["2"][1]["times"] == result.points["2"]["ours"].times
    _report.save(tmp_path, result, _report.facts(), fresh=False)
    assert len(_results.read(path)["runs"]) == 2
    _report.save(tmp_path, result, _report.facts(), fresh=True)
    assert _results.read(path) == saved


def of_runs(times: list[dict[str, list[float]]]) -> dict[str, Any]:
    """A result with a point of these rows and a claim, which one run does not meet."""
    runs = [
        dict(
            points={"p": [dict(name=name, times=ts) for name, ts in rows.items()]},
            claimed={"claim": float(i)},
        )
        for i, rows in enumerate(times)
    ]
    return dict(claims=[dict(text="claim", bound=1.0)], runs=runs)


def test_a_figure_is_the_median_of_runs():
    # The medians of the rounds of each run are 2, 3 and 7.
    rounds = [[2.0, 1.0, 9.0], [3.0, 3.0, 4.0], [7.0, 8.0, 5.0]]
    result = of_runs([{"floor": [1.0, 1.0, 1.0], "ours": times} for times in rounds])
    assert _results.over(result, "p")["ours"] == (2.0, 3.0, 7.0)
    assert _results.over(result, "p", "ours")["floor"] == (1 / 7, 1 / 3, 1 / 2)
    first = _results.figures(result, "p", lambda row: row["times"][0])
    assert first["ours"] == (2.0, 3.0, 7.0)
    assert _results.claims(result) == [("claim", 1.0, (0.0, 1.0, 2.0))]


def test_what_some_runs_lack_is_left_out():
    result = of_runs([{"floor": [1.0], "peer": [2.0]}, {"floor": [1.0]}])
    assert set(_results.over(result, "p")) == {"floor"}
    result["runs"][1]["claimed"]["claim"] = None
    assert _results.claims(result) == [("claim", 1.0, None)]


def test_results_are_a_page(tmp_path):
    for fresh in (True, False):
        _report.save(tmp_path, toy_result(), _report.facts(), fresh)
    page = _markdown.write(tmp_path, ["transformer"], []).read_text()
    assert "| missed | 1.00 | 2.00 | 2.00–2.00 | **missed** |" in page
    assert "| met | 1.00 | 0.500 | 0.500–0.500 |  |" in page
    assert "2 runs of 3 rounds" in page
    assert "Left out: peer (not installed)." in page
    assert "| 2 | floor | 1.00 | 1.00–1.00 |" in page


def test_plots_are_drawn_of_what_there_is(tmp_path):
    assert list(_plots.draw(tmp_path)) == []
    result = toy_result()
    one = {"1": result.points["1"]}
    result = _report.Result(result.case, 3, one, {})
    _report.save(tmp_path, result, _report.facts(), fresh=True)
    (plot,) = _plots.draw(tmp_path)
    first = plot.read_bytes()
    assert first.startswith(b"<?xml")
    list(_plots.draw(tmp_path))
    assert plot.read_bytes() == first


def test_tables_have_a_line_for_each_row():
    (measured, _) = toy_result().points.values()
    first, apart = _report.tables("Toys", list(measured.values()))
    assert first.row_count == apart.row_count == 2


def test_products_are_counted_from_the_text():
    def f(x, w, v):
        return jnp.tanh(x @ w) @ v, jnp.einsum("bij,bkj->bik", x[None], x[None])

    x, w, v = jnp.ones((5, 3)), jnp.ones((3, 7)), jnp.ones((7, 2))
    compiled = jax.jit(f).lower(x, w, v).compile()
    assert product_flops(compiled) == 2 * (5 * 3 * 7 + 5 * 7 * 2 + 5 * 3 * 5)


def test_an_operand_that_is_read_across_is_seen():
    dot = lambda u, v, i, j: jax.lax.dot_general(u, v, (((i,), (j,)), ((), ())))
    wide, thin = jnp.ones((64, 32)), jnp.ones((64, 4))

    def across(f, *args):
        (product,) = products(jax.jit(f).lower(*args).compile())
        assert product.thinnest == 4 and product.flops == 2 * 64 * 32 * 4
        return product.reads_across

    assert across(lambda u, v: dot(u, v, 0, 0), wide, thin)
    assert not across(lambda u, v: dot(u, v, 0, 0), thin, wide)
    assert not across(lambda u, v: dot(u, v, 1, 1), wide, jnp.ones((4, 32)))


def test_a_peer_that_is_not_there_is_named():
    with pytest.raises(ImportError, match="cannot be run"):
        check_imports("no/such/python", "torch")
    with pytest.raises(ImportError, match="No module named 'no_such_module'"):
        check_imports(sys.executable, "no_such_module")


def test_results_are_of_the_cases_there_are():
    """A case that was renamed, or a claim reworded, must be measured again."""
    cases = {case.name: case for case in all_cases(quick=False, torch=sys.executable)}
    found = {path.stem: _results.read(path) for path in RESULTS.glob("*.json")}
    found.pop("growth")  # Which is of no case: nothing of it is timed.
    assert set(found) == set(cases)
    for name, result in found.items():
        claims = [dict(text=c.text, bound=c.bound) for c in cases[name].claims]
        assert result["claims"] == claims


def test_the_page_of_forms_has_the_figures_measured():
    page = (RESULTS.parents[1] / "docs/guide/forms.md").read_text()
    claims = _results.claims(_results.read(RESULTS / "forms.json"))
    found = {text: spread for text, _, spread in claims}
    for form in forms.FORMS:
        theirs = f"{forms.PEFT}{form}"
        texts = f"{form} ÷ LoRA", f"{theirs} ÷ PEFT's LoRA", f"{form} ÷ {theirs}"
        assert f"| {form} | {' | '.join(map(_said, map(found.get, texts)))} |" in page


def _said(spread: Any) -> str:
    return f"{spread.middle:.2f} ({spread})"


# How steps grow.

PROGRAMS = _results.read(RESULTS / "growth.json")["programs"]
FIGURES = [(*kind, name) for kind in laws.LAWS for name in laws.terms_of(*kind)]


def test_the_page_of_sharding_has_what_was_fitted():
    text = page.PAGE.read_text()
    for table in page.tables(PROGRAMS).values():
        assert table in text


@pytest.mark.parametrize("step, split, name", FIGURES)
def test_programs_follow_the_laws(step, split, name):
    """Those of what is sent, and of arguments, have the coefficients on paper."""
    found = [p for p in PROGRAMS if (p["step"], p["split"]) == (step, split)]
    several = [p for p in found if p["devices"] > 1]
    fitted = laws.fit(several, name, laws.terms_of(step, split)[name])
    if name == "besides":
        assert fitted.off < 0.1
    else:
        assert fitted.off < 0.002
        paper = laws.LAWS[step, split][name]
        assert fitted.coefficients == pytest.approx(paper, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    "step, split", [(LORA, "dp"), (LORA, "tp"), (FULL, "fsdp"), (QLORA, "fsdp")]
)
def test_a_program_follows_them_again(step, split):
    """One of other sizes than any that a law was fitted to."""
    cell = Cell(step, split, devices=4, layers=3, width=768)
    program = dataclasses.asdict(cell) | dataclasses.asdict(figures(cell))
    for name, law in laws.LAWS[step, split].items():
        wanted = sum(n * laws.TERMS[term](program) for term, n in law.items())
        assert laws.figure(program, name) == pytest.approx(wanted, rel=0.005)
