"""Sections as HTML: a table each, with nothing left out, since a notebook can scroll."""

from collections.abc import Iterable, Sequence
from html import escape

from lora_inject.printing.sections import REFUSED, STILL, TRAINS, Column, Section

_COLOURS = {TRAINS: "color:#188038", STILL: "opacity:0.6", REFUSED: "color:#b06000", "": ""}


def as_html(sections: Sequence[Section]) -> str:
    """One ``div`` with a title, a table and notes for each section."""
    return f"<div>{''.join(map(_section, sections))}</div>"


def _section(section: Section) -> str:
    title = "<br>".join(map(escape, section.title.splitlines()))
    notes = "".join(f"<li>{escape(note)}</li>" for note in section.notes)
    if len(section.notes) == 1:
        below = f"<p>{escape(section.notes[0])}</p>"
    else:
        below = f"<ul>{notes}</ul>" if notes else ""
    return (
        f'<p style="margin:1em 0 0.3em"><b>{title}</b></p>'
        + (_table(section) if section.columns else "")
        + below
    )


def _table(section: Section) -> str:
    columns = [Column.of(head) for head in section.columns]
    head = _cells("th", columns, [column.name for column in columns])
    rows = "".join(
        f'<tr style="{_COLOURS[section.style(i)]}">{_cells("td", columns, row)}</tr>'
        for i, row in enumerate(section.rows)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _cells(tag: str, columns: Iterable[Column], texts: Iterable[str]) -> str:
    def cell(column: Column, text: str) -> str:
        style = f"padding:0 0.6em;text-align:{'right' if column.number else 'left'}"
        return f'<{tag} style="{style}">{escape(text)}</{tag}>'

    return "".join(map(cell, columns, texts))
