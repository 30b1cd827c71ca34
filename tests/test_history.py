"The record tables and their ledger: bad input, every record once, and identities that the figures rely on."

import ast
import io
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from speedrun_lib import history
from speedrun_lib.history import (
    ERAS,
    FAMILIES,
    MATCHED_RUNS,
    Ledger,
    draw_families,
    draw_history,
    draw_ledger,
    draw_map,
    draw_record,
    era_table,
    family_table,
    find_record,
    history_moves,
    ledger,
    load_curve,
    load_records,
    load_samples,
    previous_id,
    record_card,
    tag_shares,
)
from speedrun_lib.page import slim_svg, use_style

IDS = load_records().index.tolist()


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_module_imports_only_page():
    tree = ast.parse(Path(history.__file__).read_text(encoding="utf-8"))
    inside = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
    inside |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and "speedrun_lib" in str(n.module)}
    assert inside == {"page"}


def test_ids_are_complete_and_in_order():
    records = load_records()
    assert [i for i in IDS if not i.startswith("21")] == [str(n) for n in range(1, 90) if n != 21]
    assert IDS[20:24] == ["21", "21b", "21c", "22"]
    assert records.date.is_monotonic_increasing


@pytest.mark.parametrize("bad", [0, 90, "21d", "", None, 1.5])
@pytest.mark.parametrize("ask", [find_record, load_curve, load_samples, record_card, ledger, previous_id, draw_record])
def test_unknown_record_is_one_clear_line(ask, bad):
    with pytest.raises(ValueError, match="1 to 89") as error:
        ask(bad)
    assert "21b" in str(error.value) and "\n" not in str(error.value)


def test_other_bad_input_names_the_choices():
    with pytest.raises(ValueError, match="'table', 'logs', 'matched'"):
        ledger(62, basis="clock")
    with pytest.raises(ValueError, match="first one"):
        ledger(1)
    with pytest.raises(ValueError, match="stored for 30, 48"):
        ledger(62, basis="matched")
    with pytest.raises(ValueError, match="stored for 30, 48"):
        ledger(89, before=87, basis="matched")  # the baseline is the code before 89, not record 87
    with pytest.raises(ValueError, match="at least one"):
        record_card()
    with pytest.raises(ValueError, match="variant:record, validated every 5 steps"):
        load_curve(46, "dense")
    with pytest.raises(ValueError, match="at most one log"):
        load_samples(5)


@pytest.mark.parametrize("record_id", IDS)
def test_every_record_has_a_card(record_id):
    row, text = find_record(record_id), record_card(record_id).data
    assert f"{row.date:%Y-%m-%d}" in text and f"{row.minutes:g} min" in text
    assert not re.search(r"\bnan\b|<NA>|NaT", text), "a missing value leaked into the card"
    assert ("against record" in text) == (record_id != "1")
    assert ("not known" in text) == (record_id == "3")


def test_card_says_what_chapters_need():
    single = record_card("1", needs="no GPU", runs="CPU, about 20 s", our_note="<b>x</b>").data
    for part in ("@karpathy", "llm.c contributors", "Needs", "Runs on", "Our note", "<b>x</b>", "45 min"):
        assert part in single
    assert "@llm.c" not in single, "names with spaces are no handles"
    several = record_card(3, 4, 6, 8, 9, needs="a GPU").data
    assert several.count("<tr>") == 6 and several.index("Record 3") < several.index("Record 9")
    assert several.count("pull/") == 0 and "pull/201" in record_card(62).data


def test_tables_cannot_be_changed_through_a_caller():
    records, samples = load_records(), load_samples(17, "readme_list")
    records.loc["62", "minutes"] = 0
    samples["final_val_loss"] = 0
    assert find_record(62).minutes == 1.655
    assert load_samples(17, "readme_list").final_val_loss.min() > 3.27


@pytest.mark.parametrize("record_id", [i for i in IDS if i not in ("3", "66", "86")])
def test_curves_end_where_the_log_ends(record_id):
    curve, row = load_curve(record_id), find_record(record_id)
    assert curve.step.is_monotonic_increasing and curve.step.iloc[-1] == row.steps
    if record_id != "69":  # its only log ended above the target
        assert curve.val_loss.iloc[-1] < 3.2875
    if row.n_logs == 1:
        assert curve.val_loss.iloc[-1] == pytest.approx(row.final_val_loss, abs=6e-5)


@pytest.mark.parametrize("basis", ["table", "logs", "matched"])
def test_parts_sum_to_the_saving(basis):
    undefined = []
    for record_id in IDS[1:]:
        if basis == "matched" and record_id not in MATCHED_RUNS:
            continue
        split = ledger(record_id, basis=basis)
        if math.isnan(split.fewer) or math.isnan(split.faster):
            undefined.append(record_id)
        else:
            assert split.fewer + split.faster == pytest.approx(split.saving, abs=1e-9)
    gaps = {"table": ["3", "4"], "logs": ["2", "3", "4", "66", "67", "86", "87"], "matched": []}
    assert undefined == gaps[basis]


def test_savings_add_up_to_the_whole_history():
    assert sum(ledger(i).saving for i in IDS[1:]) == pytest.approx(2700 - 73.8)


def test_tokens_are_the_unit_exactly_where_the_batch_changed():
    assert [i for i in IDS[1:] if ledger(i).unit == "tokens"] == ["21", "39", "46"]
    assert ledger(3).unit == "steps", "unknown work is not a changed batch"
    assert any("batch size changed" in note for note in ledger(39).notes)


@pytest.mark.parametrize(("record_id", "before", "after"), [  # seconds, as stated in the records' write-ups
    (48, 132.72, 131.21), (52, 124.36, 122.09), (56, 114.43, 112.97), (63, 98.11, 97.71), (67, 96.08, 92.98),
    (80, 93.02, 92.63), (81, 84.70, 81.91), (82, 85.90, 85.22), (83, 85.39, 84.43), (84, 84.63, 83.85),
    (87, 80.61, 77.34), (88, 79.27, 78.49), (89, 80.73, 79.68)])
def test_matched_runs_are_the_published_comparisons(record_id, before, after):
    assert ledger(record_id, basis="matched").seconds == pytest.approx((before, after), abs=0.011)


def test_notes_name_what_weakens_a_comparison():
    assert any("re-timing" in note for note in ledger("21b").notes)
    assert any("rules changed" in note for note in ledger(22, before=21).notes) and not ledger(22).notes
    assert any("H200" in note for note in ledger(82, basis="logs").notes)
    assert any("not merged" in note for note in ledger(87, basis="matched").notes)
    assert any("other base or machine" in note for note in ledger(89, basis="logs").notes)
    assert not ledger(61, basis="matched").notes


positive = st.floats(1e-2, 1e4)


@given(positive, positive, positive, positive)
def test_split_is_exact_and_antisymmetric(t0, t1, w0, w1):
    there = Ledger("b", "a", "table", "steps", (t0, t1), (w0, w1), ())
    back = Ledger("a", "b", "table", "steps", (t1, t0), (w1, w0), ())
    scale = max(t0, t1) * max(w0 / w1, w1 / w0)
    assert there.fewer + there.faster == pytest.approx(there.saving, abs=1e-9 * scale)
    assert there.fewer == pytest.approx(-back.fewer) and there.faster == pytest.approx(-back.faster)
    assert (there.fewer > 0) == (w0 > w1), "less work is never booked as a loss"


def test_every_tag_belongs_to_one_family():
    taught = [tag for names in FAMILIES.values() for tag in names.split()]
    assert len(taught) == len(set(taught))
    for record_id, tags in load_records().technique_tags.items():
        shares = tag_shares(tags)
        assert (sum(shares.values()) == pytest.approx(1)) if shares else record_id in ("1", "21b"), record_id
    with pytest.raises(KeyError):
        tag_shares("perpetual_motion")


def test_eras_chain_and_factors_multiply():
    table = era_table()
    assert (table["tokens ÷"] * table["tokens/s ×"]).to_numpy() == pytest.approx(table["time ÷"].to_numpy())
    borders = list(ERAS.values())
    assert all(find_record(a[1]).number == find_record(b[0]).number for a, b in zip(borders, borders[1:], strict=False))
    moves = history_moves()
    assert family_table().to_numpy().sum() == pytest.approx(moves[["fewer", "faster"]].to_numpy().sum())
    assert math.prod(table["time ÷"]) == pytest.approx(math.exp(moves[["fewer", "faster"]].to_numpy().sum()))


@pytest.mark.parametrize("record_id", ["1", "2", "3", "4", "13", "21", "21b", "66", "67", "85", "86", 89])
def test_player_and_ledger_draw_for_records_with_gaps(record_id):
    player = draw_record(record_id)
    lines = sum(len(ax.lines) for ax in player.axes)
    assert lines >= 1 and any("seconds" in text.get_text() for ax in player.axes for text in ax.texts)
    if record_id == "1":
        with pytest.raises(ValueError, match="first one"):
            draw_ledger(record_id)
        return
    texts = " ".join(text.get_text() for text in draw_ledger(record_id).axes[0].texts)
    assert ("unknown" in texts) == (record_id in ("3", "4"))


def test_overview_figures_label_what_the_text_names():
    texts = " ".join(text.get_text() for text in draw_history().axes[0].texts)
    for name in ("modern block", "FlexAttention", "bigram hash", "MUDD gates"):
        assert name in texts
    dots = sum(len(line.get_xdata()) for line in draw_history().axes[0].lines)
    assert dots == 89
    assert len(draw_families().axes[0].patches) == 2 * len(FAMILIES)
    main = draw_map().axes[0]
    assert {"1", "62", "89"} <= {text.get_text() for ax in (main, *main.child_axes) for text in ax.texts}


def test_slim_svg_is_valid_smaller_and_keeps_every_label():
    with plt.rc_context():
        use_style()  # text stays text
        figure, plain = draw_ledger(89), io.StringIO()
        text = slim_svg(figure)
        figure.savefig(plain, format="svg")
    labels = [[node.text for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
              for svg in (text, plain.getvalue())]
    assert labels[0] == labels[1] and any("78.5" in label for label in labels[0])
    assert len(text) < 0.7 * len(plain.getvalue())
