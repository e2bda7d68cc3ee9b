"""Questions that are answered in words: a folder of images and a file of questions, and whether an answer is right."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

from .question import Question
from .refcoco import open_rgb

FILE = "questions.jsonl"
# LLaVA-1.5, arXiv 2310.03744, section 3.2; Qwen-VL and others were trained with it since.
PROMPT = "{}\nAnswer the question using a single word or phrase."

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = re.compile(r"[^\w\s.:/%$-]|[.:](?=\s|$)")


def read_vqa(data: Path) -> list[Question]:
    """Return the questions of a folder.

    Args:
        data: A folder with ``questions.jsonl`` and the images; or that file itself. A line is
            ``{"image": "1.jpg", "question": "...", "answer": "yes"}``, and optionally ``"id"``; ``"answer"`` may be a
            list of right answers. Paths of images count from the folder of the file.

    Raises:
        ValueError: There is no such file, or a line says something else.
    """
    path = data if data.is_file() else data / FILE
    line_of = '{"image": "1.jpg", "question": "What is on the table?", "answer": "a cup"}'
    if not path.is_file():
        raise ValueError(
            f"no questions in {str(data)!r}: expected {FILE} there, a line for each, as in {line_of}"
        )
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            answers = values["answer"]
            questions.append(
                Question(
                    str(values.get("id", number)),
                    values["question"],
                    functools.partial(open_rgb, path.parent / values["image"], upright=True),
                    answers=(answers,) if isinstance(answers, str) else tuple(map(str, answers)),
                )
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{str(path)!r}, line {number}: expected a line as in {line_of}; {error!r}"
            ) from error
    return questions


def normalized(answer: str) -> str:
    """Return an answer in small letters, without articles, punctuation and spare blanks."""
    return " ".join(_ARTICLES.sub(" ", _PUNCTUATION.sub(" ", answer.lower())).split())


def is_right(answer: str, answers: tuple[str, ...]) -> bool:
    """Return whether ``answer`` is one of ``answers``, both normalized."""
    return normalized(answer) in map(normalized, answers)
