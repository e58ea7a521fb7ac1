"""Have the questions of one text variant answered."""

from dataclasses import asdict
from pathlib import Path

from textguard.artifacts import read_records, write_json_lines
from textguard.params import Params
from textguard.text.questions import Question
from textguard.text.responses import answer


def main(params: Params, text: str) -> None:
    folder, wanted = Path("prompts") / text, params.texts[text]
    questions = read_records(folder / "questions.jsonl", "prompts", Question)
    answers = answer(wanted.provider, questions, wanted.samples, [Path(params.root) / file for file in wanted.cache])
    write_json_lines(folder / "responses.jsonl", [asdict(given) for given in answers])
