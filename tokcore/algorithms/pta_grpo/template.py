"""Stage 1 of PTA-GRPO: responses of one template, built from existing reasoning, and parsed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

SECTIONS = ("plan", "think", "answer")


class Response(NamedTuple):
    """What stands between the tags of a response, without white space around it."""

    plan: str
    think: str
    answer: str


@dataclass(frozen=True)
class Template:
    r"""The opening and closing tags of the three sections of a response.

    The paper's format reward and training data speak of answer tags (the default here), its prompt
    for reinforcement learning of a boxed answer: ``Template(answer=("\\boxed{", "}"))``.
    """

    plan: tuple[str, str] = ("<plan>", "</plan>")
    think: tuple[str, str] = ("<think>", "</think>")
    answer: tuple[str, str] = ("<answer>", "</answer>")

    def __post_init__(self) -> None:
        pairs = [(name, getattr(self, name)) for name in SECTIONS]
        for name, pair in pairs:
            if len(pair) != 2 or not all(isinstance(tag, str) and tag.strip() for tag in pair):
                raise ValueError(
                    f"Template: {name} must be two tags that are not empty, got {pair!r}"
                )
        tags = [tag for _, pair in pairs for tag in pair]
        if len(set(tags)) < len(tags):
            raise ValueError(f"Template: all tags must differ, got {tags}")


TEMPLATE = Template()


def build_response(plan: str, think: str, answer: str, *, template: Template = TEMPLATE) -> str:
    """Put plan, reasoning and answer between the tags of the template, one section a line.

    Args:
        plan, think, answer: the sections; white space around them is dropped.
        template: the tags.
    Returns:
        A response that ``parse_response`` takes apart into the same three sections.
    Raises:
        TypeError: a section that is not a string.
        ValueError: a section that is empty or holds a tag of the template: the response would not
            be one of the template.

    >>> build_response("Split, then add.", "7 + 5 = 12", "12")
    '<plan>Split, then add.</plan>\\n<think>7 + 5 = 12</think>\\n<answer>12</answer>'

    Source: arXiv 2510.01833, section 3.1.
    """
    lines = []
    for name, text in zip(SECTIONS, (plan, think, answer), strict=True):
        if not isinstance(text, str):
            raise TypeError(f"build_response: {name} must be a str, got {type(text).__name__}")
        text, (opening, closing) = text.strip(), getattr(template, name)
        if not _is_content(text, name, template):
            raise ValueError(
                f"build_response: {name} must not be empty nor hold a tag of the template, got "
                f"{text!r}"
            )
        lines.append(f"{opening}{text}{closing}")
    return "\n".join(lines)


def cold_start_response(
    question: str,
    reasoning: str,
    answer: str,
    *,
    summarise: Callable[[str, str], str],
    template: Template = TEMPLATE,
) -> str:
    """One response for the supervised cold start: a plan drawn from reasoning that exists already.

    Equivalent to ``build_response(summarise(question, reasoning), reasoning, answer)``. The model
    is then trained on the plain negative log-likelihood of this response after the question, by
    any supervised trainer.

    Args:
        question: the problem.
        reasoning: a chain of thought that solves it, without the final answer.
        answer: the final answer.
        summarise: (question, reasoning) -> plan: a general plan without concrete computation. The
            paper asks a large language model (its instruction is not printed) and finds that plans
            by the policy itself cost about one point.
        template: the tags.
    Returns:
        The response.
    Raises:
        TypeError, ValueError: as build_response.

    >>> plan_of = lambda question, reasoning: "Add the numbers."
    >>> text = cold_start_response("7 + 5?", "7 + 5 = 12", "12", summarise=plan_of)
    >>> parse_response(text).plan
    'Add the numbers.'

    Source: arXiv 2510.01833, section 3.1.
    """
    return build_response(summarise(question, reasoning), reasoning, answer, template=template)


def parse_response(response: str, *, template: Template = TEMPLATE) -> Response | None:
    r"""Take a response apart, or give None where it does not strictly follow the template.

    ``parse_response(...) is not None`` is the condition of the structure reward. A response follows
    the template where it is plan, think and answer in this order, each once between its tags and
    not empty, with nothing but white space before, between and after them, and no tag of the
    template inside a section. Where a lone ``}`` closes the answer (of ``\boxed{``), braces are
    ordinary text, but must pair up inside the answer: ``\boxed{\frac{1}{2}}``.

    Args:
        response: the text that the policy wrote.
        template: the tags.
    Returns:
        The three sections without white space around them, or None: a section is missing, empty,
        repeated, nested, unclosed or out of order, or there is other text.
    Raises:
        TypeError: a response that is not a string.

    >>> parse_response("<plan>Add.</plan> <think>7 + 5</think> <answer>12</answer>")
    Response(plan='Add.', think='7 + 5', answer='12')
    >>> parse_response("<think>7 + 5</think><answer>12</answer>") is None
    True

    Source: arXiv 2510.01833, section 3.2, Eq. 6.
    """
    if not isinstance(response, str):
        raise TypeError(f"parse_response: response must be a str, got {type(response).__name__}")
    # One pass from tag to tag: a regular expression backtracks for minutes over a response that
    # repeats its tags, which policies do.
    found, rest = [], response.strip()
    for name in SECTIONS:
        opening, closing = getattr(template, name)
        if not rest.startswith(opening):
            return None
        rest = rest[len(opening) :]
        if name == "answer":
            text, ending, rest = rest[: -len(closing)], rest[-len(closing) :], ""
        else:
            text, ending, rest = rest.partition(closing)
        text, rest = text.strip(), rest.lstrip()
        if ending != closing or not _is_content(text, name, template):
            return None
        found.append(text)
    return Response(*found)


def _is_content(text: str, section: str, template: Template) -> bool:
    tags = {tag for name in SECTIONS for tag in getattr(template, name)}
    if template.answer[1] == "}":
        # A brace is ordinary text elsewhere; in the answer, which it closes, braces must pair up.
        tags.remove("}")
        if section == "answer" and not _braces_pair_up(text):
            return False
    return bool(text) and not any(tag in text for tag in tags)


def _braces_pair_up(text: str) -> bool:
    depth = 0
    for character in re.sub(r"\\.", "", text):  # \{ and \} are printed, they open nothing
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0
