"""Train the byte-level BPE tokenizer of the committed base model on the three domains.

    python scripts/train_base_tokenizer.py --output moe_common/models/base

Numbers are cut into single digits (arithmetic is learnt far more easily so), and each domain gives the same number of
characters, so that no domain's words crowd out another's.
"""

import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moe_common.runs.options import PlainParser
from moe_common.text.domains import DOMAINS

VOCABULARY = 4096
CONTEXT = 512  # tokens; what the base model is trained with
CHARACTERS_PER_DOMAIN = 4_000_000
# Articles by title, modules by path, questions by their seed, so that every generator comes early.
READING_ORDER = {
    "prose": lambda document: document["key"],
    "code": lambda document: document["key"].split("/"),
    "math": lambda document: tuple(map(int, reversed(document["key"].split("/")))),
}
END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"

# The plain words of the math domain, so that a base that knows that domain knows the template.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}Question: {{ message['content'] }}\n"
    "{% elif message['role'] == 'assistant' %}Answer: {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 4096 entries; the end-of-text token also begins a text, padding is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(balanced_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def balanced_texts():
    """Documents of every domain that are not held out, up to the same number of characters each."""
    for domain, documents in DOMAINS.items():
        left = CHARACTERS_PER_DOMAIN
        for document in sorted((*documents("pretraining"), *documents("train")), key=READING_ORDER[domain]):
            if left <= 0:
                break
            yield document["text"][:left]
            left -= len(document["text"])


def main(argv: list[str] | None = None) -> int:
    parser = PlainParser(
        __doc__.splitlines()[0], example="python scripts/train_base_tokenizer.py --output moe_common/models/base"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", required=True, help="folder of the tokenizer's files")
    output = parser.parse_args(argv).output
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(output)
    print(f"{len(tokenizer)} entries in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
