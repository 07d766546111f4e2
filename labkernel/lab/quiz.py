"""Predict first: a question with a reason behind each answer, as a widget and, without one, as text that unfolds."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any


def predict(question: str, *, right: Mapping[str, str], wrong: Mapping[str, str]) -> None:
    """Ask a question. Each answer comes with the reason why it is right, or is not.

    With a kernel behind it the reader chooses and is told; on a page each answer unfolds. The answers are in
    alphabetical order, so that their place gives nothing away.
    """
    from IPython.display import display

    verdicts = {answer: f"Yes. {reason}" for answer, reason in right.items()}
    verdicts |= {answer: f"Not so. {reason}" for answer, reason in wrong.items()}
    verdicts = dict(sorted(verdicts.items()))
    bundle: dict[str, Any] = {
        "text/html": as_page(question, verdicts),
        "text/plain": as_text(question, verdicts),
    }
    kind = "application/vnd.jupyter.widget-view+json"
    bundle[kind] = as_widget(question, verdicts)._repr_mimebundle_()[kind]
    display(bundle, raw=True)  # type: ignore[no-untyped-call]


def as_page(question: str, verdicts: Mapping[str, str]) -> str:
    """The quiz where there is no kernel: each answer unfolds."""
    items = "".join(
        f"<details><summary>{html.escape(answer)}</summary><p>{html.escape(verdict)}</p></details>"
        for answer, verdict in verdicts.items()
    )
    return f"<p><b>Predict:</b> {html.escape(question)} <i>(Click an answer.)</i></p>{items}"


def as_text(question: str, verdicts: Mapping[str, str]) -> str:
    """The quiz on paper: the answers, without giving away which is right."""
    return "\n".join([f"Predict: {question}", *(f"  ( ) {answer}" for answer in verdicts)])


def as_widget(question: str, verdicts: Mapping[str, str]) -> Any:
    """The quiz as radio buttons, for where there is a kernel."""
    import ipywidgets  # type: ignore[import-untyped]

    heading = ipywidgets.HTML(f"<b>Predict:</b> {html.escape(question)}")
    choices = ipywidgets.RadioButtons(
        options=list(verdicts), value=None, layout=ipywidgets.Layout(width="max-content")
    )
    answer = ipywidgets.HTML()

    def tell(change: Any) -> None:
        answer.value = (
            f'<div role="status">{html.escape(verdicts[change["new"]])}</div>' if change["new"] else ""
        )

    choices.observe(tell, names="value")
    return ipywidgets.VBox([heading, choices, answer])
