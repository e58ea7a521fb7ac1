"""Dry run of stage `responses` with a language model: say what it would ask for, and ask nothing."""

from pathlib import Path

from stages.responses import sources
from textguard.artifacts import read_records
from textguard.params import Params
from textguard.text.language_models import PRICES
from textguard.text.questions import Question
from textguard.text.responses import estimate_model


def main(params: Params, text: str) -> None:
    questions = read_records(Path("prompts") / text / "questions.jsonl", "prompts", Question)
    wanted = estimate_model(questions, sources(params, text))
    cost = f"no price in {PRICES}" if wanted.most_usd is None else f"about {wanted.most_usd:.4f} USD at most"
    print(
        f"{text}: {wanted.requests} requests, about {wanted.input_tokens} tokens in, "
        f"at most {wanted.most_output_tokens} out, {cost}"
    )
