"""What is asked of the `datasets` library, which is imported only when it is needed."""

from __future__ import annotations

from typing import Any

from alignkit.errors import DataError


def is_dataset(data: Any) -> bool:
    """Whether somebody handed over an object of `datasets`; told by its module's name."""
    return any(cls.__module__.split(".")[0] == "datasets" for cls in type(data).__mro__)


def load_hub(name: str, split: str, *, streaming: bool = False) -> Any:
    """A data set of the hub, or of its cache.

    Raises:
        DataError: if it cannot be had.
    """
    import datasets

    try:
        return datasets.load_dataset(name, split=split, streaming=streaming)
    except (
        Exception
    ) as error:  # the hub client, the network and the dataset's own files all raise here
        raise DataError(
            f"Data must be a path that exists or a dataset on the hub with a split {split!r}; "
            f"{name!r} is neither here nor could it be loaded: {type(error).__name__}: {error}"
        ) from error


def undecoded(data: Any, split: str, *, name: str) -> Any:
    """The data set of a split, with columns that decode files when read handed over as they are.

    Raises:
        DataError: if there is no such split.
    """
    import datasets

    if isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        if split not in data:
            raise DataError(
                f"{name} has the splits {', '.join(data)}, and none is {split!r}. Hand over one "
                f"of them, such as data[{next(iter(data), split)!r}]."
            )
        data = data[split]
    for column, feature in (data.features or {}).items():
        if getattr(feature, "decode", False):
            data = data.cast_column(column, type(feature)(decode=False))
    return data
