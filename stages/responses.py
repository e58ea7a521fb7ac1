"""Have the questions of one text variant answered, and clean the answers."""

from dataclasses import asdict
from pathlib import Path

from textguard.artifacts import read_records, write_json_lines
from textguard.params import Params
from textguard.text.cleaning import describe
from textguard.text.language_models import LanguageModel, Network
from textguard.text.questions import Question, Wording, ask
from textguard.text.responses import Sources, answer, self_answered


def main(params: Params, text: str) -> None:
    folder = Path("prompts") / text
    questions = read_records(folder / "questions.jsonl", "prompts", Question)
    wanted = params.texts[text]
    answers = answer(wanted.provider, questions, sources(params, text))
    classes = list(dict.fromkeys(question.class_name for question in questions))
    wording = Wording(wanted.context, wanted.phrases)
    answers += self_answered(ask(classes, wanted.templates, wording, f"params.yaml texts.{text}.templates"))
    write_json_lines(folder / "responses.jsonl", [asdict(description) for description in describe(answers)])


def sources(params: Params, text: str) -> Sources:
    """Where the answers of one text variant come from. Paid ones go to a file that is no output: DVC deletes outputs."""
    wanted, root = params.texts[text], Path(params.root)
    # `dvc exp run --temp` and queued experiments work in a copy of the repository that is deleted afterwards.
    repository = Path(str(root.resolve()).partition("/.dvc/tmp/exps/")[0])
    return Sources(
        samples=wanted.samples,
        files=[root / file for file in wanted.cache],
        model=LanguageModel(**asdict(wanted.model)) if wanted.model else None,
        network=Network(**asdict(params.network)),
        log=repository / "prompts" / "live" / "answers.jsonl",
        label=f"responses {text}",
    )
