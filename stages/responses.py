"""Have the questions of one text variant about one data set answered, and clean the answers."""

from dataclasses import asdict
from pathlib import Path

from stages.texts import read_questions
from textguard.artifacts import lasting, write_json_lines
from textguard.params import Params
from textguard.text.cleaning import describe
from textguard.text.language_models import LanguageModel, Network
from textguard.text.questions import Wording, ask
from textguard.text.responses import Sources, answer, self_answered


def main(params: Params, key: str) -> None:
    folder, texts = Path("prompts") / "texts" / key, params.class_texts[key]
    dataset, wanted = params.datasets[texts.dataset], texts.params
    questions = read_questions(params, key)
    answers = answer(wanted.provider, questions, sources(params, key))
    classes = list(dict.fromkeys(question.class_name for question in questions))
    wording = Wording(dataset.context, dataset.phrases)
    answers += self_answered(ask(classes, wanted.templates, wording, f"params.yaml texts.{texts.variant}.templates"))
    write_json_lines(folder / "responses.jsonl", [asdict(description) for description in describe(answers)])


def sources(params: Params, key: str) -> Sources:
    """Where the answers of one text variant come from. Paid ones go to a file that is no output: DVC deletes outputs."""
    texts, root = params.class_texts[key], Path(params.root)
    return Sources(
        samples=texts.params.samples,
        files=[root / file for file in texts.files],
        model=LanguageModel(**asdict(texts.params.model)) if texts.params.model else None,
        network=Network(**asdict(params.network)),
        log=lasting(root / "prompts" / "live" / "answers.jsonl").resolve(),
        label=f"responses {key}",
    )
