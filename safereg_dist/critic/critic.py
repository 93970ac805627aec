"""Conversations judged once each, in the background; failures are never cached.

Collectives: none.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING

from safereg_dist.config.risk import CriticConfig
from safereg_dist.critic.verdict import Critic, Messages, Verdict, conversation_key
from safereg_dist.errors import CheckpointError, CriticUnavailable
from safereg_dist.screen.progress import progress_bar, say
from safereg_dist.storage.score_cache import CachedScore, ScoreCache, default_cache_path

if TYPE_CHECKING:
    import torch

_IN_FLIGHT = 4096  # futures, not requests: enough that one slow verdict does not block later ones


def score_conversations(
    critic: Critic,
    conversations: Iterable[Messages],
    *,
    progress: bool,
    description: str,
    total: int | None = None,
) -> Iterator[Verdict]:
    """Verdicts in input order; equal conversations are judged once, a bounded number is waiting.

    Args:
        total: how many conversations there are, for the progress bar; None if nobody knows.
    Raises:
        CriticUnavailable, ConfigError: as the futures of `Critic.submit`.
    """
    failed = 0
    with progress_bar(total=total, desc=description, unit=" rows", shown=progress) as bar:
        for future in _asked_ahead(critic, conversations):
            verdict = future.result()
            failed += verdict.failed
            if verdict.failed and failed == 1 and progress:
                say(f"{description}: a judgement failed ({verdict.reason}), the first one")
            bar.set_postfix(failed=failed, refresh=False)
            bar.update()
            yield verdict


def _asked_ahead(critic: Critic, conversations: Iterable[Messages]) -> Iterator[Future[Verdict]]:
    """Yields futures in input order, each once it is done or too many are pending."""
    asked: dict[str, Future[Verdict]] = {}
    waiting: deque[Future[Verdict]] = deque()
    for messages in conversations:
        key = conversation_key(messages)
        if key not in asked:
            asked[key] = critic.submit(messages)
        waiting.append(asked[key])
        while waiting and (waiting[0].done() or len(waiting) >= _IN_FLIGHT):
            yield waiting.popleft()
    yield from waiting


class CachedCritic:
    """A judge with its score cache: requests nothing that is cached or in flight.

    A verdict is stored before its future is set, so a verdict that was seen survives a crash. One
    thread writes all verdicts that have arrived in one transaction; no other thread waits for it.
    """

    def __init__(self, critic: Critic, cache: ScoreCache) -> None:
        self.identity = critic.identity
        self._critic, self._cache = critic, cache
        self._lock = threading.Lock()
        self._under_way: dict[str, Future[Verdict]] = {}
        self._arrived: queue.SimpleQueue[tuple[str, Future[Verdict]] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="critic cache", daemon=True)
        self._writer.start()

    def submit(self, messages: Messages) -> Future[Verdict]:
        """As `Critic.submit`; concurrent calls with the same content share one request.

        The future carries CheckpointError where the cache cannot be read or written: rows are sent
        where one rank that raises would leave the others waiting.
        """
        key = conversation_key(messages)
        with self._lock:
            if key in self._under_way:
                return self._under_way[key]
            future: Future[Verdict] = Future()
            future.set_running_or_notify_cancel()  # shared: no caller may cancel it for the others
            try:
                known = self._cache.get_many(self.identity, [key]).get(key)
            except CheckpointError as err:
                future.set_exception(err)
                return future
            if known is not None:
                future.set_result(Verdict(known.score, known.category))
                return future
            asked = self._critic.submit(messages)
            self._under_way[key] = future
        asked.add_done_callback(lambda done: self._arrived.put((key, done)))
        return future

    def close(self) -> None:
        """Closes the judge, stores the verdicts received, and closes the cache."""
        self._critic.close()
        self._arrived.put(None)
        self._writer.join()
        self._cache.close()

    def _write(self) -> None:
        """Stores verdicts in batches as they arrive, then sets their futures."""
        is_open = True
        while is_open:
            batch = [self._arrived.get()]
            while not self._arrived.empty():
                batch.append(self._arrived.get())
            is_open = None not in batch
            self._store([entry for entry in batch if entry is not None])
        with self._lock:
            left, self._under_way = list(self._under_way.values()), {}
        for future in left:
            future.set_exception(CriticUnavailable("the judge was closed before it answered"))

    def _store(self, batch: list[tuple[str, Future[Verdict]]]) -> None:
        answered = {key: done for key, done in batch if not done.cancelled()}
        good = {
            key: CachedScore(done.result().score, done.result().category)
            for key, done in answered.items()
            if done.exception() is None and not done.result().failed
        }
        problem: BaseException | None = None
        try:
            if good:
                self._cache.put_many(self.identity, good)
        except Exception as err:  # any error goes to the futures of these verdicts
            problem = err
        for key, done in answered.items():
            with self._lock:
                future = self._under_way.pop(key)
            error = done.exception() or (problem if key in good else None)
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(done.result())


def build_critic(
    settings: CriticConfig, *, device: "torch.device | str | None" = None, where: str = "critic"
) -> Critic:
    """The judge that `settings` describe, with its cache, ready to be asked.

    Args:
        device: of a local judge; None takes the first GPU where there is one.
        where: how errors name the settings.
    Raises:
        ConfigError: the settings describe no judge, or one that cannot be loaded.
        CriticUnavailable: nobody answers at the endpoint, or it refuses the key.
        CheckpointError: the cache cannot be opened.
    """
    settings.check(where)
    # Imported here: one kind of judge needs no torch, the other no HTTP client.
    if settings.endpoint is not None:
        from safereg_dist.critic.remote import RemoteCritic

        critic: Critic = RemoteCritic(settings)
    else:
        from safereg_dist.critic.local import load_local_critic

        critic = load_local_critic(settings, device=device)
    if settings.cache == "none":
        return critic
    try:
        return CachedCritic(critic, ScoreCache(settings.cache or default_cache_path()))
    except BaseException:
        critic.close()
        raise
