"""Read one data set, split it, store both splits, as pixels or as an index of files, and the class names."""

from pathlib import Path

from textguard.params import Params
from textguard.vision.datasets import data_root, make_splits, read_source, save_splits


def main(params: Params, key: str) -> None:
    dataset = params.datasets[key]
    root = data_root(dataset.source, dataset.folder, Path(params.root))
    content = read_source(dataset.source, root)
    splits = make_splits(
        content,
        dataset.source,
        test_share=dataset.test_share,
        split_seed=dataset.split_seed,
        limit_train=dataset.limit_train,
        limit_test=dataset.limit_test,
    )
    options = {name: getattr(dataset, name) for name in ("source", "checksum", "corrupt_share", "orientation")}
    save_splits(Path("data") / key, content, splits, root, **options)
