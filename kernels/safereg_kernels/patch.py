"""`patch_model`: a Hugging Face causal LM takes its loss from hidden states, never from all logits.

Only the call with labels changes, and of it three things, for as long as it lasts:

    lm_head.forward        computes the loss instead of logits. It runs inside the head's own module
                           call, so FSDP, ZeRO-3 and DDP gather its weight and reduce its gradient
                           as for logits.
    the head's last hook   takes the loss, after every engine's hook has seen it, and hands a few
                           probe values on in place of logits.
    model.loss_function    finds what the model did to the probes (a scale, a soft cap), compares it
                           with what the loss assumed, and gives the loss back.

So the model's own forward runs from the first line to the last (auxiliary losses, caches, output
classes), and a model that treats its logits in a way unknown here is found out, not trusted.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from safereg_kernels.cross_entropy import linear_cross_entropy
from safereg_kernels.logits_transform import logits_transform_of

Model = TypeVar("Model", bound=nn.Module)

_PROBES = (-64.0, -8.0, -1.0, 0.0, 1.0, 8.0, 64.0)
"""Stand-ins for logits: a soft cap of 100 moves the outer ones by 12 %."""
_PROBE_ROUNDING = 2.0**-5
"""What a few bfloat16 operations may do to a probe, relative to it (2^-8 each)."""
_MISSING = object()
_FORWARDS: dict[type, Callable[..., Any]] = {}
_VERIFIED: "WeakSet[nn.Module]" = WeakSet()
"""Models whose probes were looked at: once each, since it waits for the device."""


def patch_model(model: Model) -> Model:
    """The same model; its forward takes the loss by `linear_cross_entropy` where it gets labels.

    loss = sum_t CE(x_t, labels_{t+1}) / N over labels that are not -100; N is their number, or
    `num_items_in_batch` where it is given (Hugging Face's Trainer does). x is what the model makes
    of its head's output: Gemma's `final_logit_softcapping`, Cohere's `logit_scale`, Falcon-H1's
    `lm_head_multiplier` and Granite's `logits_scaling` are known. The outputs are of the model's
    own class, with `loss` and without `logits` (a Trainer's `compute_metrics` needs those: evaluate
    it unpatched). A batch without a label that counts has loss 0 (the
    model's own: NaN).

    Without labels, and so in `generate`, the forward is the original one. Class, parameters and
    `state_dict` stay as they are; a pickled model is the original one, a deep copy is patched.
    Patch before an engine wraps the model; a PEFT model's base is patched. Patching twice is once.
    Not for `nn.DataParallel`, whose replicas share one forward.

    Args:
        model: a causal LM with `get_output_embeddings`, a head that is an `nn.Linear`, and
            transformers' own `loss_function`.
    Raises:
        ValueError: if that is not so; at the first loss, if the logits are treated in another way.
    Collectives: none of its own. Host synchronisations: one a call on CUDA (`linear_cross_entropy`)
    and one more in the first.
    """
    target = _base_of(model)
    if _is_patched(target):
        return model
    if "forward" in vars(target):
        raise ValueError(
            f"{_name(target)}.forward was replaced on this instance before: patch the model first, "
            "and wrap it afterwards"
        )
    _check_loss_function(target)
    _check_head(target, _head_of(target))
    logits_transform_of(target)
    target.forward = MethodType(_forward_of(type(target)), target)  # type: ignore[assignment]
    return model


def unpatch_model(model: Model) -> Model:
    """The same model with its original forward; one that is not patched is left alone.

    Raises:
        ValueError: if the forward was wrapped after `patch_model`.
    """
    target = _base_of(model)
    if _is_patched(target):
        del target.forward
        _VERIFIED.discard(target)
    elif getattr(vars(target).get("forward"), "__wrapped__", None) is not None:
        raise ValueError(
            f"{_name(target)}.forward was wrapped on this instance: take that off before the patch"
        )
    return model


# ---- the forward -------------------------------------------------------------------------------


def _forward_of(model_class: type) -> Callable[..., Any]:
    """The patched forward of a class: one function each, so that it can show the class's signature.

    It bears the name `forward`, by which pickle finds the original one, and no `__wrapped__`, by
    which accelerate would undo it.
    """
    if model_class not in _FORWARDS:
        original = inspect.signature(model_class.forward)

        # What it sets for a while is not for a compiler; the model's own forward below it is.
        @torch.compiler.disable(recursive=False)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            given = original.bind(self, *args, **kwargs)
            run = type(self).forward  # not the one above: FSDP2 gives the model a class of its own
            extra = given.kwargs
            labels = given.arguments.get("labels", extra.get("labels"))
            if labels is None:
                return run(self, *args, **kwargs)
            return _with_loss(self, labels, extra, lambda: run(self, *args, **kwargs))

        vars(forward).pop("__wrapped__", None)
        forward.__signature__ = original  # type: ignore[attr-defined]
        forward.__doc__ = model_class.forward.__doc__
        _FORWARDS[model_class] = forward
    return _FORWARDS[model_class]


def _with_loss(
    model: nn.Module, labels: Tensor, options: dict[str, Any], run: Callable[[], Any]
) -> Any:
    """The model's outputs, `run()`, with the loss of its labels and without logits."""
    job = _Job(model, labels, options)
    with job.installed():
        try:
            outputs = run()
        except _UnknownModelError:
            raise
        except Exception as error:
            if job.is_between:
                raise job.refusal("does something of its own with the logits of labels") from error
            raise
    if not job.is_asked:
        raise job.refusal("has labels but does not call loss_function")
    return _without_logits(outputs)


class _UnknownModelError(ValueError):
    """A model whose forward is not what it was taken for."""


class _Job:
    """One call with labels: what stands in for the head, for its output, and for the loss."""

    def __init__(self, model: nn.Module, labels: Tensor, options: dict[str, Any]) -> None:
        self._model, self._labels = model, labels
        self._shifted = options.get("shift_labels")
        ignore_index = options.get("ignore_index")
        self._ignore_index = -100 if ignore_index is None else ignore_index
        self._head = _head_of(model)
        _check_head(model, self._head)
        self._transform = logits_transform_of(model)
        self._loss: Tensor | None = None
        self.is_asked = False

    @property
    def is_between(self) -> bool:
        """True where the head has run and the loss was not asked for yet."""
        return self._loss is not None and not self.is_asked

    def refusal(self, what: str) -> _UnknownModelError:
        """The error of a model that is not what it was taken for."""
        return _UnknownModelError(
            f"{_name(self._model)} {what}: call unpatch_model and use its own loss"
        )

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The three stand-ins, and afterwards what was there before."""
        hook = self._head.register_forward_hook(self._hand_on_probes)
        try:
            with (
                _replaced(self._head, "forward", self._head_forward),
                _replaced(self._model, "loss_function", self._loss_function),
            ):
                yield
        finally:
            hook.remove()

    def _head_forward(self, hidden: Tensor) -> Tensor:
        """The mean over the labels that count, in place of `lm_head.forward`."""
        if self._loss is not None:
            raise self.refusal("calls its head twice")
        weight, bias = self._head.weight, self._head.bias
        whole = (self._head.out_features, self._head.in_features)
        if weight.shape != whole or hasattr(weight, "device_mesh"):
            raise ValueError(
                f"the head's weight is a {type(weight).__name__} {tuple(weight.shape)} inside its "
                f"own forward, expected all of {whole}: a head that stays split between ranks "
                "needs vocab_parallel_linear_ce_kl"
            )
        labels = self._labels if self._shifted is None else self._shifted
        loss = linear_cross_entropy(
            hidden,
            weight,
            labels.to(hidden.device),
            bias=bias,
            softcap=self._transform.softcap,
            logit_scale=self._transform.scale,
            ignore_index=self._ignore_index,
            shift=self._shifted is None,
        )
        assert isinstance(loss, Tensor)
        return loss

    def _hand_on_probes(self, head: nn.Module, inputs: Any, loss: Tensor) -> Tensor:
        self._loss = loss
        dtype = self._head.weight.dtype
        if torch.is_autocast_enabled(loss.device.type):
            dtype = torch.get_autocast_dtype(loss.device.type)
        return torch.tensor(_PROBES, dtype=dtype, device=loss.device).view(1, 1, -1)

    @torch.compiler.disable(reason="looks at values")
    def _loss_function(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """The loss, in place of transformers' `ForCausalLMLoss`, with its arguments."""
        self.is_asked = True
        if self._loss is None:
            raise self.refusal("does not call the module that get_output_embeddings names")
        is_other = labels is not self._labels and labels.device == self._labels.device
        if is_other or shift_labels is not self._shifted or ignore_index != self._ignore_index:
            raise self.refusal("changes the labels that it was given")
        self._verify(logits)
        if num_items_in_batch is None:
            return self._loss
        # A mean times a number, and not a sum: engines may round the head's output to float16.
        if shift_labels is None:
            shift_labels = labels[..., 1:]
        count = (shift_labels != ignore_index).sum().to(self._loss.device)
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(self._loss.device)
        return self._loss * (count / num_items_in_batch)

    def _verify(self, logits: Tensor) -> None:
        """ValueError unless the model did to the probes what the loss assumed of logits."""
        if self._model in _VERIFIED:
            return
        probes = torch.tensor(_PROBES)
        assumed, seen = self._transform(probes), logits.detach().float().cpu().flatten()
        bound = _PROBE_ROUNDING * assumed.abs() + 1e-6
        if seen.shape != assumed.shape or bool(((seen - assumed).abs() > bound).any()):
            raise self.refusal(
                f"treats logits in a way unknown here ({_PROBES} became {seen.tolist()}, expected "
                f"{assumed.tolist()})"
            )
        _VERIFIED.add(self._model)


@contextmanager
def _replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """An attribute set for a while; what it leaves in the instance is taken away again.

    transformers keeps `loss_function` under `_loss_function`, hence the look at both.
    """
    names = (name, f"_{name}")
    before = {key: vars(module).get(key, _MISSING) for key in names}
    setattr(module, name, value)
    try:
        yield
    finally:
        for key, old in before.items():
            if old is not _MISSING:
                vars(module)[key] = old
            else:
                vars(module).pop(key, None)


@torch.compiler.disable(reason="makes an object of a class that only the model knows")
def _without_logits(outputs: Any) -> Any:
    if isinstance(outputs, tuple):
        return outputs[:1] + outputs[2:]
    return type(outputs)(**{key: value for key, value in outputs.items() if key != "logits"})


# ---- what a model is ---------------------------------------------------------------------------


def _base_of(model: nn.Module) -> nn.Module:
    """The Hugging Face model; PEFT calls it by its `forward`, not as a module."""
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def _is_patched(model: nn.Module) -> bool:
    return getattr(vars(model).get("forward"), "__func__", None) in _FORWARDS.values()


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _head_of(model: nn.Module) -> nn.Linear:
    get_head = getattr(model, "get_output_embeddings", None)
    return None if get_head is None else get_head()  # type: ignore[return-value]


def _check_head(model: nn.Module, head: Any) -> None:
    """ValueError unless the head is an `nn.Linear` that multiplies as one."""
    # Quantised and adapted heads derive from nn.Linear and have a forward of their own.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        kind = f"{type(head).__module__}.{type(head).__qualname__}"
        raise ValueError(
            f"{_name(model)} has the head {kind}, expected nn.Linear: train the head unquantised "
            "and without an adapter, or use the model's own loss"
        )
    if "forward" in vars(head):
        raise ValueError(
            f"{_name(model)}'s head has a forward set on the instance (accelerate does so for "
            "device_map and offloading): load the model without it"
        )


def _check_loss_function(model: nn.Module) -> None:
    name = getattr(getattr(model, "loss_function", None), "__name__", None)
    if name != "ForCausalLMLoss":
        raise ValueError(
            f"{_name(model)} has the loss function {name}, expected transformers' ForCausalLMLoss "
            "(a causal LM of transformers 4.48 or later): use the model's own loss"
        )
