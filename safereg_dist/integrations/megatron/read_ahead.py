"""The items of one step's micro-batches, read before its schedule and given to it again."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from safereg_dist.data.stream import batch_of_stream
from safereg_dist.errors import ConfigError, DataError
from safereg_dist.parallel.comm import Result, capture
from safereg_dist.parallel.megatron import listed
from safereg_dist.types import MicroBatch


class ReadAhead:
    """The items of this rank's chunks."""

    def __init__(
        self, arguments: Mapping[str, Any], read_item: Callable[[Any], Mapping[str, Any]]
    ) -> None:
        """`arguments` are the schedule's. An iterator that ends is an error that travels."""
        given = arguments["data_iterator"]
        self.chunks = listed(arguments["model"])
        self.count: int = arguments["num_microbatches"]
        self.shape = (arguments["micro_batch_size"], arguments["seq_length"])
        self._read_item = read_item
        self._is_list = isinstance(given, list)
        iterators = given if self._is_list else [given] * len(self.chunks)
        self.read: Result[list[list[Any] | None]] = capture(self._items_of, iterators)
        """Of each chunk the items; None where this rank has no iterator."""

    def _items_of(self, iterators: list[Iterator[Any] | None]) -> list[list[Any] | None]:
        return [
            None if iterator is None else [next(iterator) for _ in range(self.count)]
            for iterator in iterators
        ]

    def batches(self) -> list[MicroBatch]:
        """The rows of each micro-batch, from the last chunk's items; an error travels in it."""
        found = [self.read.then(self._batch, index) for index in range(self.count)]
        return [MicroBatch.failed(f.error) if f.error is not None else f.value for f in found]

    def _batch(self, items: list[list[Any] | None], index: int) -> MicroBatch:
        own = items[-1]
        if own is None:
            raise ConfigError(
                "the first tensor-parallel rank of the last stage has no data iterator: it reads "
                "labels there in Megatron-LM; give it one"
            )
        batch = batch_of_stream(self._read_item(own[index]))
        if batch.input_ids.shape != self.shape:
            raise DataError(
                f"expected micro-batches of {self.shape[0]} lines of {self.shape[1]} tokens, as "
                f"the schedule was told, got {tuple(batch.input_ids.shape)}: pad each line to "
                "seq_length"
            )
        return batch

    def one(self, chunk: int, index: int) -> Iterator[Any] | None:
        """An iterator with the item of one micro-batch alone."""
        items = self.read.value[chunk]
        return None if items is None else iter([items[index]])

    def replayed(self) -> Any:
        """What takes the place of the data iterators."""
        found = [None if items is None else iter(items) for items in self.read.value]
        return found if self._is_list else found[0]
