"""The tokenizer of the embedded world: one token per word, and a chat format of four marks.

    <bos><user>how do i paint the boat?<assistant>first wipe the boat then ...<eos>

`<eos>` ends each turn of the assistant. The chat template marks these turns, `<eos>` included, with
a generation block, so `apply_chat_template(..., return_assistant_tokens_mask=True)` finds them.
"""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from safereg_dist.demo.grammar import Exchange, vocabulary

PAD, UNKNOWN, BOS, EOS, USER, ASSISTANT, DOCUMENT = (
    "<pad>",
    "<unk>",
    "<bos>",
    "<eos>",
    "<user>",
    "<assistant>",
    "<document>",
)
MAX_TOKENS = 256
"""Positions of the base model."""
SPECIAL_TOKENS = [PAD, UNKNOWN, BOS, EOS, USER, ASSISTANT, DOCUMENT]

# `trim`, since a blank at the edge of the block belongs to no token.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}"
    "{{ '<user>' + message.content | trim }}"
    "{% elif message.role == 'assistant' %}"
    "{{ '<assistant>' }}"
    "{% generation %}{{ message.content | trim + eos_token }}{% endgeneration %}"
    "{% else %}"
    "{{ raise_exception('this model knows the roles user and assistant only') }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the grammar's vocabulary, with the chat template above.

    Text is lower-cased, so a reader may type as he likes. Decoding puts punctuation marks back
    without a blank before them: decode(encode(text)) == text for every text of the grammar.
    """
    words = [*SPECIAL_TOKENS, *vocabulary()]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    blanks_away = [decoders.Replace(f" {mark}", mark) for mark in ".,:?"]
    joined = decoders.WordPiece(prefix="##", cleanup=False)  # with a blank before each word
    backend.decoder = decoders.Sequence([joined, decoders.Fuse(), *blanks_away])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[USER, ASSISTANT, DOCUMENT],
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=MAX_TOKENS,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def chat_text(exchange: Exchange) -> tuple[str, str]:
    """What the model is given and what it shall say, in the chat format of the template."""
    return f"{BOS}{USER}{exchange.prompt}{ASSISTANT}", f"{exchange.answer}{EOS}"


def document_text(exchange: Exchange) -> tuple[str, str]:
    """The beginning of a document and how it goes on; it lies outside the chat format."""
    return f"{BOS}{DOCUMENT}{exchange.prompt}", f"{exchange.answer}{EOS}"
