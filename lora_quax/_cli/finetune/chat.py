"""Chat templates, which are programs in Jinja: they run where they can do no harm."""

import datetime
import functools as ft
import json
from collections.abc import Sequence
from typing import Any

from .extra import needs


def render(
    template: str,
    messages: Sequence[dict[str, str]],
    asks: bool,
    special: dict[str, str],
) -> str:
    """A chat as a template writes it; with what begins the assistant's turn, if it is
    asked.

    **Raises:** `ValueError` if the template is none, or does not take the messages;
    `ImportError`.
    """
    jinja2 = needs("jinja2")
    try:
        return _compiled(template).render(
            messages=list(messages), add_generation_prompt=asks, **special
        )
    except jinja2.TemplateError as e:
        raise ValueError(f"the chat template does not take it: {e}") from e
    except (ArithmeticError, LookupError, MemoryError, TypeError, RecursionError) as e:
        why = f"{type(e).__name__}: {e}"
        raise ValueError(f"the chat template does not take it: {why}") from e


@ft.lru_cache(maxsize=4)
def _compiled(template: str) -> Any:
    jinja2, sandbox = needs("jinja2"), needs("jinja2.sandbox")

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    # What templates on Hugging Face may use.
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda f: f"{datetime.date.today():{f}}"
    environment.filters["tojson"] = ft.partial(json.dumps, ensure_ascii=False)
    return environment.from_string(template)
