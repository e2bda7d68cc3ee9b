"""Accuracy of a model on a user's own data, pruned and not: readers, answer formats, resumable answers, the comparison."""

from .asking import Answer, Asker
from .boxes import FORMATS, BoxFormat, View, find_format
from .decoders import DecoderAsker, minigpt_v2_asker, shikra_asker
from .question import Question
from .refcoco import read_refcoco
from .run import Evaluation
from .summary import Comparison, Row
from .synthetic import write_refcoco
from .vqa import read_vqa
from .ways import UNPRUNED, Way, ways_of

__all__ = [
    "FORMATS",
    "UNPRUNED",
    "Answer",
    "Asker",
    "BoxFormat",
    "Comparison",
    "DecoderAsker",
    "Evaluation",
    "Question",
    "Row",
    "View",
    "Way",
    "find_format",
    "minigpt_v2_asker",
    "read_refcoco",
    "read_vqa",
    "shikra_asker",
    "ways_of",
    "write_refcoco",
]
