"""Tables as text: a mean and its interval in one cell, Markdown and LaTeX. What stands in them is made in `report.py`.

Cells may hold prompts and file names, so whatever Markdown, HTML or LaTeX would act on is escaped.
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection

import numpy as np
import pandas as pd

LATEX = str.maketrans(
    {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}"}
    | {sign: rf"\{sign}" for sign in "&%$#_{}"}
    | {sign: f"{{{sign}}}" for sign in "[]"}  # after a row's end a bracket would be read as an option
    | {"–": "--", "−": "--"}
)


def with_intervals(table: pd.DataFrame, *, signed: Collection[str] = ()) -> pd.DataFrame:
    """The table with each column x, x_low, x_high (or mean, low, high) as one of text: "0.520 [0.480, 0.560]".

    signed: columns that show their plus, such as gains. A missing value is "–", one without ends says so.
    """
    shown = table.copy()
    for name in table.columns:
        ends = ["low", "high"] if name == "mean" else [f"{name}_low", f"{name}_high"]
        if not set(ends) <= set(table.columns):
            continue
        sign = "+" if name in signed else ""
        shown[name] = [_interval(values, sign) for values in table[[name, *ends]].astype(float).to_numpy()]
        shown = shown.drop(columns=ends)
    return shown


def to_markdown(table: pd.DataFrame) -> str:
    """The table in GitHub's Markdown, numbers to the right and with three decimals, cells escaped; ends with a newline."""
    heads, body, right = _cells(table)
    lines = [heads, ["---:" if number else "---" for number in right], *body]
    escaped = [[_markdown(cell) for cell in line] if i != 1 else line for i, line in enumerate(lines)]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def to_latex(table: pd.DataFrame) -> str:
    """The table as a LaTeX `tabular`, cells escaped; ends with a newline."""
    heads, body, right = _cells(table)
    rows = [" & ".join(cell.translate(LATEX) for cell in line) + r" \\" for line in (heads, *body)]
    begin = rf"\begin{{tabular}}{{{''.join('r' if number else 'l' for number in right)}}}"
    lines = [r"% needs \usepackage{booktabs}", begin, r"\toprule", rows[0], r"\midrule", *rows[1:]]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _interval(values: np.ndarray, sign: str) -> str:
    if not np.isfinite(values[0]):
        return "–"
    ends = ", ".join(f"{v:{sign}.3f}" for v in values[1:]) if np.isfinite(values[1]) else "no interval"
    return f"{values[0]:{sign}.3f} [{ends}]"


def _cells(table: pd.DataFrame) -> tuple[list[str], list[list[str]], list[bool]]:
    """Heads, rows and which columns hold numbers; text in one line, "–" for what is missing."""
    number = [pd.api.types.is_numeric_dtype(table[name]) and table[name].dtype != bool for name in table.columns]
    columns = [_column(table[name], is_number) for name, is_number in zip(table.columns, number, strict=True)]
    return [" ".join(str(name).split()) for name in table.columns], [list(row) for row in zip(*columns, strict=True)], number


def _column(values: pd.Series, is_number: bool) -> list[str]:
    known = values.dropna()
    form = "{:.0f}" if is_number and (known == known.round()).all() else "{:.3f}" if is_number else "{}"
    return ["–" if gone else " ".join(form.format(value).split()) for value, gone in zip(values, values.isna(), strict=True)]


def _markdown(text: str) -> str:
    """Nothing in a cell acts: no tag, entity, column, emphasis, code, mathematics, or link."""
    text = re.sub(r"([\\`*|$~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", html.escape(text, quote=False))
    return text.replace("](", "]\\(")
