"""What stage `text_quality` says of the class embeddings of one text variant."""

from textguard.schema.base import Name, Stored, Whole, field

_COSINE = (-1.0, 1.0)


class TextQuality(Stored):
    """The texts of a data set and variant, and the class embeddings made of them."""

    classes: Whole = field("classes", "count")
    mean_pairwise_cosine: float = field("of the embeddings of two classes, mean over pairs", within=_COSINE)
    largest_cosine: float = field("of the embeddings of two classes", within=_COSINE)
    closest_classes: list[Name] = field("the two classes that have it", min_length=2, max_length=2)
    mean_spread: float = field(
        "cosine distance of the texts from their class's mean direction, mean over classes", within=(0.0, 2.0)
    )
    answers: Whole = field("texts that were given", "count")
    embedded: Whole = field("texts that the embeddings are made of", "count")
    strays: Whole = field("texts nearer to another class's texts than to the others of their own", "count")
    off_class: Whole = field("strays that do not name their class", "count")
    empty: Whole = field("empty texts", "count")
    duplicate: Whole = field("texts that were given before", "count")
    too_short: Whole = field("texts with too few words", "count")
    unnamed: Whole = field("texts that do not name their class", "count")
    not_english: Whole = field("texts in another language", "count")
    cut: Whole = field("texts that end at the token limit", "count")
    filtered: Whole = field("texts that the model's filter withheld", "count")
    refused: Whole = field("texts in which the model refuses to answer", "count")
    encoder: Name = field("the text encoder")
    shortened: Whole = field("texts longer than the encoder reads", "count")
