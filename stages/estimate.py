"""Dry run of stage `responses` with a language model: say what it would ask for, and ask nothing."""

from stages.responses import sources
from stages.texts import read_questions
from textguard.params import Params
from textguard.text.language_models import PRICES
from textguard.text.responses import estimate_model


def main(params: Params, text: str) -> None:
    wanted = estimate_model(read_questions(params, text), sources(params, text))
    cost = f"no price in {PRICES}" if wanted.most_usd is None else f"about {wanted.most_usd:.4f} USD at most"
    print(
        f"{text}: {wanted.requests} requests, about {wanted.input_tokens} tokens in, "
        f"at most {wanted.most_output_tokens} out, {cost}"
    )
