"""What stage `text_quality` says of the class embeddings of one text variant."""

from textguard.schema.base import Stored, field


class TextQuality(Stored):
    """The texts of a data set and variant, and the class embeddings made of them."""

    classes: int = field("classes", "count")
    mean_pairwise_cosine: float = field("of the embeddings of two classes, mean over pairs")
    largest_cosine: float = field("of the embeddings of two classes")
    closest_classes: list[str] = field("the two classes that have it")
    mean_spread: float = field("cosine distance of the texts from their class's mean direction, mean over classes")
    answers: int = field("texts that were given", "count")
    embedded: int = field("texts that the embeddings are made of", "count")
    strays: int = field("texts nearer to another class's texts than to the others of their own", "count")
    off_class: int = field("strays that do not name their class", "count")
    empty: int = field("empty texts", "count")
    duplicate: int = field("texts that were given before", "count")
    too_short: int = field("texts with too few words", "count")
    unnamed: int = field("texts that do not name their class", "count")
    not_english: int = field("texts in another language", "count")
    cut: int = field("texts that end at the token limit", "count")
    filtered: int = field("texts that the model's filter withheld", "count")
    refused: int = field("texts in which the model refuses to answer", "count")
    encoder: str = field("the text encoder")
    shortened: int = field("texts longer than the encoder reads", "count")
