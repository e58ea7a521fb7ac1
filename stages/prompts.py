"""Ask every question of one text variant about every class of one data set."""

from dataclasses import asdict

from stages.texts import ask_all, question_file
from textguard.artifacts import write_json_lines
from textguard.params import Params


def main(params: Params, key: str) -> None:
    write_json_lines(question_file(key), [asdict(question) for question in ask_all(params, key)])
